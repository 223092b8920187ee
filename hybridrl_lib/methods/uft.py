"""UFT (arXiv 2505.16984): answers go on from a hint, the beginning of the demonstration.

    the demonstration in n = 5 chunks;  p_t = low + (high - low) (1 + cos(pi t / T_hint)) / 2
    in every step t:
        each problem: h ~ Binomial(n, p_t) while t < T_hint, else 0; hint = the first h chunks
        G answers that go on from prompt + hint, judged with the hint before them
        L = L_GRPO(answers) + c * mean of -log pi over the tokens of the hints

Read from the released code: 0.95 falls to 0.05 over 300 of 500 steps, c = 0.001, 4 answers, caps of
1024 tokens on prompt and on answer, and it is reported for Qwen2.5-0.5B. As there, h is drawn once
a problem, so that the answers of a group share their hint; the whole demonstration may be shown,
and then only its end is left to say; and a hint counts as prompt: it is cut so that prompt and hint
stay within data.max_prompt_tokens. Different from it: it cuts at the steps of a solution, here the
chunks are of equal tokens, since not every benchmark's solutions have steps that can be told apart;
T_hint is a share of the run; and the NLL is a mean over the update, not over micro-batches. Its KL
is to the reference. While the hints fade the reward falls and the entropy rises by themselves: the
warnings `reward_fall` and `entropy_explosion` say no more than that then.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..setups import Setup
from .method import Method, Progress, mixing_stage

if TYPE_CHECKING:
    from ..problems import Problem
    from ..steps import Step
    from ..updates import Update


@dataclass(frozen=True)
class UFTSettings(Section):
    """How long hints are, for how long there are any, and what their tokens weigh."""

    section: ClassVar[str] = "uft"
    chunks: int = setting(5, "n, parts of a demonstration", "released code: 5", at_least=1)
    high: float = setting(0.95, "p at the first step", "released code: 0.95",
                          at_least=0, at_most=1)
    low: float = setting(0.05, "p when the hints end", "released code: 0.05",
                         at_least=0, at_most=1)
    hinted: float = setting(0.6, "share of the steps that have hints", "released code: 300 of 500",
                            at_least=0, at_most=1)
    sft_coefficient: float = setting(0.001, "c, weight of the hints' negative log-likelihood",
                                     "released code: 0.001", at_least=0)

    def check(self) -> None:
        if self.low > self.high:
            self.refuse("low", f"it is above uft.high = {self.high:g}")


class UFT(Method):
    """RL from hints that become shorter, with a little SFT on the hints."""

    settings_section = UFTSettings

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.stages = (mixing_stage(settings),)
        self.shown: list[list[int]] = []  # the hints of the step being taken

    def begin(self, trainer) -> None:
        self.policy = trainer.policy

    def probability(self, progress: Progress) -> float:
        """p_t; 0 once the hints are over."""
        last = self.own.hinted * progress.steps
        if progress.step >= last:
            return 0.0
        way = (1 + math.cos(math.pi * progress.step / last)) / 2
        return self.own.low + (self.own.high - self.own.low) * way

    def hints(self, problems: "list[Problem]", progress: Progress) -> list[list[int]]:
        draws, p, chunks = progress.random("uft"), self.probability(progress), self.own.chunks
        self.shown = []
        for problem in problems:
            shown = sum(draws.random() < p for _ in range(chunks))
            solution = self.policy.encode_completion(problem.solution)[:-1]  # an end is no hint
            room = (self.settings.data.max_prompt_tokens
                    - len(self.policy.encode_prompt(problem.question)))
            self.shown.append(solution[:min(round(shown / chunks * len(solution)), max(0, room))])
        return self.shown

    def compose(self, step: "Step") -> "list[Update]":
        from ..packing import PromptCompletion

        updates, count = [], step.mini_batches
        for i in range(count):
            rollouts, hints = step.rollouts[i::count], self.shown[i::count]
            taught = [PromptCompletion(self.policy.encode_prompt(rollout.problem.question), hint)
                      for rollout, hint in zip(rollouts, hints, strict=True) if hint]
            updates.append(step.update(taught, rollouts, sft=self.own.sft_coefficient))
        lengths = [len(hint) for hint in self.shown]
        step.row |= {"uft/p": self.probability(step.progress),
                     "uft/hint_length": sum(lengths) / len(lengths),
                     "uft/hinted": sum(length > 0 for length in lengths) / len(lengths)}
        return updates

"""UFT (arXiv 2505.16984): answers continue a hint, the beginning of the demonstration.

    the demonstration in n = 5 chunks;  p_t = low + (high - low) (1 + cos(pi t / T_hint)) / 2
    in every step t:
        each problem: h ~ Binomial(n, p_t) while t < T_hint, else 0; hint = the first h chunks
        G answers that continue prompt + hint, judged with the hint before them
        L = L_GRPO(answers) + c * mean of -log pi over the tokens of the hints

Read from the released code: 0.95 falls to 0.05 over 300 of 500 steps, c = 0.001, 4 answers, at most
1024 tokens per prompt and per answer, and it is reported for Qwen2.5-0.5B. As there, h is drawn
once per problem, so the answers of a group share their hint; the whole demonstration may be shown,
and then only its end is left to say; and a hint counts as prompt: it is truncated so that prompt
and hint stay within data.max_prompt_tokens. Differences: the code cuts at the steps of a solution,
here the chunks have equal numbers of tokens, since not every benchmark's solutions have
distinguishable steps; T_hint is a fraction of the run; and the NLL is a mean over the update, not
over micro-batches. The code has a KL to the reference with weight 0.001 (k3), an entropy term of
0.001, and the token mean in L_GRPO; the setup `uft` has the preset's beta, no entropy term, and the
sequence mean (`rl.beta=0.001 rl.kl_estimator=k3 rl.loss_normalization=token_mean` gives the code's
choice). While the hints fade the reward falls and the entropy rises by themselves; the warnings
`reward_fall` and `entropy_explosion` then mean no more than that.
"""

import math

from ..config.settings import Settings
from ..learning.progress import Progress
from ..learning.step import Step
from ..learning.update import Update
from ..policy.packing import PromptCompletion
from ..problems.problem import Problem
from ..setups import Setup
from .method import Method


class UFT(Method):
    """RL from hints that become shorter, with a little SFT on the hints."""

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.shown: list[list[int]] = []  # the hints of the current step

    def probability(self, progress: Progress) -> float:
        """p_t; 0 once the hints are over."""
        last = self.own.hinted * progress.steps
        if progress.step >= last:
            return 0.0
        left = (1 + math.cos(math.pi * progress.step / last)) / 2
        return self.own.low + (self.own.high - self.own.low) * left

    def hints(self, problems: list[Problem], progress: Progress) -> list[list[int]]:
        policy, chunks = self.run.policy, self.own.chunks
        draws, p = progress.random("uft"), self.probability(progress)
        self.shown = []
        for problem in problems:
            shown = sum(draws.random() < p for _ in range(chunks))
            solution = policy.encode_completion(problem.solution)[:-1]  # EOS is not a hint
            room = (self.settings.data.max_prompt_tokens
                    - len(policy.encode_prompt(problem.question)))
            self.shown.append(solution[:min(round(shown / chunks * len(solution)), max(0, room))])
        return self.shown

    def compose(self, step: Step) -> list[Update]:
        encode_prompt = self.run.policy.encode_prompt
        updates, count = [], step.mini_batches
        for i in range(count):
            rollouts, hints = step.rollouts[i::count], self.shown[i::count]
            taught = [PromptCompletion(encode_prompt(rollout.problem.question), hint)
                      for rollout, hint in zip(rollouts, hints, strict=True) if hint]
            updates.append(step.update(taught, rollouts, sft=self.own.sft_coefficient))
        lengths = [len(hint) for hint in self.shown]
        step.row |= {"uft/p": self.probability(step.progress),
                     "uft/hint_length": sum(lengths) / len(lengths),
                     "uft/hinted": sum(length > 0 for length in lengths) / len(lengths)}
        return updates

r"""PRL (arXiv 2601.10201): process rewards out of the log-ratio to the reference; v2 is FRPO.

    delta_j = log pi_old(o_j) - log pi_reference(o_j)
    A_t = A^GRPO - beta * sum_{j in S(t)} delta_j        a constant: no gradient flows through it
    the clipped surrogate with A_t and no KL term: that KL is in A_t already

v1 (Algorithm 1): an answer is cut into steps, of so many tokens or at line ends, and S(t) is what
follows the step of t. v2 (Eq. 5.1, "Future-KL regularised GRPO"): every token is a step and S(t)
begins with t itself. beta is v1's 1 / eta. The KL enters after the group's normalisation, which is
v2's point: before it, the group's deviation would re-scale it.

v2 was read in full; v1 is second-hand. The released code is of v1's time: it cuts steps as v1 does
and counts each step's last token into its own suffix (`prl.suffix=inclusive`), which theory starts
one token later. None of its three launch scripts runs Algorithm 1. A line end is looked for in the
text of each token here; the code looks for one token id and misses others that end a line. The
reference is the model as loaded; `rl.kl_anchor` is of the KL term, which there is none of.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..setups import Setup
from .staged import Staged

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PRLSettings(Section):
    """The process reward."""

    section: ClassVar[str] = "prl"
    beta: float = setting(0.01, "weight of the log-ratio summed over the rest of the answer; 1/eta",
                          "v2: 0.01; v1's scripts: 1 to 1/200", at_least=0)
    steps: str = setting("token", "token = every token is a step; fixed = so many tokens; newline "
                         "= a step ends with its line", "v2: token; v1: the others",
                         choices=("token", "fixed", "newline"))
    step_tokens: int = setting(16, "length of a step where prl.steps=fixed (tokens)",
                               "v1: 256 of 3072; 16 and 64 did worse than GRPO", at_least=1)
    suffix: str = setting("inclusive", "whether a step's last token counts into its own sum",
                          "v2 and the released code: inclusive; v1: exclusive",
                          choices=("inclusive", "exclusive"))


class PRL(Staged):
    """RL whose advantage differs by token: how far the rest of the answer left the reference."""

    settings_section = PRLSettings
    needs_reference = True
    dynamic_sampling = False

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        if settings.rl.beta > 0:
            settings.rl.refuse("beta", "the method prl has the KL in its advantage, and in the "
                               "loss it would count twice; set rl.beta=0 and choose prl.beta")
        if self.own.steps == "fixed" and self.own.step_tokens >= settings.rl.max_new_tokens:
            self.own.refuse("step_tokens", "the whole answer would be one step; choose fewer than "
                            f"rl.max_new_tokens = {settings.rl.max_new_tokens}")

    def begin(self, trainer) -> None:
        @cache
        def ends_line(token: int) -> bool:
            return "\n" in trainer.policy.decode([token])
        self.ends_line = ends_line

    def compose(self, step):
        if not step.rollouts:
            return super().compose(step)
        updates, corrections = [], []
        for index in range(step.mini_batches):
            rollouts = step.rollouts[index::step.mini_batches]
            mine = self._corrections(step, rollouts)
            corrections += mine
            updates.append(step.update(rollouts=rollouts, token_advantages=[-c for c in mine]))
        advantages = [a for update in updates for a in update.advantages.tolist()]
        size = _token_mean([c.abs() for c in corrections])
        outcome = _token_mean([c.new_full(c.shape, abs(a))
                               for c, a in zip(corrections, advantages, strict=True)])
        step.row["prl/correction"] = size
        if outcome > 0:
            step.row["prl/correction_ratio"] = size / outcome
        return updates

    def _corrections(self, step, rollouts) -> "list[Tensor]":
        """beta * sum delta for every token of every answer, (T_i,) each.

        Both policies are scored by the same passes, in which rounding cancels: the sampler's
        log-probabilities would leave noise that the sum over an answer adds up.
        """
        sequences = [sequence for rollout in rollouts for sequence in rollout.sequences]
        reference = [tensor for rollout in rollouts for tensor in rollout.reference]
        return [self.own.beta * self.suffix_sums((now - base).cpu(), sequence.completion)
                for now, base, sequence in zip(step.learner.scores(sequences), reference,
                                               sequences, strict=True)]

    def suffix_sums(self, delta: "Tensor", tokens: list[int]) -> "Tensor":
        """sum_{j in S(t)} delta_j for every token t, (T,); the same over a step's tokens."""
        sums = delta.flip(0).cumsum(0).flip(0)
        if self.own.suffix == "exclusive":
            sums = sums - delta
        last = len(tokens) - 1
        ends = [t for t, token in enumerate(tokens) if t == last or self._ends_step(t, token)]
        lengths = [end - before for before, end in zip([-1, *ends], ends, strict=False)]
        return sums[ends].repeat_interleave(sums.new_tensor(lengths).long())

    def _ends_step(self, place: int, token: int) -> bool:
        if self.own.steps == "newline":
            return self.ends_line(token)
        return self.own.steps == "token" or (place + 1) % self.own.step_tokens == 0


def _token_mean(terms: "list[Tensor]") -> float:
    return float(sum(term.sum() for term in terms)) / sum(len(term) for term in terms)

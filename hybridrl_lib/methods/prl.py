r"""PRL (arXiv 2601.10201): process rewards from the log-ratio to the reference; v2 is FRPO.

    delta_j = log pi_old(o_j) - log pi_reference(o_j)
    A_t = A^GRPO - beta * sum_{j in S(t)} delta_j        a constant: no gradient flows through it
    the clipped surrogate with A_t and no KL term: the KL is already in A_t

v1 (Algorithm 1): an answer is cut into steps, of a fixed number of tokens or at line ends, and
S(t) is what follows the step of t. v2 (Eq. 5.1, "Future-KL regularised GRPO"): every token is a
step and S(t) starts with t itself. beta is v1's 1 / eta. The KL enters after the group's
normalization, which is v2's point: before it, the group's deviation would rescale it.

v2 was read in full; v1 is second-hand. The released code is from v1's time: it cuts steps as v1
does and counts each step's last token in its own suffix (`prl.suffix=inclusive`), which theory
starts one token later. None of its three launch scripts runs Algorithm 1. Here a line end is
searched in the text of each token; the code searches for one token id and misses others that end a
line. The reference is the base model; `rl.kl_anchor` belongs to the KL term, which is absent.
"""

from collections.abc import Sequence
from functools import cache

from torch import Tensor

from ..learning.step import Rollout, Step
from ..learning.update import Update
from .method import Run
from .staged import Staged


class PRL(Staged):
    """RL with a per-token advantage: how far the rest of the answer moved from the reference."""

    needs_reference = True

    def begin(self, run: Run) -> None:
        super().begin(run)

        @cache
        def ends_line(token: int) -> bool:
            return "\n" in run.policy.decode([token])
        self.ends_line = ends_line

    def compose(self, step: Step) -> list[Update]:
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

    def _corrections(self, step: Step, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """beta * sum delta for every token of every answer, (T_i,) each.

        Both policies are scored by the same passes, in which rounding cancels: the sampler's
        log-probabilities would leave noise that the sum over an answer adds up.
        """
        sequences = [sequence for rollout in rollouts for sequence in rollout.sequences]
        reference = [tensor for rollout in rollouts for tensor in rollout.reference]
        return [self.own.beta * self.suffix_sums((now - base).cpu(), sequence.completion)
                for now, base, sequence in zip(step.learner.scores(sequences), reference,
                                               sequences, strict=True)]

    def suffix_sums(self, delta: Tensor, tokens: Sequence[int]) -> Tensor:
        """sum_{j in S(t)} delta_j for every token t, (T,); equal within a step."""
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


def _token_mean(terms: Sequence[Tensor]) -> float:
    return float(sum(term.sum() for term in terms)) / sum(len(term) for term in terms)

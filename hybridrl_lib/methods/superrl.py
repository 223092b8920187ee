"""SuperRL (arXiv 2506.01096): RL on the problems that an answer solved, SFT on the others.

    c(x) = 1 if any of the G answers is correct, else 0                (paper's equation 3.2)
    L(x) = (1 - c(x)) L_SFT(x, demonstration) + c(x) L_GRPO(x, answers)

All of it is second-hand, from two notes and five reviews; neither the paper nor its code was
available. Each reading is a setting:

`granularity`  the paper's rule is per problem; the code reportedly looks at all answers of an
               update at once, so one solved problem sends all of them to RL (`superrl_code`).
`gate`         `advantage` is the paper's SuperRL-A: c = 1 if any advantage is above 0. Problems
               that every answer solved then go to SFT as well.
`unsolved`     `drop` is the control that reviewers asked for: the problems with c = 0 leave the
               update, and the mean of L_GRPO is over the rest.
`mixing`       `log_sigma` is Hybrid-Log-Sigma: no gate, both losses on every problem,
                   L = exp(-2 s_rl) L_GRPO + exp(-2 s_sft) L_SFT + s_rl + s_sft,
               and s_rl, s_sft follow their own gradients, 1 - 2 exp(-2 s) L, once per step with the
               step's mean losses. The notes give initial values 0 and 1, a decay of 0.99, and a
               floor of -2. Unclear: which s has which value, and what decays; here s itself does.

Not found, unverified: G, learning rates, batch sizes, lengths, and how the two losses are
normalized relative to each other. Our choice: each problem keeps its share of the update. With a
share w of unsolved problems the loss is w * (mean of L_SFT over their demonstrations) + (1 - w) *
(mean of L_GRPO over the others' answers).
"""

import math

from ..config.settings import Settings
from ..learning.progress import Progress, Weights
from ..learning.step import Rollout, Step
from ..learning.update import Totals, Update
from ..setups import Setup
from .method import Method


class Gated(Method):
    """Each problem of an update is learned by RL or by SFT: what SuperRL and HPT share.

    Attributes:
        sft_coefficient: factor of L_SFT.
        unsolved: `sft`, or `drop` for the problems that the gate keeps from RL.
        largest_norm: an update with a larger gradient norm is skipped.
    """

    sft_coefficient, unsolved, largest_norm = 1.0, "sft", math.inf

    def learn_by_rl(self, rollouts: list[Rollout]) -> list[bool]:
        """c of every problem of an update."""
        raise NotImplementedError

    def compose(self, step: Step) -> list[Update]:
        updates, taught, count = [], 0, step.mini_batches
        for rollouts in (step.rollouts[i::count] for i in range(count)):
            gates = self.learn_by_rl(rollouts)
            rest = [r for r, by_rl in zip(rollouts, gates, strict=True) if by_rl]
            closed = [r.problem for r, by_rl in zip(rollouts, gates, strict=True) if not by_rl]
            share, taught = len(closed) / max(1, len(rollouts)), taught + len(closed)
            if self.unsolved == "drop":
                closed, share = [], 0.0
            updates.append(step.update(closed, rest, sft=share * self.sft_coefficient,
                                       rl=1 - share, largest_norm=self.largest_norm))
        name = self.setup.method
        step.row |= {f"{name}/closed": taught,
                     f"{name}/sft_share": taught / max(1, len(step.rollouts))
                     if self.unsolved == "sft" else 0.0}
        return updates

    def learn(self, step: Step, updates: list[Update], totals: Totals) -> list[float]:
        norms = super().learn(step, updates, totals)
        if self.largest_norm < math.inf:
            step.row[f"{self.setup.method}/left_out"] = totals.counts.get("left_out", 0)
        return norms


class SuperRL(Gated):
    """RL where an answer earned a reward, SFT where none did."""

    kept = ("sigma",)

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.unsolved = self.own.unsolved
        self.sigma = {"sft": self.own.sigma_sft, "rl": self.own.sigma_rl}

    def weights(self, progress: Progress) -> Weights:
        if self.own.mixing == "gate":
            return super().weights(progress)
        return Weights(**{name: math.exp(-2 * sigma) for name, sigma in self.sigma.items()})

    def learn_by_rl(self, rollouts: list[Rollout]) -> list[bool]:
        wanted = "rewards" if self.own.gate == "reward" else "advantages"
        gates = [bool((getattr(rollout, wanted) > 0).any()) for rollout in rollouts]
        return gates if self.own.granularity == "problem" else [any(gates)] * len(gates)

    def compose(self, step: Step) -> list[Update]:
        if self.own.mixing == "gate":
            return super().compose(step)
        step.demonstrations = [rollout.problem for rollout in step.rollouts]
        step.row |= {f"superrl/sigma_{name}": sigma for name, sigma in self.sigma.items()}
        return Method.compose(self, step)

    def after_step(self, row: dict, progress: Progress) -> None:
        """One step of gradient descent on L in both s."""
        if self.own.mixing == "gate":
            return
        for name, sigma in self.sigma.items():
            if f"loss/{name}" in row:  # absent if it was not finite, or had no part in the step
                slope = 1 - 2 * math.exp(-2 * sigma) * row[f"loss/{name}"]
                sigma = (sigma - self.own.sigma_learning_rate * slope) * self.own.sigma_decay
                self.sigma[name] = max(self.own.sigma_floor, sigma)

"""SuperRL (arXiv 2506.01096): RL on the problems that some answer solved, SFT on the others.

    c(x) = 1 if any of the G answers is right, else 0                  (paper's equation 3.2)
    L(x) = (1 - c(x)) L_SFT(x, demonstration) + c(x) L_GRPO(x, answers)

All of it is second-hand, from two notes and five reviews; neither the paper nor its code could be
read. Each reading is a setting:

`granularity`  the paper's rule is per problem; the code is said to look at a whole update's
               answers at once, so that one solved problem sends all to RL (`superrl_code`).
`gate`         `advantage` is the paper's SuperRL-A: c = 1 if any advantage is above 0. Problems
               that every answer solved then go to SFT as well.
`unsolved`     `drop` is the control that reviewers missed: the problems with c = 0 leave the
               update, and the mean of L_GRPO is over the rest.
`mixing`       `log_sigma` is Hybrid-Log-Sigma: no gate, both losses on every problem,
                   L = exp(-2 s_rl) L_GRPO + exp(-2 s_sft) L_SFT + s_rl + s_sft,
               and s_rl, s_sft follow their own gradients, 1 - 2 exp(-2 s) L, once a step with the
               step's mean losses. The notes give initial values 0 and 1, a decay of 0.99 and a
               floor of -2. Unclear: which s has which value, and what decays; here s itself does.

Not found, unverified: G, learning rates, batch sizes and lengths. Not found either: how the two
losses are normalised against each other. Our choice: each problem keeps its share of the update.
With a share w of unsolved problems the loss is
w * (mean of L_SFT over their demonstrations) + (1 - w) * (mean of L_GRPO over the others' answers).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..setups import Setup
from .method import Method, Progress, Weights, mixing_stage

if TYPE_CHECKING:
    from ..steps import Rollout, Step
    from ..updates import Update


class Gated(Method):
    """Each problem of an update is taught by RL or by SFT: what SuperRL and HPT share.

    Attributes:
        sft_coefficient: factor of L_SFT.
        unsolved: `sft`, or `drop` for the problems that the gate keeps from RL.
        largest_norm: an update with a larger gradient is left out.
    """

    sft_coefficient, unsolved, largest_norm = 1.0, "sft", math.inf

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.stages = (mixing_stage(settings),)

    def learn_by_rl(self, rollouts: "list[Rollout]") -> list[bool]:
        """c of every problem of an update."""
        raise NotImplementedError

    def compose(self, step: "Step") -> "list[Update]":
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

    def learn(self, step, updates, totals):
        norms = super().learn(step, updates, totals)
        if self.largest_norm < math.inf:
            step.row[f"{self.setup.method}/left_out"] = totals.counts.get("left_out", 0)
        return norms


@dataclass(frozen=True)
class SuperRLSettings(Section):
    """The gate, or what stands in its place."""

    section: ClassVar[str] = "superrl"
    mixing: str = setting("gate", "gate = a problem is taught by one of the losses; log_sigma = "
                          "by both, with learned weights", "paper: both",
                          choices=("gate", "log_sigma"))
    gate: str = setting("reward", "what opens the gate to RL: a right answer, or an advantage "
                        "above 0", "paper: both; reward is its main one",
                        choices=("reward", "advantage"))
    granularity: str = setting("problem", "problem = each has its gate; update = one gate for all "
                               "problems of an optimiser update",
                               "paper: problem; its code is said to be: update",
                               choices=("problem", "update"))
    unsolved: str = setting("sft", "what becomes of a problem whose gate is closed; drop = "
                            "nothing, the control", "paper: sft", choices=("sft", "drop"))
    sigma_sft: float = setting(1.0, "log_sigma: s_sft at the beginning",
                               "notes: 0 and 1, not which is which")
    sigma_rl: float = setting(0.0, "log_sigma: s_rl at the beginning",
                              "notes: 0 and 1, not which is which")
    sigma_learning_rate: float = setting(0.01, "log_sigma: step of plain gradient descent on s",
                                         at_least=0)
    sigma_decay: float = setting(0.99, "log_sigma: s is multiplied by it at every step",
                                 "notes: 0.99, not of what", above=0, at_most=1)
    sigma_floor: float = setting(-2.0, "log_sigma: s never falls below it, so that a loss weighs "
                                 "at most exp(4) = 55", "notes", at_most=0)

    def check(self) -> None:
        if self.mixing == "log_sigma" and (self.gate, self.granularity, self.unsolved) != (
                "reward", "problem", "sft"):
            self.refuse("mixing", "there is no gate then; leave out superrl.gate, "
                        "superrl.granularity and superrl.unsolved")
        for name in ("sigma_sft", "sigma_rl"):
            if getattr(self, name) < self.sigma_floor:
                self.refuse(name, f"it is below superrl.sigma_floor = {self.sigma_floor:g}")


class SuperRL(Gated):
    """RL where an answer earned a reward, SFT where none did."""

    settings_section = SuperRLSettings

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.unsolved = self.own.unsolved
        self.sigma = {"sft": self.own.sigma_sft, "rl": self.own.sigma_rl}

    def weights(self, progress: Progress) -> Weights:
        if self.own.mixing == "gate":
            return super().weights(progress)
        return Weights(**{name: math.exp(-2 * sigma) for name, sigma in self.sigma.items()})

    def learn_by_rl(self, rollouts):
        wanted = "rewards" if self.own.gate == "reward" else "advantages"
        gates = [bool((getattr(rollout, wanted) > 0).any()) for rollout in rollouts]
        return gates if self.own.granularity == "problem" else [any(gates)] * len(gates)

    def compose(self, step):
        if self.own.mixing == "gate":
            return super().compose(step)
        step.demonstrations = [rollout.problem for rollout in step.rollouts]
        step.row |= {f"superrl/sigma_{name}": sigma for name, sigma in self.sigma.items()}
        return Method.compose(self, step)

    def after_step(self, row, progress):
        """One step of gradient descent on L in both s."""
        if self.own.mixing == "gate":
            return
        for name, sigma in self.sigma.items():
            if f"loss/{name}" in row:  # absent if it was not finite, or had no part in the step
                slope = 1 - 2 * math.exp(-2 * sigma) * row[f"loss/{name}"]
                sigma = (sigma - self.own.sigma_learning_rate * slope) * self.own.sigma_decay
                self.sigma[name] = max(self.own.sigma_floor, sigma)

    def state(self):
        return {"sigma": self.sigma}

    def load_state(self, state):
        self.sigma = state["sigma"]

"""CHORD (arXiv 2508.11408): both losses in every step, with weights over time and over tokens.

    L = (1 - mu) L_GRPO + mu L_SFT-phi
    L_SFT-phi = -mean over tokens of  sg(phi(p)) log p,    p = pi_theta(token), phi(p) = p (1 - p)

CHORD-mu (`chord`): phi = 1, mu rises linearly from 0 to its peak and falls along half a cosine
to its valley, 0.9 -> 0.05 in the paper. CHORD-phi (`chord_phi`): constant mu = 0.1. Adaptive
(`chord_adaptive`): mu = max(0, tau - mean reward), tau 0.5 or, which the paper found bad, 0.7; here
the reward is that of the step before, 0 before the first, since mu is needed before any answer is
sampled.

Read from the paper's text and from Trinity-RFT's code. Ambiguous: the decay lasts 30 steps in one
place and 200 in another; here warm-up and decay are shares of the run. Strictly on-policy, so one
update a batch of rollouts. The SFT batch has as many demonstrations as RL has problems, from an
order of its own; the paper has 64 for 32. phi takes most of the loss's size away, as p (1 - p) is
at most 1/4: mu of the two variants cannot be compared.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from ..config import Settings
from ..distributed import together
from ..fields import Section, setting
from ..setups import Setup
from .method import Method, Progress, Weights, mixing_stage


@dataclass(frozen=True)
class CHORDSettings(Section):
    """mu over the run, and phi."""

    section: ClassVar[str] = "chord"
    schedule: str = setting("cosine", "how mu moves: cosine = warm-up, then from peak to valley; "
                            "constant = at its peak; adaptive = max(0, tau - mean reward)",
                            "paper: all three", choices=("cosine", "constant", "adaptive"))
    peak: float = setting(0.9, "cosine and constant: largest mu", "CHORD-mu: 0.9, CHORD-phi: 0.1",
                          at_least=0, at_most=1)
    valley: float = setting(0.05, "cosine: mu at the end of the decay", "paper: 0.05",
                            at_least=0, at_most=1)
    warmup: float = setting(0.1, "cosine: share of the steps in which mu rises from 0 to its peak",
                            at_least=0, at_most=1)
    decay: float = setting(0.5, "cosine: share of the steps in which mu falls from peak to valley",
                           "paper: 30 or 200 steps", at_least=0, at_most=1)
    tau: float = setting(0.5, "adaptive: the mean reward from which mu is 0",
                         "paper: 0.5 fine, 0.7 bad", above=0, below=1)
    phi: str = setting("none", "weight of a token in the SFT loss: none = 1; uncertainty = "
                       "p (1 - p), without gradient", "CHORD-mu: none; CHORD-phi: uncertainty",
                       choices=("none", "uncertainty"))

    def check(self) -> None:
        if self.schedule == "cosine":
            if self.valley > self.peak:
                self.refuse("valley", f"it is above chord.peak = {self.peak:g}")
            if self.warmup + self.decay > 1:
                self.refuse("decay", f"with chord.warmup = {self.warmup:g} it ends after the run; "
                            "their sum is at most 1")


class CHORD(Method):
    """A scheduled weight between the losses, and a weight for every token of a demonstration."""

    settings_section = CHORDSettings
    own_loss = True

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.stages = (mixing_stage(settings),)
        self.reward = 0.0  # mean of the step before

    def mu(self, progress: Progress) -> float:
        """The weight of L_SFT at a step."""
        own = self.own
        if own.schedule == "constant":
            return own.peak
        if own.schedule == "adaptive":
            return max(0.0, own.tau - self.reward)
        warmup, decay = own.warmup * progress.steps, own.decay * progress.steps
        if progress.step < warmup:
            return own.peak * progress.step / warmup
        way = min(1.0, (progress.step - warmup) / decay) if decay else 1.0
        return own.valley + (own.peak - own.valley) * (1 + math.cos(math.pi * way)) / 2

    def weights(self, progress: Progress) -> Weights:
        mu = self.mu(progress)
        return Weights(sft=mu, rl=1 - mu)

    def compose(self, step):
        updates = super().compose(step)
        step.row["chord/mu"] = step.weights.sft
        if self.own.phi == "uncertainty":
            self.phis: list = []  # (sum of phi, tokens) of every demonstration of the step
            for update in updates:
                update.demonstration_loss = self._weighted
        return updates

    def _weighted(self, index, scores, entropies):
        p = scores.detach().exp()
        phi = p * (1 - p)
        self.phis.append((float(phi.sum()), len(phi)))
        return -phi * scores

    def after_step(self, row, progress):
        if "reward" in row:
            self.reward = row["reward"]
        if self.own.phi == "uncertainty":
            phis = sum(together(lambda: self.phis), [])  # a process sees its own demonstrations
            if phis:
                row["chord/phi"] = sum(phi for phi, _ in phis) / sum(n for _, n in phis)

    def state(self):
        return {"reward": self.reward}

    def load_state(self, state):
        self.reward = state["reward"]

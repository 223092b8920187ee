"""CHORD (arXiv 2508.11408): both losses in every step, with weights over time and over tokens.

    L = (1 - mu) L_GRPO + mu L_SFT-phi
    L_SFT-phi = -mean over tokens of  sg(phi(p)) log p,    p = pi_theta(token), phi(p) = p (1 - p)

CHORD-mu (`chord`): phi = 1, mu rises linearly from 0 to its peak and falls along half a cosine to
its valley, 0.9 -> 0.05 in the paper. CHORD-phi (`chord_phi`): constant mu = 0.1. Adaptive
(`chord_adaptive`): mu = max(0, tau - mean reward), tau 0.5 or, which the paper found bad, 0.7; here
the reward is that of the step before, 0 before the first, since mu is needed before any answer is
sampled.

Read from the paper's text and from Trinity-RFT's code. Ambiguous: the decay lasts 30 steps in one
place and 200 in another; here warm-up and decay are fractions of the run. Strictly on-policy, so
one update per batch of rollouts. The SFT batch has as many demonstrations as RL has problems, in
its own order; the paper has 64 for 32. phi removes most of the loss's size, as p (1 - p) is at most
1/4: mu of the two variants cannot be compared.
"""

import math

from torch import Tensor

from ..config.settings import Settings
from ..learning.progress import Progress, Weights
from ..learning.step import Step
from ..learning.update import Update
from ..setups import Setup
from ..system.processes import together
from .method import Method


class CHORD(Method):
    """A scheduled weight between the losses, and a weight for every token of a demonstration."""

    kept = ("reward",)

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
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
        done = min(1.0, (progress.step - warmup) / decay) if decay else 1.0
        return own.valley + (own.peak - own.valley) * (1 + math.cos(math.pi * done)) / 2

    def weights(self, progress: Progress) -> Weights:
        mu = self.mu(progress)
        return Weights(sft=mu, rl=1 - mu)

    def compose(self, step: Step) -> list[Update]:
        updates = super().compose(step)
        step.row["chord/mu"] = step.weights.sft
        if self.own.phi == "uncertainty":
            self.phis: list = []  # (sum of phi, tokens) of every demonstration of the step
            for update in updates:
                update.demonstration_loss = self._weighted
        return updates

    def _weighted(self, index: int, scores: Tensor, entropies: Tensor) -> Tensor:
        p = scores.detach().exp()
        phi = p * (1 - p)
        self.phis.append((float(phi.sum()), len(phi)))
        return -phi * scores

    def after_step(self, row: dict, progress: Progress) -> None:
        if "reward" in row:
            self.reward = row["reward"]
        if self.own.phi == "uncertainty":
            phis = sum(together(lambda: self.phis), [])  # a process sees its own demonstrations
            if phis:
                row["chord/phi"] = sum(phi for phi, _ in phis) / sum(n for _, n in phis)

"""SASR (arXiv 2505.13026): every step is SFT or GRPO, drawn with a probability that adapts.

    warm-up: epochs of SFT; g_warm = gradient norm of its last full batch
    g = g_warm
    in every step:
        p = g / (g + gamma g_warm)
        with probability p:  one SFT step;  g = norm of its gradient
        otherwise:           one step of GRPO, with the KL to the warmed-up policy

Unverified: the adaptive formula, gamma, the length of the warm-up, and all numbers are a
reconstruction; they were found in no source. Second-hand, from abstract, reviews, and CHORD's
paper: the warm-up, that each step is one of the two by an adaptive probability and never a blend,
and that the paper watches the SFT gradient's norm and the divergence from the initial distribution.
Its split of a group at the median advantage is not implemented: no source says what it is for.

g and g_warm are norms before clipping, on batches of sft.batch_size and with the same loss. Batches
that are shorter because an epoch ends do not count. The random draw comes from the run's seed and
the step, so it is the same in every process and after resuming. Recorded at GRPO steps:
`kl/anchor`, the divergence from the warmed-up model, which the loss measures (with `rl.beta` above
0 and `rl.kl_anchor=stage`, as in the setup), and `kl/reference`, from the base model.
"""

import math
import random

from ..config.settings import Settings
from ..learning.progress import Progress, Weights
from ..learning.step import Step
from ..learning.update import Totals, Update
from ..problems.problem import Problem
from ..setups import Setup
from ..system.seeds import seed_of
from .method import Method


class SASR(Method):
    """Steps of SFT and GRPO, drawn by the norm of the SFT gradient."""

    kept = ("warm_norm", "norm", "batches", "sft_steps")

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.warm_norm = 0.0  # g_warm; 0 if no norm of the warm-up was finite
        self.norm: float | None = None  # g; None before the first SFT step
        self.batches = self.sft_steps = 0

    @property
    def current_norm(self) -> float:
        """g."""
        return self.warm_norm if self.norm is None else self.norm

    def probability(self) -> float:
        """p of the next step."""
        norm, warm = self.current_norm, self.warm_norm
        return norm / (norm + self.own.gamma * warm) if warm else 1 / (1 + self.own.gamma)

    def weights(self, progress: Progress) -> Weights:
        if progress.stage.name == "sft":
            return Weights(sft=1.0, rl=0.0)
        sft = progress.random("sasr").random() < self.probability()
        return Weights(sft=float(sft), rl=float(not sft))

    def compose(self, step: Step) -> list[Update]:
        if step.progress.stage.name == "sft":
            return super().compose(step)
        step.row["sasr/p"] = self.probability()
        if step.rollouts:
            return super().compose(step)
        self.sft_steps += 1
        step.demonstrations = self._next_batch()
        return [step.update(step.demonstrations, sft=1.0, rl=0.0, gamma=0.0,
                            learning_rate=step.learning_rates["sft"])]

    def learn(self, step: Step, updates: list[Update], totals: Totals) -> list[float]:
        norms = super().learn(step, updates, totals)
        finite = bool(norms) and math.isfinite(norms[0])
        if step.progress.stage.name == "sft":
            full = min(self.settings.sft.batch_size, len(self.run.problems))
            if finite and len(updates[0].sequences) == full:
                self.warm_norm = norms[0]
            return norms
        if finite and not step.rollouts:
            self.norm = norms[0]
        step.row["sasr/gradient_norm"] = self.current_norm
        step.row["sasr/sft_share"] = self.sft_steps / (step.progress.step + 1)
        return norms

    def _next_batch(self) -> list[Problem]:
        """A full batch of demonstrations, from one shuffled pass into the next."""
        problems = self.run.problems
        size, count = min(self.settings.sft.batch_size, len(problems)), len(problems)
        places = range(self.batches * size, (self.batches + 1) * size)
        self.batches += 1
        orders = {}
        for epoch in {place // count for place in places}:
            orders[epoch] = list(problems)
            random.Random(seed_of(self.run.seed, "sasr demonstrations", epoch)).shuffle(
                orders[epoch])
        return [orders[place // count][place % count] for place in places]

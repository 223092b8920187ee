"""SASR (arXiv 2505.13026): every step is SFT or GRPO, drawn with a probability that adapts.

    warm-up: epochs of SFT; g_warm = norm of the gradient of L_SFT
    g = g_warm
    in every step:
        p = g / (g + gamma g_warm)
        with probability p:  one SFT step;  g = norm of its gradient
        else:                one step of GRPO, with the KL to the warmed-up policy

Unverified: the adaptive formula, gamma, the length of the warm-up and all numbers are a
reconstruction; they were found in no source. Second-hand, from abstract, reviews and CHORD's paper:
the warm-up, that each step is one of the two by an adaptive probability and never a blend, and that
the paper watches the SFT gradient's norm and the divergence from the initial distribution. Its
split of a group at the median advantage is not here: nothing says what it is for.

g and g_warm are norms before clipping, on batches of sft.batch_size and with the same loss. Batches
that an epoch's end cuts short do not count. g grows stale while GRPO steps follow each other:
`measure_every` measures it anew at the cost of a backward pass, whose demonstrations teach nothing
and are not counted as used; `smoothing` averages it. The random draw comes from the run's seed and
the step, so that it is the same in every process and after a resumption. Recorded at GRPO steps:
`kl/anchor`, the divergence from the warmed-up model, which the loss measures (with `rl.beta` above
0 and `rl.kl_anchor=stage`, as in the setup), and `kl/reference`, from the model as loaded.
"""

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..records import seed_of
from ..setups import Setup
from .method import Method, Progress, Stage, Weights, mixing_stage

if TYPE_CHECKING:
    from ..problems import Problem
    from ..steps import Step
    from ..updates import Update


@dataclass(frozen=True)
class SASRSettings(Section):
    """The warm-up and the probability of an SFT step."""

    section: ClassVar[str] = "sasr"
    warmup_epochs: int = setting(1, "epochs of SFT before the first draw",
                                 "the paper has a warm-up; its length is unverified", at_least=1)
    gamma: float = setting(1.0, "balance: p = g / (g + gamma g_warm); 1 begins with p = 0.5",
                           "reconstruction", above=0)
    warm_norm: str = setting("last", "g_warm: last = of the last full batch of the warm-up; mean = "
                             "over all of them", "reconstruction", choices=("last", "mean"))
    measure_every: int | None = setting(
        None, "steps after which a norm is measured anew; none = at SFT steps alone", at_least=1)
    smoothing: float = setting(0.0, "weight of the old g when a norm is measured; 0 = the newest "
                               "alone", at_least=0, below=1)


class SASR(Method):
    """Steps of SFT and GRPO, drawn by the norm of the SFT gradient."""

    settings_section = SASRSettings

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.stages = (Stage("sft", self.own.warmup_epochs), mixing_stage(settings))
        self.warm: list[float] = []  # norms of the warm-up's full batches
        self.norm: float | None = None  # g
        self.batches = self.sft_steps = self.since = 0

    def begin(self, trainer) -> None:
        self.problems, self.seed = trainer.parts.train, trainer.seed

    @property
    def warm_norm(self) -> float:
        """g_warm; 0 if no norm of the warm-up was finite."""
        if self.own.warm_norm == "last":
            return self.warm[-1] if self.warm else 0.0
        return sum(self.warm) / max(1, len(self.warm))

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

    def compose(self, step: "Step") -> "list[Update]":
        if step.progress.stage.name == "sft":
            return super().compose(step)
        step.row["sasr/p"] = self.probability()
        if step.rollouts:
            return super().compose(step)
        self.sft_steps += 1
        return [self._sft_update(step)]

    def learn(self, step, updates, totals):
        norms = super().learn(step, updates, totals)
        full = len(updates[0].sequences) == min(self.settings.sft.batch_size, len(self.problems))
        if step.progress.stage.name == "sft":
            if full and norms and math.isfinite(norms[0]):
                self.warm.append(norms[0])
            return norms
        self.since += 1
        if not step.rollouts:
            self._see(norms[0])
        elif self.own.measure_every and self.since >= self.own.measure_every:
            self._see(step.learner.gradient_norm(self._sft_update(step)))
        step.row["sasr/gradient_norm"] = self.current_norm
        step.row["sasr/sft_share"] = self.sft_steps / (step.progress.step + 1)
        return norms

    def _see(self, norm: float) -> None:
        if math.isfinite(norm):
            keep = self.own.smoothing
            self.norm = keep * self.current_norm + (1 - keep) * norm
            self.since = 0

    def _sft_update(self, step: "Step") -> "Update":
        """An update on the next full batch of demonstrations."""
        step.demonstrations = self._next_batch()
        return step.update(step.demonstrations, sft=1.0, rl=0.0, gamma=0.0,
                           learning_rate=step.learning_rates["sft"])

    def _next_batch(self) -> "list[Problem]":
        """As large as those of the warm-up: from one shuffled pass into the next."""
        size, count = min(self.settings.sft.batch_size, len(self.problems)), len(self.problems)
        places = range(self.batches * size, (self.batches + 1) * size)
        self.batches += 1
        orders = {}
        for epoch in {place // count for place in places}:
            orders[epoch] = list(self.problems)
            random.Random(seed_of(self.seed, "sasr demonstrations", epoch)).shuffle(orders[epoch])
        return [orders[place // count][place % count] for place in places]

    def state(self):
        return {name: getattr(self, name) for name in ("warm", "norm", "batches", "sft_steps",
                                                       "since")}

    def load_state(self, state):
        for name, value in state.items():
            setattr(self, name, value)

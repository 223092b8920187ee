"""Switching between SFT and RL by validation metrics (the paper's second way).

    a stage ends once one of these holds (all but the first: several times in a row):
        the validation loss falls by less than a fraction of itself  (SFT: it is what SFT minimizes)
        the KL divergence to the base model changes by less than a fraction of itself
        there are few distinct answers per problem, or the entropy is low
    the other stage takes over, with what is left of the run's epochs

The paper names the rate of change of the loss, the stability of the KL divergence, and the
diversity of the answers, and gives no rule, threshold, or direction: all of these are chosen here.
The loss is measured every `training.validate_every` epochs and ends SFT at once; the others are
measured with the probe, every `probe.every` steps, and must hold `switching.patience` times. The
learning rate decays as if a stage had all epochs that are left; the next stage starts at its peak.
A value measured after a step is in the line of the next step, under the name of its setting.
"""

import math
from dataclasses import replace

from ..config.settings import Settings
from ..learning.progress import Progress, Stage
from ..setups import Setup
from .method import Method, Run

OTHER = {"sft": "rl", "rl": "sft"}


class Switching(Method):
    """Stages that end when validation metrics say so."""

    kept = ("switched", "before", "held", "measured")

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.switched: list[dict] = []  # step, to, reason, and value of each switch
        self.before: dict[str, float] = {}  # loss and KL when last measured in this stage
        self.held: dict[str, int] = {}  # how many times in a row a condition has held
        self.measured: dict[str, float] = {}  # since the last line of metrics.jsonl

    def begin(self, run: Run) -> None:
        super().begin(run)
        training = self.settings.training
        if self.own.loss_fall is not None and not self.own.sees_loss_fall(self.settings):
            run.note("switching.loss_fall is ignored: with training.validate_every = "
                     f"{training.validate_every} of {training.epochs} epochs there are too few "
                     "validations to see the loss fall before the end")

    def after_step(self, row: dict, progress: Progress) -> None:
        row["switching/switches"] = len(self.switched)
        row |= {f"switching/{name}": value for name, value in self.measured.items()}
        self.measured = {}
        if self.switched and progress.step == 0:
            row["switching/reason"] = self.switched[-1]["reason"]

    def after_validation(self, row: dict, progress: Progress) -> None:
        before = self._exchange("loss", row["loss"], progress)
        if progress.stage.name == "sft" and before is not None:
            fall = (before - row["loss"]) / max(before, 1e-12)
            self._check("loss_fall", fall, 1, progress)

    def after_probe(self, row: dict, progress: Progress) -> None:
        kl, patience = row["kl/base"], self.own.patience
        before = self._exchange("kl", kl, progress)
        if before is not None:
            self._check("kl_change", abs(kl - before) / max(kl, before, 1e-12), patience, progress)
        self._check("distinct_answers", row["distinct_answers"], patience, progress)
        self._check("entropy", row["entropy"], patience, progress)

    def _exchange(self, name: str, value: float, progress: Progress) -> float | None:
        """The previous value in this stage, which the new value replaces."""
        before = self.before.get(name)
        if not self._over(progress):
            self.before[name] = value
        return before

    def _over(self, progress: Progress) -> bool:
        """Whether the stage is at its end, or another condition has just ended it."""
        return progress.step >= progress.steps or progress.stage != self.stages[-1]

    def _check(self, name: str, value: float, patience: int, progress: Progress) -> None:
        """Records a value; ends the stage when it was below its limit often enough in a row."""
        self.measured[name] = value
        limit = getattr(self.own, name)
        if limit is None or self._over(progress):
            return
        self.held[name] = self.held.get(name, 0) + 1 if value < limit else 0
        if self.held[name] >= patience and len(self.switched) < self.own.switches:
            self._switch(name, value, progress)

    def _switch(self, reason: str, value: float, progress: Progress) -> None:
        """Ends the stage here and appends the other one, unless no epochs are left for it."""
        now = replace(progress.stage, steps=progress.step)
        past = [stage.steps / self.run.steps_per_epoch(stage) for stage in (*self.stages[:-1], now)]
        left = self.settings.training.epochs - sum(past)
        following = Stage(OTHER[now.name], math.ceil(left))
        following = replace(following, steps=round(left * self.run.steps_per_epoch(following)))
        if past[-1] < self.own.least_epochs or not following.steps:
            return
        self.stages = (*self.stages[:-1], now, following)
        self.before, self.held = {}, {}
        self.switched.append({"step": progress.taken, "to": following.name, "reason": reason,
                              "value": value})

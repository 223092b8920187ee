"""Switching between SFT and RL from validation metrics (the paper's second way, section 3).

    a stage ends once one of these has held so many times in a row:
        the validation loss falls by less than a share of itself     (SFT: it is what SFT minimises)
        the KL divergence to the base model changes by less than a share of itself
        the answers to one problem are few different ones, or the entropy is low
    the other stage takes over, with what is left of the run's epochs

The paper names the rate of change of the loss, the stability of the KL divergence and the diversity
of the answers, and gives no rule, threshold or direction: all of these are chosen here. Validation
comes every `training.validate_every` epochs, the others with the probe, every `probe.every` steps.
The learning rate decays as if a stage had all epochs that are left; the next starts at its peak.
A sign that was measured after a step is in the next step's line, under its setting's name.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..setups import Setup
from .method import Method, Progress, Stage

OPEN = "paper §3 names it, without a value"
TIMES = "how many times in a row that has to hold"
OTHER = {"sft": "rl", "rl": "sft"}


@dataclass(frozen=True)
class SwitchingSettings(Section):
    """When a stage ends."""

    section: ClassVar[str] = "switching"
    first: str = setting("sft", "the stage a run begins with", OPEN, choices=("sft", "rl"))
    switches: int = setting(1, "switches at most; 2 and more go back and forth", OPEN, at_least=1)
    least_epochs: float = setting(1.0, "epochs before a stage may end", at_least=0)
    loss_fall: float | None = setting(
        0.05, "SFT ends where the validation loss falls by less than this share of itself between "
        "two validations; none = not looked at", OPEN)
    loss_patience: int = setting(1, TIMES, OPEN, at_least=1)
    kl_change: float | None = setting(
        0.2, "a stage ends where the KL divergence to the base model changes by less than this "
        "share of itself between two probes; none = not looked at",
        "in the published tiny run of RL it changes by 2 to 80 %", above=0)
    kl_patience: int = setting(2, TIMES, OPEN, at_least=1)
    distinct_answers: float | None = setting(
        0.2, "a stage ends where the different answers to a problem are fewer than this share of "
        "probe.samples; none = not looked at", OPEN, above=0, at_most=1)
    distinct_patience: int = setting(2, TIMES, OPEN, at_least=1)
    entropy: float | None = setting(
        0.05, "a stage ends where the entropy of the probe's answers is below (nats a token); none "
        "= not looked at", "below 0.05 most groups of published runs have no signal", above=0)
    entropy_patience: int = setting(2, TIMES, OPEN, at_least=1)

    @property
    def ends_rl(self) -> bool:
        """Whether one of the signs is looked at in RL as well."""
        return any(value is not None for value in (self.kl_change, self.distinct_answers,
                                                   self.entropy))

    def check(self) -> None:
        if self.ends_rl:
            return
        if self.loss_fall is None:
            self.refuse("loss_fall", "no stage could ever end; give at least one of "
                        "switching.loss_fall, kl_change, distinct_answers and entropy")
        if self.first == "rl" or self.switches > 1:
            self.refuse("first" if self.first == "rl" else "switches", "RL could never end, since "
                        "the validation loss is looked at in SFT alone; give one of "
                        "switching.kl_change, distinct_answers and entropy")


class Switching(Method):
    """Stages that end by themselves."""

    settings_section = SwitchingSettings
    dynamic_sampling = True
    limits = ("loss_fall", "kl_change", "distinct_answers", "entropy")

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        if self.own.least_epochs >= settings.training.epochs:
            self.own.refuse("least_epochs", "no stage could end before the run's training.epochs = "
                            f"{settings.training.epochs}; give fewer")
        if not self.own.ends_rl and not self.sees_loss_fall():
            settings.training.refuse("validate_every", "SFT could never end: its loss is seen to "
                                     f"fall by {self.own.loss_patience + 1} validations before the "
                                     f"end of training.epochs = {settings.training.epochs}, the "
                                     "last of them after switching.least_epochs; validate more "
                                     "often")
        self.stages = (Stage(self.own.first, settings.training.epochs),)
        self.switched: list[dict] = []  # step, to, reason and value of each switch
        self.before: dict[str, float] = {}  # loss and KL when last measured in this stage
        self.held: dict[str, int] = {}  # how many times in a row a reason has held
        self.signs: dict[str, float] = {}  # measured since the last line of metrics.jsonl

    def sees_loss_fall(self) -> bool:
        """Whether enough validations come before the run's end, the last of them late enough."""
        every, epochs = self.settings.training.validate_every, self.settings.training.epochs
        count = math.ceil(epochs / every) - 1
        return count > self.own.loss_patience and count * every >= self.own.least_epochs

    def begin(self, trainer) -> None:
        self.steps_per_epoch = trainer.steps_per_epoch
        if self.own.loss_fall is not None and not self.sees_loss_fall():
            trainer.observer.note("switching.loss_fall is not looked at: with "
                                  "training.validate_every = "
                                  f"{self.settings.training.validate_every} of "
                                  f"{self.settings.training.epochs} epochs there are too few "
                                  "validations to see the loss fall before the end")

    def after_step(self, row: dict, progress: Progress) -> None:
        row["switching/switches"] = len(self.switched)
        row |= {f"switching/{sign}": value for sign, value in self.signs.items()}
        self.signs = {}
        if self.switched and progress.step == 0:
            row["switching/reason"] = self.switched[-1]["reason"]

    def after_validation(self, row: dict, progress: Progress) -> None:
        own, before = self.own, self._exchange("loss", row["loss"], progress)
        if progress.stage.name == "sft" and before is not None:
            fall = (before - row["loss"]) / max(before, 1e-12)
            self._look("loss_fall", fall, own.loss_fall, own.loss_patience, progress)

    def after_probe(self, row: dict, progress: Progress) -> None:
        own, kl = self.own, row["kl/base"]
        before = self._exchange("kl", kl, progress)
        if before is not None:
            change = abs(kl - before) / max(kl, before, 1e-12)
            self._look("kl_change", change, own.kl_change, own.kl_patience, progress)
        self._look("distinct_answers", row["distinct_answers"], own.distinct_answers,
                   own.distinct_patience, progress)
        self._look("entropy", row["entropy"], own.entropy, own.entropy_patience, progress)

    def _exchange(self, name: str, value: float, progress: Progress) -> float | None:
        """What was measured before in this stage; the new value takes its place."""
        before = self.before.get(name)
        if not self._over(progress):
            self.before[name] = value
        return before

    def _over(self, progress: Progress) -> bool:
        """Whether the stage is at its end, or another reason has just ended it."""
        return progress.step >= progress.steps or progress.stage != self.stages[-1]

    def _look(self, sign: str, value: float, limit: float | None, patience: int,
              progress: Progress) -> None:
        """Keeps a sign; ends the stage when it was below its limit often enough in a row."""
        self.signs[sign] = value
        if limit is None or self._over(progress):
            return
        self.held[sign] = self.held.get(sign, 0) + 1 if value < limit else 0
        if self.held[sign] >= patience and len(self.switched) < self.own.switches:
            self._switch(sign, value, progress)

    def _switch(self, reason: str, value: float, progress: Progress) -> None:
        """Ends the stage here and appends the other one, unless no epochs are left for it."""
        now = replace(progress.stage, steps=progress.step)
        past = [stage.steps / self.steps_per_epoch(stage) for stage in (*self.stages[:-1], now)]
        left = self.settings.training.epochs - sum(past)
        following = Stage(OTHER[now.name], math.ceil(left))
        following = replace(following, steps=round(left * self.steps_per_epoch(following)))
        if past[-1] < self.own.least_epochs or not following.steps:
            return
        self.stages = (*self.stages[:-1], now, following)
        self.before, self.held = {}, {}
        self.switched.append({"step": progress.taken, "to": following.name, "reason": reason,
                              "value": value})

    def state(self) -> dict:
        return {name: getattr(self, name) for name in ("switched", "before", "held", "signs")}

    def load_state(self, state: dict) -> None:
        self.switched, self.before, self.held, self.signs = (
            state[name] for name in ("switched", "before", "held", "signs"))

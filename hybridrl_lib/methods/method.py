"""What a method may decide: stages, the weights of the loss, and what each update learns from.

A method overrides what its paper changes and inherits the rest, which is Algorithm 1 of the paper.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..config import Settings
from ..distributed import wants_shards
from ..errors import UsageError
from ..fields import Section
from ..records import seed_of
from ..setups import Setup

if TYPE_CHECKING:
    from torch import Tensor

    from ..problems import Problem
    from ..steps import Step
    from ..training import Trainer
    from ..updates import Totals, Update


@dataclass(frozen=True)
class Stage:
    """A part of a run with optimisers of its own.

    Attributes:
        name: `sft` or `rl`; which batch size, learning rate and gamma hold.
        epochs: passes over the training problems.
        steps: where the stage ended or ends, if not after its last epoch.
    """

    name: str
    epochs: int
    steps: int | None = None


@dataclass(frozen=True)
class Progress:
    """Where a run stands before a step.

    Attributes:
        stage: the stage it is in.
        step: steps taken in this stage.
        steps: steps this stage has, unless the method ends it early.
        taken: steps taken in all stages.
        seed: of the run.
    """

    stage: Stage
    step: int
    steps: int
    taken: int = 0
    seed: int = 0

    @property
    def way(self) -> float:
        """How far the stage is: 0 at its first step, 1 at its last."""
        return self.step / max(1, self.steps - 1)

    def random(self, purpose: str) -> random.Random:
        """Random numbers of this step for one purpose, the same in every process and resumption."""
        return random.Random(seed_of(self.seed, purpose, self.taken))


@dataclass(frozen=True)
class Weights:
    """lambda_SFT and lambda_RL of L = lambda_SFT L_SFT + lambda_RL L_RL, both >= 0.

    A step with `sft` > 0 takes a batch of demonstrations, one with `rl` > 0 samples answers.
    """

    sft: float
    rl: float


def mixing_stage(settings: Settings) -> Stage:
    """One stage of the RL epochs that SFT -> RL has, for methods that do both at once: the same
    rollouts, and, where every step takes demonstrations, about the same of those."""
    return Stage("rl", max(1, settings.training.epochs // 2))


class Method:
    """One way to combine SFT and RL (paper, section 3: the two weights may change at any time).

    Attributes:
        settings_section: the method's own settings, if it has any; their section's name is the
            method's. `self.own` holds them.
        adapters: the values of model.adapter that it works with.
        teaches_as_needed: whether what the answers are like decides on the demonstrations.
        needs_reference: whether it reads `Rollout.reference`, which is then there at every step.
        dynamic_sampling: whether groups without signal may be dropped before it sees them.
        sharded: whether it works where FSDP leaves each process a part of every weight.
        own_loss: whether its loss on demonstrations is another than SFT's.
        trains_base: whether it trains the base weights beside an adapter.
        limits: its columns of metrics.jsonl that the settings of the same names are limits or
            targets of; figures draw these dashed.
        stages: in order. A method may replace them while it runs; what is in the past stays.

    Raises, at construction:
        UsageError: settings with which the method cannot work.
    """

    settings_section: ClassVar[type[Section] | None] = None
    adapters: ClassVar[tuple[str, ...]] = ("none", "lora")
    teaches_as_needed: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    dynamic_sampling: ClassVar[bool] = False
    sharded: ClassVar[bool] = True
    own_loss: ClassVar[bool] = False
    trains_base: ClassVar[bool] = False
    limits: ClassVar[tuple[str, ...]] = ()
    stages: tuple[Stage, ...] = ()

    @classmethod
    def copies(cls, own: Section, device: str) -> tuple[float, float]:
        """How many times the trained weights it holds, for the estimate of a run's memory: always,
        and more while it learns; beside weights, reference, optimiser and one gradient.

        Args:
            own: the method's own settings.
            device: `cuda` or `cpu`.
        """
        return 0.0, 0.0

    def __init__(self, setup: Setup, settings: Settings):
        self.setup, self.settings, self.own = setup, settings, settings.method
        if settings.model.adapter not in self.adapters:
            settings.model.refuse("adapter", f"the method {setup.method} works with "
                                  + " or ".join(self.adapters))
        if wants_shards() and not self.sharded:
            raise UsageError(f"The method {setup.method} reads and changes whole weights, which no "
                             "process has with FSDP; launch it without --use_fsdp.")
        if (setup.entropy and "rl" in setup.stages and settings.rl.gamma > 0
                and settings.entropy_control.kind in ("bonus", "adaptive")):
            settings.entropy_control.refuse("kind", f"the setup {setup.name} has an entropy term "
                                            "of its own; set rl.gamma=0 to do without it")
        if settings.rl.dynamic_sampling_rounds > 1 and not self.dynamic_sampling:
            settings.rl.refuse("dynamic_sampling_rounds", f"the method {setup.method} learns from "
                               "groups without signal too, so none may be dropped; set it to 1")

    # What a step is made of ----------------------------------------------------------------------

    def begin(self, trainer: "Trainer") -> None:
        """Called once, when the policy is there and nothing has been trained or resumed."""

    def weights(self, progress: Progress) -> Weights:
        """The two weights of the step about to be taken: by its stage, SFT alone or RL alone."""
        return Weights(1.0, 0.0) if progress.stage.name == "sft" else Weights(0.0, 1.0)

    def hints(self, problems: "list[Problem]", progress: Progress) -> list[list[int]] | None:
        """Token ids of the demonstration that every answer to a problem starts from; None = none.

        The answers go on from there; their tokens alone count as sampled.
        """
        return None

    def compose(self, step: "Step") -> "list[Update]":
        """The optimiser updates of a step: whole groups, in mini-batches."""
        count = step.mini_batches
        return [step.update(step.demonstrations[i::count], step.rollouts[i::count])
                for i in range(count)]

    def learn(self, step: "Step", updates: "list[Update]", totals: "Totals") -> list[float]:
        """Takes the updates; returns the gradient norm, before clipping, of each that had one.

        pi_old is the policy that sampled. Until an update has moved the policy, that is the policy
        itself; for the updates after, the training model scores the answers before it moves.
        """
        norms: list[float] = []
        for index, update in enumerate(updates):
            if not norms and step.learner.has_gradient(update).any():
                for later in updates[index + 1:]:
                    if (later.rl != 0).any():
                        later.old = step.learner.scores(later.sequences)
            norm = step.learner.apply(update, step.learning_rate, totals)
            if norm is not None:
                norms.append(norm)
        return norms

    # What it learns from the run, and keeps ------------------------------------------------------

    def after_step(self, row: dict, progress: Progress) -> None:
        """Sees the finished line of metrics.jsonl; what it adds is written with it."""

    def after_validation(self, row: dict, progress: Progress) -> None:
        """Sees the line of validation.jsonl after it was written."""

    def after_probe(self, row: dict, progress: Progress) -> None:
        """Sees the line of probe.jsonl after it was written."""

    def state(self) -> dict:
        """What a checkpoint has to hold so that the run goes on bit for bit: plain data."""
        return {}

    def load_state(self, state: dict) -> None:
        """Takes over what `state` gave."""

    def tensors(self) -> "dict[str, Tensor]":
        """The same for tensors."""
        return {}

    def load_tensors(self, tensors: "dict[str, Tensor]") -> None:
        """Takes over what `tensors` gave."""

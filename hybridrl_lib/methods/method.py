"""What a method may decide: its stages, and the two weights of the loss at each step."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Stage:
    """A part of a run with an optimiser of its own.

    Attributes:
        name: `sft` or `rl`; which batch size, learning rate and gamma hold.
        epochs: passes over the training problems.
    """

    name: str
    epochs: int


@dataclass(frozen=True)
class Progress:
    """Where a run stands before a step.

    Attributes:
        stage: the stage it is in.
        step: steps taken in this stage.
        steps: steps this stage has.
    """

    stage: Stage
    step: int
    steps: int


@dataclass(frozen=True)
class Weights:
    """lambda_SFT and lambda_RL of L = lambda_SFT L_SFT + lambda_RL L_RL, both >= 0."""

    sft: float
    rl: float


class Method(Protocol):
    """One way to combine SFT and RL (paper, section 3: the two weights may change at any time)."""

    stages: tuple[Stage, ...]

    def weights(self, progress: Progress) -> Weights:
        """The weights of the step about to be taken."""
        ...

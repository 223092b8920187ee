"""Where a run stands: its stage, its step, and the two loss weights."""

import random
from dataclasses import dataclass

from ..system.seeds import seed_of


@dataclass(frozen=True)
class Stage:
    """A part of a run with its own optimizers.

    Attributes:
        name: `sft` or `rl`; selects the batch size, learning rate, and gamma.
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
        stage: the current stage.
        step: steps taken in this stage.
        steps: steps of this stage, unless the method ends it early.
        taken: steps taken in all stages.
        seed: of the run.
    """

    stage: Stage
    step: int
    steps: int
    taken: int = 0
    seed: int = 0

    @property
    def fraction(self) -> float:
        """How much of the stage is done: 0 at its first step, 1 at its last."""
        return self.step / max(1, self.steps - 1)

    def random(self, purpose: str) -> random.Random:
        """Random numbers of this step for one purpose, equal in all processes."""
        return random.Random(seed_of(self.seed, purpose, self.taken))


@dataclass(frozen=True)
class Weights:
    """lambda_SFT and lambda_RL of L = lambda_SFT L_SFT + lambda_RL L_RL, both >= 0.

    A step with `sft` > 0 takes a batch of demonstrations; one with `rl` > 0 samples answers.
    """

    sft: float
    rl: float

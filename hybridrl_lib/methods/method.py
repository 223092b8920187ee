"""What a method decides: the weights of the loss, and what each update learns from.

A method overrides what its paper changes and inherits the rest, which is the paper's Algorithm 1.
Its settings, and everything that follows from them alone, are in `config/methods.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config.settings import Settings
from ..learning.progress import Progress, Stage, Weights
from ..learning.step import Rollout, Step
from ..learning.update import Totals, Update
from ..objectives import group_advantages
from ..policy.policy import Policy
from ..problems.problem import Problem
from ..rewards.verifier import Verifier
from ..setups import Setup


@dataclass(frozen=True)
class Run:
    """What a method may use of the run that it is part of.

    Attributes:
        policy: the model being trained.
        problems: the training problems.
        verifier: gives verdicts.
        settings, seed: of the run.
        steps_per_epoch: number of steps per epoch of a stage.
        has_begun: whether the run resumes.
        note: tells the user a sentence.
    """

    policy: Policy
    problems: Sequence[Problem]
    verifier: Verifier
    settings: Settings
    seed: int
    steps_per_epoch: Callable[[Stage], int]
    has_begun: bool
    note: Callable[[str], None]


class Method:
    """One way to combine SFT and RL: lambda_SFT and lambda_RL may change at every step.

    Attributes:
        own: the method's own settings.
        needs_reference: whether it reads `Rollout.reference`, which is then measured at every step.
        kept: the attributes that a checkpoint holds; plain data.
        stages: in order. A method may replace them while it runs, but not those of the past.
    """

    needs_reference: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()

    def __init__(self, setup: Setup, settings: Settings):
        self.setup, self.settings, self.own = setup, settings, settings.method
        self.stages = tuple(Stage(*stage)
                            for stage in self.own.stages(setup, settings.training.epochs))

    # What a step is made of --------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        """Called once, before anything is trained or resumed."""
        self.run = run

    def weights(self, progress: Progress) -> Weights:
        """The two lambdas of the next step: by default SFT only or RL only, by its stage."""
        return Weights(1.0, 0.0) if progress.stage.name == "sft" else Weights(0.0, 1.0)

    def hints(self, problems: list[Problem], progress: Progress) -> list[list[int]] | None:
        """Token ids of the demonstration that every answer to a problem continues; None = none.

        Only the tokens of the answers count as sampled.
        """
        return None

    def compose(self, step: Step) -> list[Update]:
        """The optimizer updates of a step: whole groups, in mini-batches."""
        count = step.mini_batches
        return [step.update(step.demonstrations[i::count], step.rollouts[i::count])
                for i in range(count)]

    def learn(self, step: Step, updates: list[Update], totals: Totals) -> list[float]:
        """Takes the updates; returns the gradient norm, before clipping, of each that had one.

        pi_old is the policy that sampled. Until an update has moved the policy, that is the policy
        itself; for later updates, the training model scores the answers before it moves.
        """
        norms: list[float] = []
        for index, update in enumerate(updates):
            if not norms and step.learner.has_gradient(update).any():
                for later in updates[index + 1:]:
                    if (later.rl != 0).any():
                        later.old = step.learner.scores(later.sequences)
            if step.learner.accumulate(update, totals):
                norm = step.learner.step(update.learning_rate or step.learning_rate,
                                         update.optimizer, update.largest_norm)
                if update.largest_norm < norm < math.inf:
                    totals.add("left_out", torch.ones(1))
                norms.append(norm)
        return norms

    # What it learns from the run ---------------------------------------------------------------

    def after_step(self, row: dict, progress: Progress) -> None:
        """Sees the finished line of metrics.jsonl; what it adds is written with it."""

    def after_validation(self, row: dict, progress: Progress) -> None:
        """Sees the line of validation.jsonl after it was written."""

    def after_probe(self, row: dict, progress: Progress) -> None:
        """Sees the line of probe.jsonl after it was written."""

    # Checkpoints -------------------------------------------------------------------------------

    def state(self) -> dict:
        """What a checkpoint holds, so that the run resumes bit for bit: plain data."""
        return {name: getattr(self, name) for name in self.kept}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds."""
        return {}

    def load_state(self, state: dict, tensors: dict[str, Tensor]) -> None:
        """Restores what `state` and `tensors` gave."""
        for name in self.kept:
            setattr(self, name, state[name])


def joint_advantages(rollout: Rollout, reward: float, scale: str) -> float:
    """Advantages in a group with one more answer (LUFFY, Prefix-RFT).

    Gives the rollout's answers their advantages; returns that of the additional answer.

    Args:
        reward: of the additional answer, minus the penalty of its length.
        scale: `rl.advantage_scale`.
    """
    rewards = torch.cat([rollout.shaped, rollout.shaped.new_tensor([reward])])  # (G + 1,)
    joint = group_advantages(rewards[None], scale)[0]
    rollout.advantages = joint[:-1]
    return float(joint[-1])

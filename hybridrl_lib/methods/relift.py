"""ReLIFT (arXiv 2506.07527): RL, and SFT on the problems that RL cannot solve.

    in every step:
        sample G answers a problem; take the RL updates
        put each problem that no answer solved, with its demonstration, into the buffer
        if the buffer holds M: one SFT update on M of them, by an optimiser of its own

Read from the released code and second-hand notes on the paper. The code differs from the paper: the
newest problems are taught first, the advantage is not divided by its deviation, the ratio is not
clipped, there is no KL, losses are summed over a constant length, and the entropy has the weight
0.001 in SFT, ten times the paper's, and in RL; the setup `relift_code` has these. That code adds
the entropy of RL once a micro-batch, so that its weight grows with their number; here it is 0.001
an update. Nor does it divide the summed loss by the number of answers, and it clips the gradient's
norm at 0.7; here `constant` divides by that number too and `training.gradient_clip` is the
preset's, so that the entropy weighs more beside L_RL than there. A problem that stays unsolved is
put into the buffer again, as in the code. The setup `relift` has the L_RL that all setups here
share, with its clip, beta and normalisation (`rl.*`), not the token mean over the group that the
notes give for the paper. Both decide from the answers before the RL update, and test no buffered
problem again. Here the SFT loss is a mean over all tokens of the batch; the released code takes
means of micro-batches, which over-weights short solutions.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..setups import Setup
from .method import Method, mixing_stage


@dataclass(frozen=True)
class ReLIFTSettings(Section):
    """The buffer and when it is used."""

    section: ClassVar[str] = "relift"
    batch_size: int = setting(16, "M, demonstrations in an SFT update",
                              "released code: 128, as many as problems in a step", at_least=1)
    capacity: int | None = setting(None, "problems the buffer holds, the oldest leave; none = all",
                                   "released code: all", at_least=1)
    every: int = setting(
        1, "at most one SFT update in so many steps; a weak model fills the buffer at every step",
        "released code: 1", at_least=1)
    newest_first: bool = setting(False, "which of the buffer's problems are taught first",
                                 "released code: true; the paper does not say")
    gamma: float = setting(1e-4, "weight of the entropy in the SFT loss",
                           "paper: 1e-4; released code: 1e-3", at_least=0)

    def check(self) -> None:
        if self.capacity is not None and self.capacity < self.batch_size:
            self.refuse("capacity", "the buffer could never fill a batch; give at least "
                        f"relift.batch_size = {self.batch_size}")


class ReLIFT(Method):
    """RL interleaved with SFT on the hardest problems."""

    settings_section = ReLIFTSettings
    teaches_as_needed = True

    @classmethod
    def copies(cls, own: ReLIFTSettings, device: str) -> tuple[float, float]:
        return 2.0, 0.0  # SFT's moments

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.stages = (mixing_stage(settings),)
        self.buffer: list[str] = []  # ids of problems, the next to be taught first
        self.steps_since_sft = self.own.every
        self.taken = [0, 0]  # updates so far: of SFT, and all

    def begin(self, trainer) -> None:
        self.problems = {problem.id: problem for problem in trainer.parts.train}

    def compose(self, step):
        updates = super().compose(step)
        unsolved = [rollout.problem.id for rollout in step.rollouts if rollout.solved == 0]
        if self.own.newest_first:
            self.buffer = (unsolved + self.buffer)[:self.own.capacity]
        else:
            self.buffer = (self.buffer + unsolved)[-(self.own.capacity or 0):]
        taught: list[str] = []
        if len(self.buffer) >= self.own.batch_size and self.steps_since_sft >= self.own.every:
            size = self.own.batch_size
            taught, self.buffer = self.buffer[:size], self.buffer[size:]
            updates.append(step.update(
                [self.problems[name] for name in taught], sft=1.0, gamma=self.own.gamma,
                optimizer="sft", learning_rate=step.learning_rates["sft"]))
            self.steps_since_sft = 0
        self.steps_since_sft += 1
        self.taken = [self.taken[0] + bool(taught), self.taken[1] + len(updates)]
        step.row |= {"relift/taught": len(taught), "relift/buffer": len(self.buffer),
                     "relift/sft_share": self.taken[0] / self.taken[1]}
        return updates

    def state(self) -> dict:
        return {"buffer": self.buffer, "steps_since_sft": self.steps_since_sft,
                "taken": self.taken}

    def load_state(self, state: dict) -> None:
        self.buffer, self.steps_since_sft = state["buffer"], state["steps_since_sft"]
        self.taken = state["taken"]

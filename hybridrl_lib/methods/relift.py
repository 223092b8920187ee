"""ReLIFT (arXiv 2506.07527): RL, and SFT on the problems that RL cannot solve.

    in every step:
        sample G answers per problem; take the RL updates
        put each problem that no answer solved, with its demonstration, into the buffer
        if the buffer holds M: one SFT update on M of them, by its own optimizer

Read from the released code and second-hand notes on the paper. The code differs from the paper: the
newest problems are learned first, the advantage is not divided by its deviation, the ratio is not
clipped, there is no KL, losses are summed over a constant length, and the entropy has the weight
0.001 in SFT, ten times the paper's, and in RL; the setup `relift_code` has these. That code adds
the entropy of RL once per micro-batch, so its weight grows with their number; here it is 0.001 per
update. It also does not divide the summed loss by the number of answers, and clips the gradient
norm at 0.7; here `constant` divides by that number too and `training.gradient_clip` is the
preset's, so the entropy has more weight relative to L_RL than there. A problem that stays unsolved
enters the buffer again, as in the code. The setup `relift` has the L_RL that all setups here share,
with its clip, beta, and normalization (`rl.*`), not the token mean over the group that the notes
give for the paper. Both decide from the answers before the RL update, and do not test buffered
problems again. Here the SFT loss is a mean over all tokens of the batch; the released code takes
means of micro-batches, which over-weights short solutions.
"""

from ..config.settings import Settings
from ..learning.step import Step
from ..learning.update import Update
from ..setups import Setup
from .method import Method, Run


class ReLIFT(Method):
    """RL interleaved with SFT on the problems that no answer solves."""

    kept = ("buffer", "steps_since_sft", "taken")

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.buffer: list[str] = []  # ids of problems; SFT takes the first
        self.steps_since_sft = self.own.every
        self.taken = [0, 0]  # updates so far: of SFT, and all

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.problems = {problem.id: problem for problem in run.problems}

    def compose(self, step: Step) -> list[Update]:
        updates = super().compose(step)
        unsolved = [rollout.problem.id for rollout in step.rollouts if rollout.solved == 0]
        self.buffer = (unsolved + self.buffer if self.own.newest_first else self.buffer + unsolved)
        taught, size = [], self.own.batch_size
        if len(self.buffer) >= size and self.steps_since_sft >= self.own.every:
            taught, self.buffer = self.buffer[:size], self.buffer[size:]
            updates.append(step.update(
                [self.problems[name] for name in taught], sft=1.0,
                gamma=self.settings.sft.gamma if self.setup.entropy else 0.0,
                optimizer="sft", learning_rate=step.learning_rates["sft"]))
            self.steps_since_sft = 0
        self.steps_since_sft += 1
        self.taken = [self.taken[0] + bool(taught), self.taken[1] + len(updates)]
        step.row |= {"relift/taught": len(taught), "relift/buffer": len(self.buffer),
                     "relift/sft_share": self.taken[0] / self.taken[1]}
        return updates

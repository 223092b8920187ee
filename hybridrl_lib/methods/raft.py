"""RAFT (arXiv 2304.06767), rejection sampling: SFT on the model's own correct answers.

    sample G answers per problem from the current policy, keep the correct ones
    L = -log pi_theta of the kept answers, in the batch size and at the learning rate of RL

PRL's other baseline. Written from its definition: none of the papers that use it was read for this,
and they differ in how many answers per problem they keep and in whether duplicates count; here all
are kept, and equal answers to a problem are learned once. One update follows each mini-batch of
fresh answers, as in GRPO, so that the two are compared like for like; the first paper samples a
large batch and trains on it for longer. If no answer of a mini-batch is correct, no update is
taken. There is no ratio, no clip, no KL, and no advantage (`rl.advantage_scale` has no effect), and
the loss is normalized like that of SFT, not by `rl.loss_normalization`. An entropy term is over the
kept answers only.
"""

from ..learning.step import Rollout, Step
from ..learning.update import Update
from ..policy.packing import PromptCompletion
from .staged import Staged


class RAFT(Staged):
    """SFT on the model's own correct answers."""

    def compose(self, step: Step) -> list[Update]:
        if not step.rollouts:
            return super().compose(step)
        updates, right = [], 0
        for index in range(step.mini_batches):
            rollouts = step.rollouts[index::step.mini_batches]
            update = step.update([answer for rollout in rollouts for answer in kept(rollout)],
                                 sft=1.0)
            update.demonstrations = 0  # they are the model's own, counted as sampled
            update.temperature[:] = self.settings.rl.temperature
            updates.append(update)
            right += int(sum((rollout.rewards > 0).sum() for rollout in rollouts))
        step.row |= {"raft/right": right, "raft/kept": sum(len(u.sequences) for u in updates)}
        return updates


def kept(rollout: Rollout) -> list[PromptCompletion]:
    """The distinct correct answers of a group, in the order of sampling."""
    answers = [answer for answer, reward in zip(rollout.sequences, rollout.rewards.tolist(),
                                                strict=True) if reward > 0]
    return list({tuple(answer.completion): answer for answer in answers}.values())

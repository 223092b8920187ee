"""RAFT (arXiv 2304.06767), rejection sampling: SFT on the model's own right answers.

    sample G answers a problem from the current policy, keep the right ones
    L = -log pi_theta of the kept answers, in the batch size and at the learning rate of RL

PRL's other baseline. Written from its definition: none of the papers that use it was read for this,
and they differ in how many answers a problem may keep and in whether copies count. That one update
follows each mini-batch of fresh answers is GRPO's cadence, so that the two are compared like for
like; the first paper samples a large batch and trains on it for longer. Where no answer of a
mini-batch is right, no update is taken. There is no ratio, no clip, no KL and no advantage
(`rl.advantage_scale` does nothing), and the loss is normalised as that of SFT, not by
`rl.loss_normalisation`. An entropy term is over the kept answers alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..setups import Setup
from .staged import Staged

if TYPE_CHECKING:
    from ..packing import PromptCompletion


@dataclass(frozen=True)
class RAFTSettings(Section):
    """Which of the right answers are learned from."""

    section: ClassVar[str] = "raft"
    deduplicate: bool = setting(True, "whether the same answer to a problem, token for token, is "
                                "learned once")
    most: int | None = setting(None, "right answers learned from a problem, at most: easy problems "
                               "have more of them; none = all",
                               "the first paper keeps the best one", at_least=1)


class RAFT(Staged):
    """SFT on the model's own right answers."""

    settings_section = RAFTSettings
    dynamic_sampling = False

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        if settings.rl.beta > 0:
            settings.rl.refuse("beta", "the method raft has no KL in its loss; set rl.beta=0")
        if settings.rl.overlong_share:
            settings.rl.refuse("overlong_share", "the method raft has no advantages that a "
                               "punishment could lower; set rl.overlong_share=0")
        if settings.entropy_control.kind in ("clip_cov", "kl_cov"):
            settings.entropy_control.refuse("kind", "the method raft has no advantages for a "
                                            "covariance; choose none, bonus or adaptive")

    def compose(self, step):
        if not step.rollouts:
            return super().compose(step)
        updates, right = [], 0
        for index in range(step.mini_batches):
            rollouts = step.rollouts[index::step.mini_batches]
            kept = [answer for rollout in rollouts for answer in self.kept(rollout)]
            update = step.update(kept, sft=1.0)
            update.demonstrations = 0  # these are the model's own, counted as sampled
            update.temperature[:] = self.settings.rl.temperature
            updates.append(update)
            right += int(sum((rollout.rewards > 0).sum() for rollout in rollouts))
        step.row |= {"raft/right": right, "raft/kept": sum(len(u.sequences) for u in updates)}
        return updates

    def kept(self, rollout) -> "list[PromptCompletion]":
        """The right answers of a group that are learned from, in the order of sampling."""
        answers = [answer for answer, reward in zip(rollout.sequences, rollout.rewards.tolist(),
                                                    strict=True) if reward > 0]
        if self.own.deduplicate:
            answers = list({tuple(answer.completion): answer for answer in answers}.values())
        return answers[:self.own.most]

"""LUFFY (arXiv 2504.14945): the demonstration joins the group as one more answer.

    group of a problem: G sampled answers o_i and the demonstration s, judged by one verifier
    A: gain of each over the mean reward of all G + 1, over their deviation
    J = 1/Z [ sum_t f(pi_theta(s_t)) A_s  +  sum_i sum_t min(rho A_i, clip(rho) A_i) ]
    f(x) = x / (x + gamma), the ratio to a policy that gives the demonstration probability 1

A demonstration's token has the gradient weight gamma pi / (pi + gamma)^2 on log pi, largest at
pi = gamma and 0 at both ends. f is never clipped. Z is that of rl.loss_normalisation, over sampled
answers and demonstrations together.

Read from the released code and second-hand notes; the code differs from the paper and is the setup
`luffy_code`: no division by the deviation, no clip on the sampled answers either, a constant
length, an entropy bonus of 0.001. Its baselines keep the clip. Both have no KL; the paper's bonus
(0.01) is left out of `luffy`, and entropy_control.kind=bonus brings it. The paper has 7 answers
and the demonstration; here all rl.group_size answers are on-policy and the demonstration comes on
top, so that rollouts are as many as in every other method: the paper's group is rl.group_size=7. A
demonstration earns its reward, and the punishment of its length, by the same rule as an answer. If
it is right and so is every answer, nobody has an advantage.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..setups import Setup
from .method import Method, mixing_stage

if TYPE_CHECKING:
    from ..problems import Problem
    from ..steps import Rollout, Step
    from ..updates import Update


@dataclass(frozen=True)
class LUFFYSettings(Section):
    """The shaping of the demonstration's ratio."""

    section: ClassVar[str] = "luffy"
    gamma: float = setting(0.1, "f(x) = x / (x + gamma): the probability at which a token of a "
                           "demonstration learns most", "paper and released code: 0.1", above=0)


class LUFFY(Method):
    """Demonstrations as off-policy answers of the group."""

    settings_section = LUFFYSettings
    own_loss = True

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.stages = (mixing_stage(settings),)
        self.verdicts: dict[str, float] = {}  # problem -> reward of its demonstration

    def begin(self, trainer) -> None:
        self.verifier, self.policy = trainer.verifier, trainer.policy

    def compose(self, step: "Step") -> "list[Update]":
        self._judge([rollout.problem for rollout in step.rollouts])
        gains = [self._joint_advantages(rollout) for rollout in step.rollouts]
        updates, count = [], step.mini_batches
        for i in range(count):
            updates.append(self._update(step, step.rollouts[i::count], gains[i::count]))
        rewards = [self.verdicts[rollout.problem.id] for rollout in step.rollouts]
        step.row |= {"luffy/demonstration_reward": sum(rewards) / len(rewards),
                     "luffy/demonstration_advantage": sum(gains) / len(gains),
                     "luffy/demonstrations": sum(gain != 0 for gain in gains)}
        return updates

    def _judge(self, problems: "list[Problem]") -> None:
        """The reward of each problem's demonstration, once a run."""
        from ..judging import rewards_of

        new = [problem for problem in problems if problem.id not in self.verdicts]
        if not new:
            return
        texts = [problem.solution for problem in new]
        found = self.verifier.verify([p.answer for p in new], texts, [True] * len(new))
        rewards = rewards_of(new, texts, found, self.settings.rl.reward).tolist()
        self.verdicts |= {p.id: reward for p, reward in zip(new, rewards, strict=True)}

    def _joint_advantages(self, rollout: "Rollout") -> float:
        """Gives the answers their advantages in the joint group; returns the demonstration's."""
        import torch

        from ..judging import overlong_of
        from ..objectives import group_advantages

        length = len(self.policy.encode_completion(rollout.problem.solution))
        worth = self.verdicts[rollout.problem.id] + overlong_of([length], [True], self.settings.rl)
        rewards = torch.cat([rollout.shaped, worth])
        joint = group_advantages(rewards[None], self.settings.rl.advantage_scale)[0]
        rollout.advantages = joint[:-1]
        return float(joint[-1])

    def _update(self, step: "Step", rollouts: "list[Rollout]", gains: list[float]) -> "Update":
        """A mini-batch with one normaliser over demonstrations and answers."""
        import torch

        from ..objectives import token_weights

        update = step.update([rollout.problem for rollout in rollouts], rollouts, sft=1.0, rl=1.0)
        lengths = torch.tensor([len(s.completion) for s in update.sequences])
        weight = token_weights(lengths, self.settings.rl.loss_normalisation,
                               self.settings.rl.max_new_tokens)
        taught = torch.arange(len(lengths)) < update.demonstrations
        useful = torch.zeros(len(lengths), dtype=torch.bool)
        useful[:len(gains)] = torch.tensor(gains) != 0  # the others have no gradient
        update.sft, update.rl = weight * useful, weight * ~taught

        def shaped(index, scores, entropies):
            p = scores.exp()
            return -gains[index] * p / (p + self.own.gamma)

        update.demonstration_loss = shaped
        return update

    def state(self):
        return {"verdicts": self.verdicts}

    def load_state(self, state):
        self.verdicts = state["verdicts"]

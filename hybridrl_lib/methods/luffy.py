"""LUFFY (arXiv 2504.14945): the demonstration joins the group as one more answer.

    group of a problem: G sampled answers o_i and the demonstration s, judged by one verifier
    A: gain of each over the mean reward of all G + 1, divided by their deviation
    J = 1/Z [ sum_t f(pi_theta(s_t)) A_s  +  sum_i sum_t min(rho A_i, clip(rho) A_i) ]
    f(x) = x / (x + gamma), the ratio to a policy that gives the demonstration probability 1

A demonstration's token has the gradient weight gamma pi / (pi + gamma)^2 on log pi, largest at pi =
gamma and 0 at both ends. f is never clipped. Z is that of rl.loss_normalization, over sampled
answers and demonstrations together.

Read from the released code and second-hand notes; the code differs from the paper and is the setup
`luffy_code`: no division by the deviation, no clip on the sampled answers either, a constant
length, an entropy term of 0.001. That code divides the summed loss by the maximum length only, not
by the number of answers, so the entropy has less weight relative to L_RL here, where `constant`
divides by both. Its baselines keep the clip. Both have no KL; the paper's entropy term (0.01) is
not in `luffy`. The paper has 7 answers and the demonstration; here all rl.group_size answers are
on-policy and the demonstration is added, so that all methods have the same number of rollouts: the
paper's group is rl.group_size=7. A demonstration earns its reward, and the penalty of its length,
by the same rule as an answer. If it is correct and so is every answer, all advantages are 0.
"""

import torch
from torch import Tensor

from ..config.settings import Settings
from ..learning.judging import overlong_of, rewards_of
from ..learning.step import Rollout, Step
from ..learning.update import Update
from ..objectives import token_weights
from ..problems.problem import Problem
from ..setups import Setup
from .method import Method, joint_advantages


class LUFFY(Method):
    """Demonstrations as off-policy answers of the group."""

    kept = ("verdicts",)

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.verdicts: dict[str, float] = {}  # problem -> reward of its demonstration

    def compose(self, step: Step) -> list[Update]:
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

    def _judge(self, problems: list[Problem]) -> None:
        """The reward of each problem's demonstration, once per run."""
        new = [problem for problem in problems if problem.id not in self.verdicts]
        if not new:
            return
        texts = [problem.solution for problem in new]
        found = self.run.verifier.verify([p.answer for p in new], texts, [True] * len(new))
        rewards = rewards_of(new, texts, found, self.settings.rl.reward).tolist()
        self.verdicts |= {p.id: reward for p, reward in zip(new, rewards, strict=True)}

    def _joint_advantages(self, rollout: Rollout) -> float:
        """Gives the answers their advantages in the joint group; returns the demonstration's."""
        rl = self.settings.rl
        length = len(self.run.policy.encode_completion(rollout.problem.solution))
        worth = self.verdicts[rollout.problem.id] + float(overlong_of([length], [True], rl))
        return joint_advantages(rollout, worth, rl.advantage_scale)

    def _update(self, step: Step, rollouts: list[Rollout], gains: list[float]) -> Update:
        """A mini-batch with one normalizer over demonstrations and answers."""
        update = step.update([rollout.problem for rollout in rollouts], rollouts, sft=1.0, rl=1.0)
        lengths = torch.tensor([len(s.completion) for s in update.sequences])
        weight = token_weights(lengths, self.settings.rl.loss_normalization,
                               self.settings.rl.max_new_tokens)
        taught = torch.arange(len(lengths)) < update.demonstrations
        useful = torch.zeros(len(lengths), dtype=torch.bool)
        useful[:len(gains)] = torch.tensor(gains) != 0  # the others have no gradient
        update.sft, update.rl = weight * useful, weight * ~taught

        def shaped(index: int, scores: Tensor, entropies: Tensor) -> Tensor:
            p = scores.exp()
            return -gains[index] * p / (p + self.own.gamma)

        update.demonstration_loss = shaped
        return update

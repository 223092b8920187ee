"""Steps 2 to 4 of Algorithm 1: sample answers, reward them, and compute their advantages."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..config.settings import Settings
from ..learning.judging import overlong_of, reward_metrics, rewards_of, verdicts_of, with_hint
from ..learning.progress import Progress
from ..learning.step import Rollout
from ..methods.method import Method
from ..objectives import group_advantages
from ..policy.completions import Group
from ..policy.policy import Policy
from ..policy.sampling import sample
from ..problems.problem import Problem
from ..rewards.verifier import Verifier
from ..system.seeds import seed_of


class Judge:
    """Samples G answers per problem, and computes their rewards and advantages.

    Args:
        policy: samples.
        method: may give hints that answers continue.
        problems: training problems; dynamic sampling takes more from there.
        settings: all settings of the run.
        verifier: gives the verdicts.
        seen: called after every round of sampling with its problems, groups whose texts start with
            the hint, (P, G) rewards, and whether it is the first round of the step.
    """

    def __init__(self, policy: Policy, method: Method, problems: Sequence[Problem],
                 settings: Settings, verifier: Verifier,
                 seen: Callable[[Sequence[Problem], Sequence[Group], Tensor, bool], None]):
        self.policy, self.method, self.problems = policy, method, problems
        self.settings, self.verifier, self.seen = settings, verifier, seen

    def roll_out(self, problems: list[Problem], progress: Progress, row: dict) -> list[Rollout]:
        """The rewarded answers that a step learns from; their statistics go into the step's row.

        With dynamic sampling (DAPO, 2503.14476) groups without signal are replaced by those of more
        problems; after the last round the step continues with what there is.
        """
        rl, sampled, kept, reasons = self.settings.rl, [], [], Counter()
        dynamic = rl.dynamic_sampling_rounds > 1
        for number, batch in enumerate(self._rounds(problems, progress)):
            if len(kept) >= len(problems):
                break
            prompts = [self.policy.encode_prompt(problem.question) for problem in batch]
            hints = self.method.hints(batch, progress)
            if hints:
                prompts = [prompt + hint for prompt, hint in zip(prompts, hints, strict=True)]

            # 2. Sample: G answers per problem from pi_old, which is pi_theta now.
            groups = sample(
                self.policy, prompts, samples=rl.group_size, max_new_tokens=rl.max_new_tokens,
                temperature=rl.temperature, batch_size=self.settings.evaluation.batch_size,
                seed=seed_of(progress.seed, "rollouts", progress.taken,
                             *([number] if number else [])))

            # 3. Reward: r_phi of every answer.
            judged = groups if not hints else [with_hint(self.policy, group, hint)
                                               for group, hint in zip(groups, hints, strict=True)]
            verdicts = verdicts_of(batch, judged, self.verifier)
            reasons.update(verdict.reason for verdict in verdicts)
            rewards = rewards_of([problem for problem in batch for _ in range(rl.group_size)],
                                 [c.text for group in judged for c in group.completions], verdicts,
                                 rl.reward).view(-1, rl.group_size)  # (P G,) -> (P, G)

            # 4. Advantages: the gain of each answer over the mean of its group.
            shaped = rewards
            if rl.overlong_share:
                shaped = rewards + torch.stack([
                    overlong_of([len(c.token_ids) for c in group.completions],
                                [c.finished for c in group.completions], rl) for group in groups])
            advantages = group_advantages(shaped, rl.advantage_scale)  # (P, G)

            self.seen(batch, judged, rewards, not number)
            rollouts = [Rollout(*item) for item in zip(batch, groups, rewards, shaped, advantages,
                                                       strict=True)]
            sampled += rollouts
            kept += [r for r in rollouts if 0 < r.solved < 1] if dynamic else rollouts

        kept = kept[:len(problems)]
        if dynamic:
            row |= {"groups/sampled": len(sampled), "groups/kept": len(kept)}
        row |= reward_metrics([r.group for r in sampled], torch.stack([r.rewards for r in sampled]))
        if rl.overlong_share:
            row["reward/overlong"] = float(torch.stack(
                [r.shaped - r.rewards for r in sampled]).mean())
        row["verdicts"] = dict(sorted(reasons.items()))
        if rl.reward != "answer":
            row["reward/answer"] = reasons["right"] / sum(reasons.values())
        return kept

    def _rounds(self, problems: list[Problem], progress: Progress) -> Iterator[list[Problem]]:
        """The problems of a step, and with dynamic sampling as many others for each more round."""
        yield problems
        if self.settings.rl.dynamic_sampling_rounds > 1:
            asked = {problem.id for problem in problems}
            others = [problem for problem in self.problems if problem.id not in asked]
            progress.random("dynamic sampling").shuffle(others)
            for number in range(self.settings.rl.dynamic_sampling_rounds - 1):
                more = others[number * len(problems):(number + 1) * len(problems)]
                if more:
                    yield more

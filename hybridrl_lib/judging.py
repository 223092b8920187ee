"""Algorithm 1 before its loss: answers to a batch of problems, their rewards, their advantages."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .config import RLSettings, Settings
from .evaluation import verdicts_of
from .methods.method import Method, Progress
from .objectives import group_advantages, overlong_punishment
from .policy import Policy
from .problems import Problem
from .records import seed_of
from .rewards import Verdict, Verifier, steps_hold
from .rollouts import Group, sample
from .steps import Rollout


class Judge:
    """Samples G answers a problem and says what each is worth.

    Args:
        policy: samples.
        method: may give hints that answers start from.
        problems: for training; dynamic sampling takes further ones from there.
        settings: all settings of the run.
        verifier: gives the verdicts.
        seen: told of every round of sampling: its problems, groups with texts that begin with the
            hint, (P, G) rewards, and whether it is the step's first.
    """

    def __init__(self, policy: Policy, method: Method, problems: Sequence[Problem],
                 settings: Settings, verifier: Verifier,
                 seen: Callable[[Sequence[Problem], Sequence[Group], Tensor, bool], None]):
        self.policy, self.method, self.problems = policy, method, problems
        self.settings, self.verifier, self.seen = settings, verifier, seen

    def roll_out(self, problems: list[Problem], progress: Progress, row: dict) -> list[Rollout]:
        """The judged answers that a step learns from; what they say goes into the step's row.

        With dynamic sampling (DAPO) groups without signal make way for those of further problems;
        after the last round a step goes on with what there is.
        """
        rl, asked, reasons = self.settings.rl, {p.id for p in problems}, Counter()
        rollouts = self._round(problems, progress, 0, reasons)
        sampled, kept = rollouts, rollouts
        if rl.dynamic_sampling_rounds > 1:
            others = [p for p in self.problems if p.id not in asked]
            progress.random("dynamic sampling").shuffle(others)
            kept = [rollout for rollout in sampled if 0 < rollout.solved < 1]
            for number in range(1, rl.dynamic_sampling_rounds):
                further, others = others[:len(problems)], others[len(problems):]
                if not further or len(kept) >= len(problems):
                    break
                rollouts = self._round(further, progress, number, reasons)
                sampled = sampled + rollouts
                kept = kept + [rollout for rollout in rollouts if 0 < rollout.solved < 1]
            kept = kept[:len(problems)]
            row |= {"groups/sampled": len(sampled), "groups/kept": len(kept)}
        row |= reward_metrics([r.group for r in sampled], torch.stack([r.rewards for r in sampled]))
        if rl.overlong_share:
            row["reward/overlong"] = float(torch.stack(
                [r.shaped - r.rewards for r in sampled]).mean())
        row["verdicts"] = dict(sorted(reasons.items()))
        if rl.reward != "answer":
            row["reward/answer"] = reasons["right"] / sum(reasons.values())
        return kept

    def _round(self, problems: list[Problem], progress: Progress, number: int,
               reasons: Counter) -> list[Rollout]:
        """One round of sampling; `reasons` counts the verdicts'."""
        rl, prompts = self.settings.rl, [self.policy.encode_prompt(p.question) for p in problems]
        hints = self.method.hints(problems, progress)
        if hints:
            prompts = [prompt + hint for prompt, hint in zip(prompts, hints, strict=True)]
        groups = sample(
            self.policy, prompts,
            samples=rl.group_size, max_new_tokens=rl.max_new_tokens, temperature=rl.temperature,
            seed=seed_of(progress.seed, "rollouts", progress.taken, *([number] if number else [])),
            batch_size=self.settings.evaluation.batch_size)
        judged = groups if not hints else [
            with_hint(self.policy, group, hint) for group, hint in zip(groups, hints, strict=True)]
        verdicts = verdicts_of(problems, judged, self.verifier)
        reasons.update(v.reason for v in verdicts)
        rewards = rewards_of([p for p in problems for _ in range(rl.group_size)],
                             [c.text for group in judged for c in group.completions], verdicts,
                             rl.reward).view(-1, rl.group_size)
        shaped = rewards
        if rl.overlong_share:
            shaped = rewards + torch.stack([
                overlong_of([len(c.token_ids) for c in group.completions],
                            [c.finished for c in group.completions], rl) for group in groups])
        advantages = group_advantages(shaped, rl.advantage_scale)
        self.seen(problems, judged, rewards, not number)
        return [Rollout(*item) for item in zip(problems, groups, rewards, shaped, advantages,
                                               strict=True)]


def rewards_of(problems: Sequence[Problem], texts: Sequence[str], verdicts: Sequence[Verdict],
               kind: str) -> Tensor:
    """(N,) what texts are worth: 1 for a strictly right answer, else 0.

    Args:
        problems, texts, verdicts: N of each.
        kind: `rl.reward`; with `answer_and_steps` the steps of the text have to hold, too.
    """
    return torch.tensor([
        float(verdict.strict and (kind == "answer"
                                  or steps_hold(text, problem.solution, problem.answer)))
        for problem, text, verdict in zip(problems, texts, verdicts, strict=True)])


def reward_metrics(groups: Sequence[Group], rewards: Tensor) -> dict:
    """What rollouts say about a policy, by the names of the record.

    Args:
        groups: P groups of G completions.
        rewards: (P, G) of 0 and 1.
    """
    completions = [c for group in groups for c in group.completions]
    lengths = [len(c.token_ids) for c in completions]
    size = rewards.shape[1]
    right = rewards.sum(1).round().long().tolist()
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(dim=1).mean()) if size > 1 else 0.0,
        "frac_reward_zero_std": sum(n in (0, size) for n in right) / len(right),
        "entropy": sum(sum(c.entropies) for c in completions) / max(1, sum(lengths)),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/clipped_ratio": sum(not c.finished for c in completions) / len(completions),
        "groups/correct_counts": [right.count(n) for n in range(size + 1)],
    }


def with_hint(policy: Policy, group: Group, hint: list[int]) -> Group:
    """The group with texts that begin with the hint that the answers went on from.

    Both are decoded as one: a character may begin in the hint and end in the answer.
    """
    return replace(group, completions=[replace(c, text=policy.decode([*hint, *c.token_ids]))
                                       for c in group.completions])


def overlong_of(lengths: Sequence[int], finished: Sequence[bool], rl: RLSettings) -> Tensor:
    """(N,) the punishment of long completions, 0 or less; `finished`: that were not cut."""
    return overlong_punishment(torch.tensor(lengths), torch.tensor(finished), rl.max_new_tokens,
                               rl.overlong_share)

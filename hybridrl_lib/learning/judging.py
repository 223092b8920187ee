"""Verdicts and rewards of sampled answers, and what they say about a policy."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config.sections import RLSettings
from ..objectives import overlong_penalty
from ..policy.completions import Group
from ..policy.policy import Policy
from ..problems.problem import Problem
from ..rewards.steps import steps_hold
from ..rewards.verifier import Verdict, Verifier


def verdicts_of(problems: Sequence[Problem], groups: Sequence[Group],
                verifier: Verifier) -> list[Verdict]:
    """The verdict of every completion, ordered by problem, then by sample."""
    pairs = [(problem, completion) for problem, group in zip(problems, groups, strict=True)
             for completion in group.completions]
    return verifier.verify([problem.answer for problem, _ in pairs],
                           [completion.text for _, completion in pairs],
                           [completion.finished for _, completion in pairs])


def rewards_of(problems: Sequence[Problem], texts: Sequence[str], verdicts: Sequence[Verdict],
               kind: str) -> Tensor:
    """r_phi: (N,) the rewards of N texts, 1 for a correct answer by the strict rule, else 0.

    Args:
        problems, texts, verdicts: N of each.
        kind: `rl.reward`; with `answer_and_steps` the steps of the text must hold, too.
    """
    return torch.tensor([
        float(verdict.strict and (kind == "answer"
                                  or steps_hold(text, problem.solution, problem.answer)))
        for problem, text, verdict in zip(problems, texts, verdicts, strict=True)])


def overlong_of(lengths: Sequence[int], finished: Sequence[bool], rl: RLSettings) -> Tensor:
    """(N,) the penalty of long completions, 0 or less; `finished`: not truncated."""
    return overlong_penalty(torch.tensor(lengths), torch.tensor(finished), rl.max_new_tokens,
                            rl.overlong_share)


def with_hint(policy: Policy, group: Group, hint: list[int]) -> Group:
    """The group with texts that start with the hint that its answers continue.

    Both are decoded together: a character may start in the hint and end in the answer.
    """
    return replace(group, completions=[replace(c, text=policy.decode([*hint, *c.token_ids]))
                                       for c in group.completions])


def reward_metrics(groups: Sequence[Group], rewards: Tensor) -> dict:
    """What rollouts say about a policy, under the names of the record.

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
        "groups/correct_counts": [right.count(n) for n in range(size + 1)]}

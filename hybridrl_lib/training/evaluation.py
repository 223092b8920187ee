"""Evaluation: one greedy answer and m sampled answers per problem."""

from collections.abc import Sequence

from ..config.sections import EvaluationSettings
from ..learning.judging import verdicts_of
from ..policy.completions import Group
from ..policy.policy import Policy
from ..policy.sampling import sample
from ..problems.problem import Problem
from ..rewards.answers import MAX_ANSWER_CHARACTERS, canonical, extract_lenient
from ..rewards.verifier import Verifier
from ..system.seeds import seed_of


def evaluate(policy: Policy, problems: Sequence[Problem], settings: EvaluationSettings,
             verifier: Verifier, *, part: str, checkpoint: str = "last", samples: int,
             seed: int) -> list[dict]:
    """Scores the policy on problems.

    Args:
        part: `test`, `train`, or `validation`, for the record.
        checkpoint: `last` or `best`, for the record.
        samples: m, answers per problem at `settings.temperature`; 0 for the greedy one only.
        seed: of the run, from which that of the samples is derived.

    Returns:
        One row of `eval.jsonl` per problem: the greedy answer with its strict and lenient verdict,
        and the verdicts and lengths of the m samples. `report.statistics.pass_at_k` computes Pass@k
        from them.
    """
    problems = list(problems)
    if not problems:
        return []
    prompts = [policy.encode_prompt(problem.question) for problem in problems]
    common = {"max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size}
    greedy = sample(policy, prompts, samples=1, temperature=0.0, **common)
    rows = []
    for problem, group, verdict in zip(problems, greedy, verdicts_of(problems, greedy, verifier),
                                       strict=True):
        answer = group.completions[0]
        rows.append({
            "checkpoint": checkpoint, "part": part, "benchmark": problem.benchmark,
            "id": problem.id, "gold": problem.answer, "level": problem.level,
            "subject": problem.subject,
            "greedy": {"text": answer.text, "strict": verdict.strict, "lenient": verdict.lenient,
                       "reason": verdict.reason, "tokens": len(answer.token_ids),
                       "finished": answer.finished}})
    if samples:
        sampled = sample(policy, prompts, samples=samples, temperature=settings.temperature,
                         seed=seed_of(seed, "evaluation", part), **common)
        verdicts = iter(verdicts_of(problems, sampled, verifier))
        for row, group in zip(rows, sampled, strict=True):
            mine = [next(verdicts) for _ in group.completions]
            row["samples"] = {"strict": [int(v.strict) for v in mine],
                              "lenient": [int(v.lenient) for v in mine],
                              "tokens": [len(c.token_ids) for c in group.completions]}
    return rows


def distinct_answers(groups: Sequence[Group]) -> float:
    """Diversity: the number of distinct final answers divided by the number of answers, averaged.

    Answers are read leniently; those without a final answer count as one. 1/G if all G agree.
    """
    shares = []
    for group in groups:
        found = [extract_lenient(completion.text) for completion in group.completions]
        answers = {None if answer is None else canonical(answer[:MAX_ANSWER_CHARACTERS])
                   for answer in found}
        shares.append(len(answers) / len(found))
    return sum(shares) / max(1, len(shares))


def accuracy(rows: Sequence[dict]) -> float:
    """Share of problems whose greedy answer is correct by the strict rule."""
    return sum(row["greedy"]["strict"] for row in rows) / max(1, len(rows))

"""Scores: one greedy answer and m samples per problem, and each row is what it says it is."""

import re

import pytest
from small_training import Coin, Fixed, parts_of, small_settings

from hybridrl_lib.experiments.run import first_per_benchmark
from hybridrl_lib.learning.judging import verdicts_of
from hybridrl_lib.policy.completions import Completion, Group
from hybridrl_lib.policy.sampling import sample
from hybridrl_lib.report.group_signal import signal_lines
from hybridrl_lib.rewards.verifier import Verifier
from hybridrl_lib.training.evaluation import accuracy, evaluate

SETTINGS = small_settings("evaluation.samples=5").evaluation


@pytest.fixture(scope="module")
def problems():
    return list(parts_of(small_settings("data.test_limits=[3]").data).test)


def score(policy, problems, verifier=None, settings=SETTINGS, **changes):
    arguments = {"part": "test", "samples": 5, "seed": 0} | changes
    return evaluate(policy, problems, settings, verifier or Coin(), **arguments)


def test_a_row_says_what_was_asked_and_answered(policy, problems):
    """One row per problem, in order, with greedy answer, verdicts, and m samples."""
    rows = score(policy, problems)
    assert [row["id"] for row in rows] == [p.id for p in problems]
    for row, problem in zip(rows, problems, strict=True):
        assert (row["checkpoint"], row["part"]) == ("last", "test")
        assert (row["benchmark"], row["gold"]) == (problem.benchmark, problem.answer)
        assert (row["level"], row["subject"]) == (problem.level, problem.subject)
        assert {len(values) for values in row["samples"].values()} == {5}
        assert set(row["samples"]) == {"strict", "lenient", "tokens"}


def test_the_greedy_answer_is_the_likeliest_one(policy, problems):
    """Table 2 scores it: argmax at every token, whatever the seed and the temperature."""
    rows = score(policy, problems)
    hot = small_settings("evaluation.temperature=3").evaluation
    assert [r["greedy"] for r in rows] == [r["greedy"] for r in score(policy, problems, seed=7)]
    assert [r["greedy"] for r in rows] == [
        r["greedy"] for r in score(policy, problems, settings=hot)]
    for row, problem in zip(rows, problems, strict=True):
        group, = sample(policy, [policy.encode_prompt(problem.question)], samples=1,
                        max_new_tokens=SETTINGS.max_new_tokens, temperature=0.0)
        answer = group.completions[0]
        assert row["greedy"]["text"] == answer.text
        assert row["greedy"]["tokens"] == len(answer.token_ids)
        assert row["greedy"]["finished"] == answer.finished


def test_every_verdict_belongs_to_its_answer(policy, problems):
    """Verdicts run problem by problem, sample by sample: a transposed table would not show."""
    rewards = [i % 3 == 0 for i in range(6)] + [i % 7 == 0 for i in range(30)]
    rows = score(policy, problems, Fixed(rewards))
    assert [row["greedy"]["strict"] for row in rows] == rewards[:6]
    assert [v for row in rows for v in row["samples"]["strict"]] == [int(r) for r in rewards[6:]]
    assert accuracy(rows) == 2 / 6


def test_samples_repeat_by_seed_and_differ_between_parts(policy, problems):
    """One seed repeats, two differ, and the training part has its own random numbers."""
    one, again, other, train = (
        [row["samples"] for row in score(policy, problems, **arguments)]
        for arguments in ({}, {}, {"seed": 1}, {"part": "train"}))
    assert one == again and one != other and one != train


def test_batch_size_changes_no_row(policy, problems):
    """evaluation.batch_size changes memory and never a score."""
    small = small_settings("evaluation.samples=5", "evaluation.batch_size=3").evaluation
    assert score(policy, problems, settings=small) == score(policy, problems)


def test_greedy_only(policy, problems):
    """samples=0: no samples in the row, as for the best checkpoint; no problems are no error."""
    rows = score(policy, problems, samples=0, checkpoint="best")
    assert all("samples" not in row and row["checkpoint"] == "best" for row in rows)
    assert score(policy, []) == [] and accuracy([]) == 0


def completion(text, finished=True):
    return Completion([3], [0.0], [0.0], finished, text)


def test_verdicts_take_gold_text_and_end_from_the_right_places(problems):
    """Gold is the gold, the text is the model's, and a truncated answer is not right."""
    gold = problems[0].answer
    boxed = rf"\boxed{{{gold}}}."
    groups = [Group([1], [completion(boxed), completion(boxed, finished=False),
                          completion(r"\boxed{-17}"), completion(gold)])]
    with Verifier() as verifier:
        verdicts = verdicts_of(problems[:1], groups, verifier)
    assert [v.strict for v in verdicts] == [True, False, False, False]
    assert [v.lenient for v in verdicts] == [True, True, False, True]


def test_the_training_part_is_limited_per_benchmark():
    """evaluation.train_limit is per benchmark, so that both gaps are measured."""
    parts = parts_of(small_settings("data.train_limits=[5,3]").data)
    chosen = first_per_benchmark(parts.train, 4)
    names = [p.benchmark for p in chosen]
    assert (names.count("tiny_word"), names.count("tiny_symbolic")) == (4, 3)
    assert first_per_benchmark(parts.train, None) == list(parts.train)


def test_signal_lines_say_what_rl_can_learn_from():
    """Training problems only; a problem always or never solved has no signal."""
    def row(part, benchmark, verdicts):
        return {"part": part, "checkpoint": "last", "benchmark": benchmark,
                "samples": {"strict": verdicts}}

    rows = [row("train", "gsm8k", [1, 1, 1, 1]), row("train", "gsm8k", [0, 0, 0, 0]),
            row("train", "gsm8k", [0, 1, 0, 0]), row("train", "gsm8k", [0, 0, 0, 0]),
            row("test", "math500", [1, 0, 1, 0]),
            {"part": "train", "checkpoint": "last", "benchmark": "math500"}]
    line, = signal_lines(rows, group_size=8)
    assert re.findall(r"[0-9.]+%", line) == ["31.2%", "50.0%", "25.0%"] and "Pass@4" in line
    assert signal_lines([], 8) == []

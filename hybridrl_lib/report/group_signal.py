"""How often the base model solves the training problems, before any RL update."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .loading import Experiment, benchmark_title
from .statistics import group_signal, pass_at_k
from .text import csv_text, markdown_table, percent

BASE = "base"
VERDICTS = ("strict", "lenient")
PARTS = {"train": "training", "test": "test"}


@dataclass(frozen=True)
class Signal:
    """The base model's sampled answers to the training problems of one benchmark, as shares.

    Attributes:
        verdict: `strict`, as in the reward, or `lenient`.
        problems, samples: number of problems, and of answers to each over all seeds.
        group: G, the group size of RL, at most the samples of a seed.
        pass_at_1, pass_at_group: means over problems.
        with_signal: share of groups of G that are neither all correct nor all wrong.
    """

    benchmark: str
    verdict: str
    problems: int
    samples: int
    group: int
    pass_at_1: float
    pass_at_group: float
    with_signal: float


def make_signals(experiment: Experiment) -> tuple[Signal, ...]:
    """One per benchmark and verdict; none if no answers to training problems were sampled."""
    found = []
    for benchmark in experiment.benchmarks:
        runs = [(run, answers) for run in experiment.of(BASE)
                if (answers := run.answers_of("last", "train", benchmark)) and answers.samples]
        if not runs:
            continue
        asked = runs[0][0].config.get("settings", {}).get("rl", {}).get("group_size", 8)
        group = min(asked, *(answers.samples for _, answers in runs))
        for verdict in VERDICTS:
            scores = [signal_of(answers.samples, answers.right if verdict == "strict"
                                else answers.right_lenient, group) for _, answers in runs]
            found.append(Signal(benchmark, verdict, len(runs[0][1].ids),
                                sum(answers.samples for _, answers in runs), group,
                                *np.mean(scores, axis=0).tolist()))
    return tuple(found)


def signal_of(samples: int, right: Sequence[int], group: int) -> tuple[float, float, float]:
    """Pass@1, Pass@G, and the fraction of groups with signal: means over problems.

    Args:
        samples, right: m, and how many of them are correct for each problem.
        group: G, at most m.
    """
    return (float(np.mean(pass_at_k(samples, right, 1))),
            float(np.mean(pass_at_k(samples, right, group))),
            float(np.mean(group_signal(samples, right, group))))


def right_samples(rows: Iterable[dict], part: str) -> tuple[dict[str, list[int]], int]:
    """({benchmark: correct samples of each problem}, m) from the lines of an eval.jsonl."""
    right: dict[str, list[int]] = {}
    samples = 0
    for row in rows:
        if row["part"] == part and row["checkpoint"] == "last" and "samples" in row:
            right.setdefault(row["benchmark"], []).append(sum(row["samples"]["strict"]))
            samples = len(row["samples"]["strict"])
    return right, samples


def signal_lines(rows: Iterable[dict], group_size: int, part: str = "train") -> list[str]:
    """One line per benchmark: what RL can learn from the sampled answers to these problems.

    Args:
        rows: the lines of an eval.jsonl.
    """
    right, samples = right_samples(rows, part)
    group = min(group_size, samples)
    lines = []
    for benchmark, counts in right.items():
        one, solved, signal = signal_of(samples, counts, group)
        lines.append(f"{benchmark_title(benchmark).title}, {PARTS[part]} problems: Pass@1 "
                     f"{one:.1%}, Pass@{group} {solved:.1%}, groups of {group} with signal "
                     f"{signal:.1%}")
    return lines


def signals_csv(signals: tuple[Signal, ...]) -> str:
    """signal.csv; shares in percent."""
    header = ("benchmark", "verdict", "problems", "samples", "group", "pass@1", "pass@group",
              "groups_with_signal")
    return csv_text(header, [
        (s.benchmark, s.verdict, s.problems, s.samples, s.group, percent(s.pass_at_1),
         percent(s.pass_at_group), percent(s.with_signal)) for s in signals])


def signals_markdown(experiment: Experiment, signals: tuple[Signal, ...]) -> str:
    """signal.md: a line per benchmark and verdict."""
    group = signals[0].group
    rows = [[benchmark_title(s.benchmark).title, s.verdict, str(s.problems), str(s.samples),
             percent(s.pass_at_1, 1), percent(s.pass_at_group, 1), percent(s.with_signal, 1)]
            for s in signals]
    return (f"# Signal before RL, experiment `{experiment.name}`\n\n"
            "The base model's sampled answers to the training problems, percent. The reward uses "
            "the strict verdict. RL learns nothing from a group that is all correct or all "
            "wrong.\n\n"
            + markdown_table(["benchmark", "verdict", "problems", "samples per problem", "Pass@1",
                              f"Pass@{group}", f"groups of {group} with signal"],
                             rows, range(2, 7)))

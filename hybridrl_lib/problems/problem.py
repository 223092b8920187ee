"""A math problem and its benchmark: the pair (x, y) of the paper, section 1."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

FIGURE = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
ANSWER_SENTENCE = re.compile(r"The answer is \\boxed\{.*\}\.")


@dataclass(frozen=True)
class Problem:
    r"""One problem with its reference solution.

    Attributes:
        id: unique over all benchmarks; starts with the benchmark's name.
        question: without instruction or template.
        solution: the text that SFT learns, with its answer in `\boxed{}`.
        answer: the gold answer, as text.
        benchmark: a key of `BENCHMARKS`.
        level: difficulty, from 1 (easiest); None if the benchmark has no levels.
        subject: kind of problem; None if the benchmark has no subjects.
    """

    id: str
    question: str
    solution: str
    answer: str
    benchmark: str
    level: int | None = None
    subject: str | None = None


@dataclass(frozen=True)
class BenchmarkData:
    """All problems of one benchmark, before they are split.

    Attributes:
        problems: in the order of the source.
        revision: a hub revision or the sha256 of the files.
        official_test: ids of the benchmark's own test part; empty if it has only one file.
    """

    problems: tuple[Problem, ...]
    revision: str
    official_test: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Benchmark:
    """A named set of problems.

    Attributes:
        name: as in `data.benchmarks` and in records.
        title: as in tables and figures.
        stands_for: the paper's benchmark that a generated one replaces; None for a real one.
        load: reads or generates the problems; raises `UserError` if that is impossible.
    """

    name: str
    title: str
    stands_for: str | None
    load: Callable[[], BenchmarkData]

    @property
    def paper_key(self) -> str:
        """The benchmark whose column of the paper is printed next to this one."""
        return self.stands_for or self.name


def answer_sentence(answer: str) -> str:
    r"""The closing sentence of a solution whose source has no box: `The answer is \boxed{72}.`"""
    return rf"The answer is \boxed{{{answer}}}."


def solution_steps(problem: Problem) -> int:
    """Number of steps of the reference solution: its lines of text.

    Figures, blank lines, and a line that only states the answer do not count, so a GSM8K solution
    has as many steps as its source has lines before `####`.
    """
    text = FIGURE.sub("", problem.solution)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and ANSWER_SENTENCE.fullmatch(lines[-1]):
        lines.pop()
    return len(lines)


def first_repeated(words: Iterable[str]) -> str | None:
    """The first word that occurs twice, or None."""
    seen: set[str] = set()
    for word in words:
        if word in seen:
            return word
        seen.add(word)
    return None

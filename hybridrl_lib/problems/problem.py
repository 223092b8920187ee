"""A maths problem and the benchmark that it belongs to: the pair (x, y) of the paper, section 1."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

FIGURE = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
ANSWER_SENTENCE = re.compile(r"The answer is \\boxed\{.*\}\.")


@dataclass(frozen=True)
class Problem:
    r"""One problem with its reference solution.

    Attributes:
        id: unique over all benchmarks; begins with the benchmark's name.
        question: what the model is asked, without instruction or template.
        solution: the text that SFT learns; its answer stands in `\boxed{}`.
        answer: the gold answer, as text.
        benchmark: name of the benchmark, a key of `BENCHMARKS`.
        level: difficulty, 1 the easiest; None where the benchmark has none.
        subject: kind of problem; None where the benchmark has none.
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
        revision: which data this is: a hub revision or the sha256 of the files.
        official_test: ids of the benchmark's own test part; empty where it has only one file.
    """

    problems: tuple[Problem, ...]
    revision: str
    official_test: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Benchmark:
    """A named set of problems.

    Attributes:
        name: as in `data.benchmarks` and in every record.
        title: as in tables and figures.
        stands_for: the benchmark of the paper whose part a generated one plays; None: a real one.
        load: reads or generates the problems; raises `UserError` where that is not possible.
    """

    name: str
    title: str
    stands_for: str | None
    load: Callable[[], BenchmarkData]

    @property
    def paper_key(self) -> str:
        """The benchmark of the paper's column that is printed beside this one."""
        return self.stands_for or self.name


def answer_sentence(answer: str) -> str:
    r"""The closing sentence of a solution whose source has no box: `The answer is \boxed{72}.`"""
    return rf"The answer is \boxed{{{answer}}}."


def solution_steps(problem: Problem) -> int:
    """Steps of the reference solution: its lines of text.

    Figures, blank lines and a line that only states the answer do not count, so a GSM8K solution
    has as many steps as its source has lines before `####`.
    """
    text = FIGURE.sub("", problem.solution)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and ANSWER_SENTENCE.fullmatch(lines[-1]):
        lines.pop()
    return len(lines)


def first_repeated(words: Iterable[str]) -> str | None:
    """The first word that occurs a second time, or None."""
    seen: set[str] = set()
    for word in words:
        if word in seen:
            return word
        seen.add(word)
    return None

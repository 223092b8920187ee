"""Training, validation, and test parts (paper, section 1: 60 % of each benchmark is for training).

`split: paper` pools all rows of a benchmark and splits them 60/40. `split: official` keeps the
benchmark's own test file as the test part (GSM8K), or is the same (MATH-500). In both, a tenth of
the training part is validation, on which settings are tuned.

The order within a part depends only on the seed and the ids, not on the order of the rows, Python's
random numbers, or other benchmarks.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

from ..system.errors import UserError
from .benchmarks import get_benchmark
from .problem import BenchmarkData, Problem, first_repeated, solution_steps

if TYPE_CHECKING:
    from ..config.sections import DataSettings

PART_NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class ProblemParts:
    """The problems of all chosen benchmarks, joined in the order of `data.benchmarks`.

    Attributes:
        train, validation, test: without common questions.
        counts: benchmark -> part -> number of problems.
        revisions: benchmark -> hub revision or sha256 of the data.
        dropped_duplicates: benchmark -> number of problems left out because of a repeated question.
    """

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    revisions: Mapping[str, str] = field(default_factory=dict)
    dropped_duplicates: Mapping[str, int] = field(default_factory=dict)


def normalized(question: str) -> str:
    """The question without differences in case and spacing, for comparing questions."""
    return " ".join(unicodedata.normalize("NFC", question).casefold().split())


def without_duplicates(problems: Iterable[Problem], seen: set[str]) -> list[Problem]:
    """The problems whose question is not in `seen`, to which their questions are added."""
    kept = []
    for problem in problems:
        key = normalized(problem.question)
        if key not in seen:
            seen.add(key)
            kept.append(problem)
    return kept


def shuffled(problems: Iterable[Problem], seed: int) -> list[Problem]:
    """The problems sorted by a checksum of seed and id."""
    return sorted(problems, key=lambda p: hashlib.sha256(f"{seed}:{p.id}".encode()).digest())


def split_benchmark(loaded: BenchmarkData, data: "DataSettings") -> dict[str, list[Problem]]:
    """The three parts of one benchmark, shuffled, before limits.

    Of two problems with the same question one is left out: with an official test file the one
    outside it, so that test scores stay comparable; otherwise the later one.

    Raises:
        UserError: two problems have the same id.
    """
    repeated = first_repeated(problem.id for problem in loaded.problems)
    if repeated is not None:
        raise UserError(f"Two problems have the id {repeated}; remove one of the two rows.")
    official_test = loaded.official_test if data.split == "official" else frozenset()
    # sorted is stable: the official test first, then the order of the source
    distinct = without_duplicates(
        sorted(loaded.problems, key=lambda problem: problem.id not in official_test), set())
    if official_test:
        training = shuffled((p for p in distinct if p.id not in official_test), data.split_seed)
        test = shuffled((p for p in distinct if p.id in official_test), data.split_seed)
    else:
        order = shuffled(distinct, data.split_seed)
        cut = round(data.train_fraction * len(order))
        training, test = order[:cut], order[cut:]
    kept_for_training = len(training) - round(data.validation_fraction * len(training))
    return {"train": training[:kept_for_training], "validation": training[kept_for_training:],
            "test": test}


def is_easy_enough(problem: Problem, data: "DataSettings") -> bool:
    """Whether a problem passes `max_solution_steps` and `max_level`, which do not look at the
    model.
    """
    if data.max_level is not None and problem.level is not None and problem.level > data.max_level:
        return False
    return data.max_solution_steps is None or solution_steps(problem) <= data.max_solution_steps


def in_turn(problems: Iterable[Problem]) -> list[Problem]:
    """Problems taken from the benchmarks in turn, so that a short prefix has all benchmarks."""
    of: dict[str, list[Problem]] = {}
    for problem in problems:
        of.setdefault(problem.benchmark, []).append(problem)
    return [problem for together in zip_longest(*of.values()) for problem in together
            if problem is not None]


def load_parts(data: "DataSettings") -> ProblemParts:
    """Loads, splits, filters, and limits the benchmarks of the settings.

    Filters apply to training and validation problems only. Limits come last and cut off the end, so
    a smaller limit gives a prefix of a larger one.

    Raises:
        UserError: data cannot be read, a gold answer cannot be parsed (the message has its id), or
            no training problem is left.
    """
    limits = {part: getattr(data, f"{part}_limits") or (None,) * len(data.benchmarks)
              for part in PART_NAMES}
    joined: dict[str, list[Problem]] = {part: [] for part in PART_NAMES}
    counts, revisions, dropped, seen = {}, {}, {}, set()
    for position, name in enumerate(data.benchmarks):
        benchmark = get_benchmark(name)
        loaded = benchmark.load()
        parts = split_benchmark(loaded, data)
        # Across benchmarks only after the split: one benchmark never changes another's split.
        parts = {part: without_duplicates(parts[part], seen) for part in PART_NAMES}
        dropped[name] = len(loaded.problems) - sum(map(len, parts.values()))
        for part in ("train", "validation"):
            parts[part] = [p for p in parts[part] if is_easy_enough(p, data)]
        for part in PART_NAMES:
            parts[part] = parts[part][:limits[part][position]]
            joined[part].extend(parts[part])
        if benchmark.stands_for is None:
            _check_golds(p for part in PART_NAMES for p in parts[part])
        counts[name] = {part: len(parts[part]) for part in PART_NAMES}
        revisions[name] = loaded.revision
    if not joined["train"]:
        raise UserError("No training problem is left; raise data.max_solution_steps, "
                        "data.max_level, data.train_limits or data.train_fraction.")
    return ProblemParts(**{part: tuple(joined[part]) for part in PART_NAMES}, counts=counts,
                        revisions=revisions, dropped_duplicates=dropped)


def _check_golds(problems: Iterable[Problem]) -> None:
    from ..rewards.verifier import check_gold

    for problem in problems:
        check_gold(problem.answer, problem.id)

"""Tables of scores (seeds, problems) per setup, benchmark, and metric."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .loading import Answers, Experiment, Run
from .statistics import Difference, holm, paired_difference, pass_at_k

Key = TypeVar("Key")
PASS_AT = (1, 2, 4, 8)

# Metrics; the k of Pass@k come from the experiment's settings.
EXACT_MATCH = "exact_match"
EXACT_MATCH_LENIENT = "exact_match_lenient"
EXACT_MATCH_BEST = "exact_match_best"
EXACT_MATCH_TRAIN = "exact_match_train"


@dataclass(frozen=True)
class Scores:
    """Shares of one setup on one benchmark by one metric."""

    seeds: tuple[int, ...]
    ids: tuple[str, ...]
    values: np.ndarray  # (seeds, problems)
    dropped: int  # problems that some seed was not scored on

    def at(self, ids: Iterable[str]) -> np.ndarray:
        """(seeds, problems) for these problems in this order."""
        place = {name: index for index, name in enumerate(self.ids)}
        return self.values[:, [place[name] for name in ids]]

    def for_seeds(self, seeds: Iterable[int]) -> np.ndarray:
        """(seeds, problems) for these seeds in this order."""
        return self.values[[self.seeds.index(seed) for seed in seeds]]


def pass_ks(experiment: Experiment) -> tuple[int, ...]:
    """The k of Pass@k that the experiment's settings ask for."""
    for run in experiment.runs:
        asked = run.config.get("settings", {}).get("evaluation", {}).get("pass_at")
        if asked:
            return tuple(sorted(int(k) for k in asked))
    return PASS_AT


def metric_names(experiment: Experiment) -> tuple[str, ...]:
    """The metrics of table2.csv in their order."""
    sampled = [f"pass@{k}" for k in pass_ks(experiment)]
    return (EXACT_MATCH, EXACT_MATCH_LENIENT, EXACT_MATCH_BEST, *sampled, "pass@1_lenient",
            EXACT_MATCH_TRAIN, "pass@1_train")


def score(experiment: Experiment, setup: str, benchmark: str, metric: str) -> Scores | None:
    """The table of one metric, or None if no run of the setup measured it.

    Only problems on which every seed was scored are included.
    """
    checkpoint = "best" if metric == EXACT_MATCH_BEST else "last"
    part = "train" if metric.endswith("_train") else "test"
    columns: list[tuple[Run, Answers, np.ndarray]] = []
    for run in experiment.of(setup):
        answers = run.answers_of(checkpoint, part, benchmark)
        values = None if answers is None else _values(answers, metric)
        if values is not None:
            columns.append((run, answers, values))
    if not columns:
        return None
    common = set(columns[0][1].ids).intersection(*(answers.ids for _, answers, _ in columns))
    if not common:
        return None
    ids = tuple(name for name in columns[0][1].ids if name in common)
    rows = [values[[name in common for name in answers.ids]] for _, answers, values in columns]
    largest = max(len(answers.ids) for _, answers, _ in columns)
    return Scores(tuple(run.seed for run, _, _ in columns), ids, np.stack(rows), largest - len(ids))


def paired_family(pairs: Iterable[tuple[Key, Scores | None, Scores | None]]
                  ) -> dict[Key, tuple[Difference, float]]:
    """{key: (first minus second, paired over their common problems; p after Holm's correction)}.

    All pairs form one Holm family. Pairs without scores or common problems are left out.
    """
    found = {}
    for key, first, second in pairs:
        shared = sorted(set(first.ids) & set(second.ids)) if first and second else []
        if shared:
            found[key] = paired_difference(first.at(shared), second.at(shared))
    adjusted = holm(difference.p_value for difference in found.values())
    return {key: (difference, p) for (key, difference), p in zip(found.items(), adjusted,
                                                                 strict=True)}


def _values(answers: Answers, metric: str) -> np.ndarray | None:
    """(P,) shares of one run, None if they were not measured."""
    name = metric.removesuffix("_train")
    if name in (EXACT_MATCH, EXACT_MATCH_BEST):
        return answers.strict.astype(float)
    if name == EXACT_MATCH_LENIENT:
        return answers.lenient.astype(float)
    k = int(name.removeprefix("pass@").removesuffix("_lenient"))
    right = answers.right_lenient if name.endswith("_lenient") else answers.right
    return pass_at_k(answers.samples, right, k) if k <= answers.samples else None

"""Reads the records of finished runs; nothing here needs torch.

A run that is not finished, or whose record is broken, is left out with a note.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.presets import current_keys
from ..problems.benchmarks import BENCHMARKS, get_benchmark
from ..problems.problem import Benchmark
from ..records.folders import is_plain_name
from ..records.run_folder import RunFolder
from ..setups import SETUPS, paper_setups
from ..system.errors import UserError
from .text import literal

PAPER_MODEL = "Qwen2.5-0.5B"
NOT_RECORDED = object()  # equals nothing


class BrokenRecord(Exception):
    """A file of a run cannot be read; the message names it."""


@dataclass(frozen=True)
class Answers:
    """A run's verdicts on P problems: one checkpoint, one part, one benchmark, by ascending id."""

    ids: tuple[str, ...]
    strict: np.ndarray  # (P,) bool, greedy
    lenient: np.ndarray  # (P,) bool, greedy
    finished: np.ndarray  # (P,) bool, the greedy answer ended with EOS
    tokens: np.ndarray  # (P,) length of the greedy answer
    samples: int  # m, 0 if nothing was sampled
    right: np.ndarray  # (P,) how many of m samples are correct, strict
    right_lenient: np.ndarray  # (P,)


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run; two runs are equal only if they are the same object."""

    setup: str
    seed: int
    config: dict[str, Any]
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    probe: list[dict[str, Any]]
    answers: dict[tuple[str, str, str], Answers]  # (checkpoint, part, benchmark)

    def answers_of(self, checkpoint: str, part: str, benchmark: str) -> Answers | None:
        """The run's verdicts, or None if they were not measured.

        If the best checkpoint is the last one, it is recorded as `last` only.
        """
        found = self.answers.get((checkpoint, part, benchmark))
        if found is None and checkpoint == "best" and self.last_is_best:
            return self.answers.get(("last", part, benchmark))
        return found

    @property
    def last_is_best(self) -> bool:
        """Whether the last checkpoint was best on validation; False without validation."""
        best = self.manifest.get("best_on_validation") or {}
        return (best.get("strict", -1.0) >= 0.0
                and best.get("step") == self.manifest.get("steps", NOT_RECORDED))


@dataclass(frozen=True)
class Experiment:
    """The finished runs of one folder, and what is missing."""

    name: str
    runs: tuple[Run, ...]
    notes: tuple[str, ...]

    @property
    def setups(self) -> tuple[str, ...]:
        """Setups with a finished run, in the order of Table 2, then others."""
        return tuple(dict.fromkeys(run.setup for run in self.runs))

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """Benchmarks that were scored, known ones first."""
        found = {key[2] for run in self.runs for key in run.answers}
        known = [name for name in BENCHMARKS if name in found]
        return (*known, *sorted(found - set(known)))

    def of(self, setup: str) -> tuple[Run, ...]:
        """The runs of a setup by ascending seed."""
        return tuple(run for run in self.runs if run.setup == setup)


def setup_title(name: str) -> str:
    """A setup's title; its name if it is unknown."""
    return SETUPS[name].title if name in SETUPS else name


def benchmark_title(name: str) -> Benchmark:
    """The benchmark, for its titles; an unknown one has its name as title."""
    return BENCHMARKS.get(name) or Benchmark(name, name, None, lambda: get_benchmark(name).load())


def paper_value(setup: str, benchmark: str) -> float | None:
    """The paper's exact match in percent, or None if it has no such cell."""
    if setup not in SETUPS:
        return None
    return SETUPS[setup].paper.get(benchmark_title(benchmark).paper_key)


def load_experiment(folder: Path) -> Experiment:
    """Every finished run below `folder` (<setup>/seed-<n>/).

    Raises:
        UserError: there is no such folder, or no finished run in it.
    """
    folder = Path(folder)
    name = re.sub(r"[^\w .+-]", "_", folder.resolve().name)  # it becomes part of pages
    if not folder.is_dir():
        raise UserError(f"There is no experiment folder {folder}; train a setup first, for example "
                        "with `hybridrl run sft`.")
    runs, notes = [], []
    for path in sorted(folder.glob("*/seed-*"), key=_run_order):
        label = f"{literal(path.parent.name)}, seed {literal(path.name.removeprefix('seed-'))}"
        try:
            run = _load_run(path)
        except BrokenRecord as error:
            notes.append(f"Left out: {label} ({literal(error)}).")
            continue
        if run is None:
            notes.append(f"Left out: {label} (the run is not finished).")
        else:
            runs.append(run)
    if not runs:
        raise UserError(f"No finished run in {folder}; train a setup first, for example with "
                        f"`hybridrl run sft --experiment {name}`.")
    notes += _missing(runs)
    return Experiment(name, tuple(runs), tuple(notes))


def _run_order(path: Path) -> tuple[int, str, int, str]:
    """Setups in the order of Table 2, then others; seeds as numbers."""
    known = sorted(SETUPS, key=lambda name: not SETUPS[name].in_paper)
    setup, seed = path.parent.name, path.name.removeprefix("seed-")
    place = known.index(setup) if setup in known else len(known)
    return place, setup, int(seed) if seed.isdecimal() else -1, seed


def _missing(runs: list[Run]) -> list[str]:
    """Notes on missing setups, and on seeds that only some setups have."""
    present = {run.setup for run in runs}
    notes = []
    absent = [setup_title(name) for name in paper_setups() if name not in present]
    if absent:
        notes.append("No finished run of: " + ", ".join(absent).rstrip(".") + ".")
    trained = {name for name in present if name != "base"}
    seeds = {name: {run.seed for run in runs if run.setup == name} for name in trained}
    everything = set().union(*seeds.values())
    for name in [name for name in dict.fromkeys(run.setup for run in runs) if name in trained]:
        gone = sorted(everything - seeds[name])
        if gone:
            notes.append(f"{setup_title(name)} lacks seed{'s' if len(gone) > 1 else ''} "
                         + ", ".join(map(str, gone)) + ", which other setups have.")
    return notes


def _load_run(folder: Path) -> Run | None:
    """The run of a folder, or None if it is not finished.

    Raises:
        BrokenRecord: a file cannot be read.
    """
    record = RunFolder(folder)
    try:
        manifest = record.read("manifest.json")
        if manifest is None or manifest.get("complete") is not True:
            return None
        seed = folder.name.removeprefix("seed-")
        if not seed.isdecimal():
            raise BrokenRecord(f"{folder.name} is not the folder of a seed")
        if not is_plain_name(folder.parent.name):
            raise BrokenRecord("its folder is not named like a setup")
        for name in record.altered():
            raise BrokenRecord(f"{name} differs from the checksum in its manifest")
        config = record.read("config.json") or {}
        if "settings" in config:
            config["settings"] = current_keys(config["settings"])
        if isinstance(manifest.get("tokens"), dict):  # "behaviour" in records of numerics version 2
            manifest["tokens"] = {name.replace("behaviour", "behavior"): count
                                  for name, count in manifest["tokens"].items()}
        return Run(
            setup=folder.parent.name, seed=int(seed), manifest=manifest, config=config,
            metrics=_read_steps(record, "metrics.jsonl"), probe=_read_steps(record, "probe.jsonl"),
            answers=_read_answers(record, "eval.jsonl"))
    except UserError as error:
        raise BrokenRecord(str(error)) from None


def _read_steps(record: RunFolder, name: str) -> list[dict[str, Any]]:
    """The lines of a log over training, each with a step and an epoch."""
    lines = record.lines(name)
    for line in lines:
        if not all(isinstance(line.get(key), int | float) for key in ("step", "epoch")):
            raise BrokenRecord(f"a line of {name} has no step or no epoch")
        if line.get("stage") and not is_plain_name(line["stage"]):
            raise BrokenRecord(f"a line of {name} has a malformed stage")
    return lines


def _read_answers(record: RunFolder, name: str) -> dict[tuple[str, str, str], Answers]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in record.lines(name):
        try:
            key = (line["checkpoint"], line["part"], line["benchmark"])
        except KeyError as missing:
            raise BrokenRecord(f"a line of {name} has no {missing}") from None
        if not all(map(is_plain_name, key)):  # they become headings, titles and cells
            raise BrokenRecord(f"a line of {name} has a malformed benchmark")
        groups.setdefault(key, []).append(line)
    try:
        return {key: _gather(lines) for key, lines in groups.items()}
    except (KeyError, TypeError) as error:
        raise BrokenRecord(f"a line of {name} lacks a verdict: {error}") from None
    except ValueError as error:
        raise BrokenRecord(f"{name}: {error}") from None


def _gather(lines: list[dict[str, Any]]) -> Answers:
    """Columns from lines, by ascending id, so that all runs have the same order."""
    lines = sorted(lines, key=lambda line: str(line["id"]))
    ids = tuple(str(line["id"]) for line in lines)
    if len(set(ids)) < len(ids):
        raise ValueError("a problem is scored twice")

    def greedy(key: str, kind: type) -> np.ndarray:
        return np.array([line["greedy"][key] for line in lines], dtype=kind)

    drawn = [line.get("samples") or {"strict": [], "lenient": []} for line in lines]
    counts = {len(verdicts["strict"]) for verdicts in drawn}
    if len(counts) > 1:
        raise ValueError("the number of samples differs between problems")
    return Answers(
        ids=ids, strict=greedy("strict", bool), lenient=greedy("lenient", bool),
        finished=greedy("finished", bool), tokens=greedy("tokens", int), samples=counts.pop(),
        right=np.array([sum(map(int, verdicts["strict"])) for verdicts in drawn]),
        right_lenient=np.array([sum(map(int, verdicts["lenient"])) for verdicts in drawn]))


def series(run: Run, log: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the lines of `probe` or `metrics` that hold a finite `key`."""
    lines = run.probe if log == "probe" else run.metrics
    pairs = [(float(line["epoch"]), float(line[key])) for line in lines
             if isinstance(line.get(key), int | float) and math.isfinite(line[key])]
    return (np.array([epoch for epoch, _ in pairs]), np.array([value for _, value in pairs]))


def stage_change(run: Run) -> float | None:
    """The epoch at which the second stage starts, or None for a run of one stage.

    It is the epoch of the first stage's last step, or of its last probe if steps were not logged.
    """
    for log in (run.metrics, run.probe):
        stages = [(line["stage"], float(line["epoch"])) for line in log
                  if line.get("stage") and line["step"] > 0]
        names = list(dict.fromkeys(stage for stage, _ in stages))
        if len(names) > 1:
            return max(epoch for stage, epoch in stages if stage == names[0])
    return None


def probe_problems(experiment: Experiment) -> str:
    """How many problems of each benchmark the probe samples; "" if unknown.

    The probe takes validation problems from the benchmarks in turn.
    """
    def counted(run: Run) -> str:
        settings, data = run.config.get("settings") or {}, run.manifest.get("data") or {}
        prompts = (settings.get("probe") or {}).get("prompts", 0)
        there = {name: ((data.get(name) or {}).get("problems") or {}).get("validation", 0)
                 for name in (settings.get("data") or {}).get("benchmarks") or data}
        in_turn = [name for turn in range(max(there.values(), default=0))
                   for name, count in there.items() if turn < count][:prompts]
        return ", ".join(f"{in_turn.count(name)} of {benchmark_title(name).title}"
                         for name in there if in_turn)

    return " / ".join(agreed(experiment.runs, counted))


def agreed(runs: Iterable[Run], value: Callable[[Run], Any]) -> list[str]:
    """The distinct values over runs, as sorted text; one entry if they agree."""
    found = (value(run) for run in runs)
    return sorted({str(entry) for entry in found if entry not in (None, "", [], {})})

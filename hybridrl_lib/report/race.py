"""Training steps until each setup's probe reward reaches a threshold."""

import math
from dataclasses import dataclass

import numpy as np

from .loading import Experiment, Run, probe_problems, setup_title
from .text import NOTHING, bullets, csv_text, markdown_table, number

COLUMNS = ("setup", "threshold", "seeds", "reached", "steps", "steps_low", "steps_high", "epochs",
           "epochs_low", "epochs_high")


@dataclass(frozen=True)
class Progress:
    """One line of steps_to_threshold.csv: when each seed reached the threshold, if it did."""

    setup: str
    seeds: int
    steps: tuple[int, ...]
    epochs: tuple[float, ...]


@dataclass(frozen=True)
class Race:
    """All setups against one threshold, a mean probe reward."""

    threshold: float
    start: float
    best: str
    end: float
    setups: tuple[Progress, ...]


def make_race(experiment: Experiment, threshold: float | None = None) -> Race | None:
    """Steps and epochs until the probe reward reaches `threshold`, or None without probes.

    A seed reaches it at the first probe at or above the threshold that is the last one or is
    followed by another such probe. A single crossing would favor setups that are probed more often,
    since probes are noisy.

    The default threshold is halfway between the mean reward at step 0 and the highest mean reward
    of a setup at the end of training.
    """
    rewards = {run: probe for run in experiment.runs
               if run.setup != "base" and len(probe := _rewards(run)) > 1}
    if not rewards:
        return None
    start = float(np.mean([probe[0][2] for probe in rewards.values()]))
    ends = {setup: float(np.mean([probe[-1][2] for run, probe in rewards.items()
                                  if run.setup == setup]))
            for setup in dict.fromkeys(run.setup for run in rewards)}
    best = max(ends, key=ends.__getitem__)
    goal = (start + ends[best]) / 2.0 if threshold is None else threshold
    setups = []
    for setup in ends:
        own = [probe for run, probe in rewards.items() if run.setup == setup]
        reached = [entry for probe in own if (entry := _arrival(probe, goal)) is not None]
        setups.append(Progress(setup, len(own), tuple(step for step, _ in reached),
                               tuple(epoch for _, epoch in reached)))
    return Race(goal, start, best, ends[best], tuple(setups))


def _rewards(run: Run) -> list[tuple[int, float, float]]:
    """(step, epoch, reward) of the run's probes."""
    return [(int(line["step"]), float(line["epoch"]), float(line["reward"])) for line in run.probe
            if isinstance(line.get("reward"), int | float) and math.isfinite(line["reward"])]


def _arrival(probe: list[tuple[int, float, float]], goal: float) -> tuple[int, float] | None:
    """Step and epoch of the first of two probes in a row at the goal, None if there are none."""
    # the goal is a mean; a reward equal to it must not miss it by rounding
    there = [reward >= goal - 1e-9 for *_, reward in probe]
    for index, (step, epoch, _) in enumerate(probe):
        if all(there[index:index + 2]):
            return step, epoch
    return None


def race_csv(race: Race) -> str:
    """Mean, lowest, and highest over the seeds that reached the threshold."""
    rows = []
    for p in race.setups:
        ranges = [*_range(p.steps, 1), *_range(p.epochs, 2)]
        rows.append((p.setup, number(race.threshold, 4), p.seeds, len(p.steps), *ranges))
    return csv_text(COLUMNS, rows)


def _range(values: tuple[float, ...], digits: int) -> list[str]:
    if not values:
        return ["", "", ""]
    return [number(float(value), digits) for value in (np.mean(values), min(values), max(values))]


def race_markdown(experiment: Experiment, race: Race) -> str:
    """The table with its notes."""
    problems = probe_problems(experiment)
    rows = []
    for p in race.setups:
        steps, epochs = _range(p.steps, 0), _range(p.epochs, 1)
        said = [f"{mean} ({low} to {high})" if mean else NOTHING
                for mean, low, high in (steps, epochs)]
        reached = f"{len(p.steps)} of {p.seeds}" if p.steps else "none"
        rows.append([setup_title(p.setup), reached, *said])
    return "\n".join((
        f"# Steps to a reward threshold, experiment `{experiment.name}`\n",
        f"Threshold: a probe reward of {number(race.threshold, 3)} "
        f"(before training {number(race.start, 3)}; best at the end {number(race.end, 3)}, "
        f"{setup_title(race.best)}).\n",
        markdown_table(["setup", "seeds that reach it", "steps: mean (lowest to highest)",
                        "epochs: mean (lowest to highest)"], rows, (2, 3)),
        bullets(filter(None, (
            "The first of two consecutive probes at or above the threshold. A probe samples "
            "answers to the same validation prompts for every setup; it is noisy.",
            problems and "The probe's prompts are validation problems, taken from the benchmarks "
                         f"in turn: {problems}.",
            "Means are over the seeds that reach it, so a mean over fewer seeds is too favorable.",
            "A step of SFT is one batch. A step of RL is one batch of rollouts with all its "
            "optimizer updates. They differ in cost, and in number per epoch.")))))

"""Trains a setup with several values of one setting, all else equal: `hybridrl sweep`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from ..config.fields import as_number, show
from ..config.presets import (
    default_experiment,
    get_setup,
    load_settings,
    resolve_preset,
    split_overrides,
)
from ..records.folders import experiment_folder, from_here
from ..records.locks import only_writer
from ..report.sweeps import report_sweep
from ..system.errors import UsageError, unknown
from .cluster import connect
from .plan import Plan, default_jobs, gpus_for, only_runs, run_job, work_and_write
from .tuning import learning_rates


@dataclass(frozen=True)
class Sweep:
    """A parameter that can be swept.

    Attributes:
        title: label of the figure's axis.
        setup: the setup in which it is swept.
        keys: the settings that take the value; empty for all learning rates of the setup.
        values: default values; empty if only the user can know them.
        times: whether a value is a factor of the preset's.
    """

    title: str
    setup: str
    keys: tuple[str, ...]
    values: tuple[str, ...] = ()
    times: bool = False


SWEEPS: dict[str, Sweep] = {
    "beta": Sweep("β, weight of the KL divergence", "sft_then_rl", ("rl.beta",),
                  ("0", "0.01", "0.02", "0.05", "0.1", "0.2")),
    "gamma": Sweep("γ, weight of the entropy, times the preset's", "sft_then_rl_entropy",
                   ("sft.gamma", "rl.gamma"), ("0", "0.3", "1", "3"), times=True),
    "clip_range": Sweep("ε, clip range of the ratio", "sft_then_rl",
                        ("rl.epsilon_low", "rl.epsilon_high"), ("0.05", "0.1", "0.2", "0.4")),
    "group_size": Sweep("G, completions per problem", "sft_then_rl", ("rl.group_size",),
                        ("2", "4", "8", "16")),
    "lambda": Sweep("λ, weight of the SFT loss", "combined", ("combined.first", "combined.last"),
                    ("0", "0.1", "0.3", "0.5", "0.7", "0.9", "1")),
    "learning_rate": Sweep("learning rates, times the preset's", "sft_then_rl", (),
                           ("0.25", "0.5", "1", "2", "4"), times=True),
    "updates_per_rollout": Sweep("updates per batch of rollouts", "sft_then_rl",
                                 ("rl.updates_per_rollout",), ("1", "2", "4")),
    "advantage_scale": Sweep("scale of the advantage", "sft_then_rl", ("rl.advantage_scale",),
                             ("group_std", "none")),
    "reward": Sweep("reward", "sft_then_rl", ("rl.reward",), ("answer", "answer_and_steps")),
    "base": Sweep("base model", "sft_then_rl", ("model.path",)),
    "split": Sweep("seed of the split", "sft_then_rl", ("data.split_seed",), ("0", "1", "2")),
}


def sweep(parameter: str, values: Sequence[str] = (), preset: str = "tiny",
          seeds: Sequence[int] = (0,), setup: str | None = None, jobs: int | None = None,
          experiment: str | None = None, settings: Sequence[str] = (), say=None,
          executor: str = "local") -> list[Path]:
    """Trains and tests a setup with each value, then writes sweep.csv, sweep.md, and a figure.

    Args:
        parameter: a key of `SWEEPS`.
        values: as in `--set`; default: the parameter's own list.
        setup: default: the parameter's own.
        preset, seeds, jobs, experiment, settings, say, executor: as in `compare`; the default
            experiment is the preset's name with `-sweep-` and the parameter (and the setup, if it
            is not the parameter's own). Every value has a folder whose name starts with it.

    Returns:
        The files of the sweep.

    Raises:
        UserError: a run failed, after all others have run.
        UsageError: unknown parameter, or a value that its settings do not take.
    """
    say = say or (lambda line: print(line, flush=True))
    if parameter not in SWEEPS:
        raise unknown("parameter", parameter, SWEEPS)
    chosen, preset = SWEEPS[parameter], resolve_preset(preset)
    values = tuple(dict.fromkeys(values or chosen.values))
    if not values:
        raise UsageError(f"The parameter {parameter} has no default values; give them with "
                         "--values.")
    folders = [part_of(value) for value in values]
    if twice := [value for value in values if folders.count(part_of(value)) > 1]:
        raise UsageError(f"The values {' and '.join(twice)} would share a folder, whose name is "
                         "the last part of a path; rename one, or sweep them into separate "
                         "experiments.")
    arm, cluster = get_setup(setup or chosen.setup), connect(executor)
    own = "" if arm.name == chosen.setup else f"-{arm.name}"
    settings, seeds = tuple(split_overrides(settings)), tuple(dict.fromkeys(seeds))
    gpus = gpus_for(preset, settings)
    plan = Plan(preset, settings, (arm,), seeds, (1.0,),
                experiment or f"{default_experiment(preset)}-sweep-{parameter}{own}", (),
                jobs or default_jobs(preset, len(values) * len(seeds), gpus, cluster), cluster)
    given = {value: (*plan.settings, *as_settings(plan, chosen, value)) for value in values}
    for texts in given.values():  # refused here, once, rather than in every run
        load_settings(preset, texts, setup=arm)
    folder = experiment_folder(plan.experiment)
    with only_writer(folder, f"The experiment {plan.experiment}"):
        runs = [run_job(plan, arm, seed, place(plan, value), texts)
                for value, texts in given.items() for seed in seeds]
        say(f"{len(runs)} runs of {arm.name}: {parameter} = {', '.join(values)}, {plan.jobs} at a "
            f"time, into {from_here(folder)}*; Ctrl-C stops, and the same command resumes")
        return work_and_write(plan, runs, say, lambda: write_sweep(plan, parameter, values, say))


def as_settings(plan: Plan, chosen: Sweep, value: str) -> tuple[str, ...]:
    """`key=value` of every setting that a value stands for."""
    if not chosen.times:
        return tuple(f"{key}={value}" for key in chosen.keys)
    factor = as_number(float, value)
    if factor is None or factor < 0:
        raise UsageError(f"{value!r} is not a factor; {chosen.title.split(', times')[0]} takes "
                         "non-negative factors of the preset's values.")
    preset = load_settings(plan.preset, plan.settings, setup=plan.arms[0])
    own = {key: attrgetter(key)(preset) for key in chosen.keys} or learning_rates(preset)
    return tuple(f"{key}={show(value * factor)}" for key, value in own.items())


def place(plan: Plan, value: str) -> str:
    """The experiment of one value."""
    return f"{plan.experiment}-{part_of(value)}"


def part_of(value: str) -> str:
    """A value as part of a folder's name; of a path, its last part."""
    return re.sub(r"[^\w.+-]", "_", Path(value).name or value)


def write_sweep(plan: Plan, parameter: str, values: Sequence[str],
                say: Callable[[str], None]) -> list[Path]:
    """Writes table and figure from the records and prints the table."""
    folder = experiment_folder(plan.experiment)
    experiments = {value: only_runs(plan, experiment_folder(place(plan, value))) for value in values
                   if any(experiment_folder(place(plan, value)).glob("*/seed-*/manifest.json"))}
    experiments = {value: found for value, found in experiments.items() if found.runs}
    if not experiments:
        return []
    files, table = report_sweep(folder, parameter, SWEEPS[parameter].title, plan.arms[0].name,
                                experiments)
    say("\n" + table)
    say(f"\n{len(files)} files in {from_here(folder)}; start with sweep.md.")
    return files

"""`hybridrl compare`: tunes every arm in the same way, then trains and tests it with equal seeds.

An arm is a setup. Its learning rates are the preset's times one factor of a small grid, the same
grid for all arms; the factor is chosen on validation problems with two seeds that are used for
nothing else. The table shows what each arm used: rollouts, optimizer updates, demonstration tokens.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ..config.methods import METHODS
from ..config.presets import (
    default_experiment,
    load_settings,
    parse_overrides,
    resolve_preset,
    split_overrides,
)
from ..records.folders import experiment_folder, from_here
from ..records.locks import only_writer
from ..report.arm_tables import report_arms
from ..report.arms import make_arms
from ..setups import SETUPS, Setup, paper_setups
from ..system.errors import UsageError, UserError, unknown
from .cluster import Cluster, connect
from .plan import (
    Plan,
    default_jobs,
    given,
    gpus_for,
    only_runs,
    own_settings,
    run_job,
    seeds_of,
    work_and_write,
)
from .tuning import DEVELOPMENT_SEEDS, Tuned, greedy_alone, rates, tune

BASELINE = "sft_then_rl"
# The controls that claims need: all of RL after SFT, PEAR's demonstrations without weights, and
# SuperRL without SFT.
CONTROLS = ("sft_then_full_rl", "sft_sampled_then_rl", "superrl_drop")
VARIANTS = ("combined_cosine",)  # variants that change what a method is: here its lambda moves
GRID = (0.0625, 0.25, 1.0)  # at `tiny` most arms do best in the middle
TRANSFER = 2  # seeds
ALL = 1_000_000_000  # problems: no benchmark has more


def compare(preset: str = "tiny", seeds: Sequence[int] = (0,), methods: Sequence[str] = (),
            grid: Sequence[float] = GRID, transfer: int = TRANSFER, jobs: int | None = None,
            experiment: str | None = None, settings: Sequence[str] = (), say=None,
            executor: str = "local") -> list[Path]:
    """Tunes, trains, and tests all arms, then writes the comparison.

    Args:
        preset: a preset's name, or `auto`.
        seeds: of every arm.
        methods: setups, or methods, which stand for their main setup and its control; default: the
            paper's setups, all of RL after SFT, and all methods.
        grid: factors of the preset's learning rates.
        transfer: for how many of the seeds every arm is also trained on each benchmark alone and
            tested on all; 0 for none.
        jobs, experiment, settings, say, executor: as in `reproduce`; the default experiment is the
            preset's name with `-compare`.

    Returns:
        The files of the comparison.

    Raises:
        UserError: a run failed (after all others have run), or nothing can be tuned.
        Stopped: by Ctrl-C; the same command resumes.
    """
    say = say or (lambda line: print(line, flush=True))
    plan = make_plan(preset, seeds, methods, grid, jobs, experiment, settings, connect(executor))
    folder = experiment_folder(plan.experiment)
    for sentence in kept_settings(plan):
        say(sentence)
    with only_writer(folder, f"The experiment {plan.experiment}"):
        factors, tuned = tune(plan, say)
        runs = [run_job(plan, arm, seed, plan.experiment,
                        (*given(arm, plan.settings), *rates(plan, arm, factors[arm.name])))
                for arm in plan.arms for seed in seeds_of(plan, arm)]
        alone = [run_job(plan, arm, seed, only(plan, benchmark),
                         (*given(arm, plan.settings), *rates(plan, arm, factors[arm.name]),
                          *trained_on(plan, benchmark), *greedy_alone(arm)))
                 for benchmark in (plan.benchmarks if transfer and len(plan.benchmarks) > 1 else ())
                 for arm in plan.arms if arm.stages for seed in plan.seeds[:transfer]]
        say(f"{len(runs) + len(alone)} runs of {len(plan.arms)} arms, "
            f"{plan.jobs} at a time, into {from_here(folder)}; Ctrl-C stops, and the same command "
            "resumes")
        return work_and_write(plan, runs + alone, say,
                              lambda: write_comparison(plan, factors, tuned, say))


def make_plan(preset: str, seeds: Sequence[int], methods: Sequence[str], grid: Sequence[float],
              jobs: int | None, experiment: str | None, settings: Sequence[str],
              cluster: Cluster | None = None) -> Plan:
    """The plan, or the error for what cannot be compared."""
    preset, arms = resolve_preset(preset), choose_arms(methods)
    settings = tuple(split_overrides(settings))
    known = {arm.method for arm in arms}
    for section in dict.fromkeys(text.partition(".")[0].strip() for text in settings):
        if section in METHODS and section not in known:
            raise UsageError(f"No arm has the settings {section}.*, which belong to the method "
                             f"{section}; omit them, or add {section} to --methods.")
    for arm in arms:  # refuses impossible settings here, once, rather than in every run
        load_settings(preset, given(arm, settings), setup=arm)
    seeds, grid = tuple(dict.fromkeys(seeds)), tuple(sorted(set(grid)))
    if not grid or not all(math.isfinite(factor) and factor > 0 for factor in grid):
        raise UsageError("--grid takes one or more positive factors of the learning rates, such as "
                         "0.5,1,2.")
    reserved = sorted(set(seeds) & set(DEVELOPMENT_SEEDS))
    if reserved and len(grid) > 1:
        raise UsageError(f"The seed {reserved[0]} is reserved for choosing learning rates; use "
                         "another, so that no arm is tested with a seed it was tuned with.")
    count = (len(arms) - 1) * len(seeds) + 1
    gpus = gpus_for(preset, settings)
    return Plan(preset, settings, arms, seeds, grid,
                experiment or f"{default_experiment(preset)}-compare",
                load_settings(preset, settings).data.benchmarks,
                jobs or default_jobs(preset, count, gpus, cluster), cluster)


def choose_arms(names: Sequence[str]) -> tuple[Setup, ...]:
    """The arms that names stand for, with the base model and the baseline, in the tables' order.

    Raises:
        UsageError: a name is neither a setup's nor a method's.
    """
    first = {setup.method: name for name, setup in reversed(SETUPS.items())}
    shown = {name for name, setup in SETUPS.items() if setup.notebook}
    usual = {*paper_setups(), *CONTROLS, *VARIANTS, *first.values(), *shown}
    wanted = {"base", BASELINE} | (set() if names else usual)
    for name in names:
        found = {name} & set(SETUPS) | {one for one in usual if SETUPS[one].method == name}
        if not found:
            raise unknown("setup or method", name, [*SETUPS, *METHODS])
        wanted |= found
    return tuple(setup for name, setup in SETUPS.items() if name in wanted)


def kept_settings(plan: Plan) -> list[str]:
    """Sentences on the arms that keep a defining setting although the comparison sets another."""
    found = []
    for arm in plan.arms:
        asked, fixed = parse_overrides(own_settings(arm, plan.settings)), parse_overrides(
            arm.settings)
        own = [text for text in arm.settings if (key := text.partition("=")[0]) in asked
               and asked[key] != fixed[key]]
        if own:
            found.append(f"{arm.name} keeps {', '.join(own)}, which defines {arm.title}")
    return found


# Transfer -----------------------------------------------------------------------------------------


def only(plan: Plan, benchmark: str) -> str:
    """The experiment of arms that were trained on one benchmark."""
    return f"{plan.experiment}-only-{benchmark}"


def trained_on(plan: Plan, benchmark: str) -> tuple[str, ...]:
    """The settings that only keep one benchmark's training and validation problems."""
    data = load_settings(plan.preset, plan.settings).data
    return tuple(
        f"data.{name}=" + ",".join(
            str(limit if own == benchmark else 0) for own, limit in zip(
                plan.benchmarks, getattr(data, name) or (ALL,) * len(plan.benchmarks), strict=True))
        for name in ("train_limits", "validation_limits"))


# The comparison -----------------------------------------------------------------------------------


def write_comparison(plan: Plan, factors: dict[str, float], tuned: Sequence[Tuned],
                     say: Callable[[str], None]) -> list[Path]:
    """Writes tables and figures from the records and prints the main table."""
    folder = experiment_folder(plan.experiment)
    experiment = only_runs(plan, folder)
    if not experiment.runs:
        raise UserError(f"No run of the comparison in {from_here(folder)} is finished.")
    arms = make_arms(experiment, BASELINE, factors)
    alone = {benchmark: only_runs(plan, experiment_folder(only(plan, benchmark)))
             for benchmark in experiment.benchmarks
             if any(experiment_folder(only(plan, benchmark)).glob("*/seed-*/manifest.json"))}
    alone = {benchmark: found for benchmark, found in alone.items() if found.runs}
    files, table = report_arms(folder, experiment, arms, BASELINE, tuned, alone)
    say("\n" + table)
    say(f"\n{len(files)} files in {from_here(folder)}; start with comparison.md.")
    return files

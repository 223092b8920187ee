"""Every arm tuned alike, then trained and tested with the same seeds: `hybridrl compare`.

An arm is a setup. Its learning rates are the preset's times one factor of a small grid, the same
for all arms; the factor is chosen on validation problems with two seeds that are used for nothing
else. What each arm then used (rollouts, optimizer updates, demonstration tokens) is in the table.
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
# What a claim has to be held against: all of RL after SFT, PEAR's demonstrations unweighted, and
# SuperRL's problems for SFT left out.
CONTROLS = ("sft_then_full_rl", "sft_sampled_then_rl", "superrl_drop")
VARIANTS = ("combined_cosine",)  # that change what a method is: here its lambda moves
GRID = (0.0625, 0.25, 1.0)  # at `tiny` most arms do best in the middle
TRANSFER = 2  # seeds
ALL = 1_000_000_000  # problems: no benchmark has more


def compare(preset: str = "tiny", seeds: Sequence[int] = (0,), methods: Sequence[str] = (),
            grid: Sequence[float] = GRID, transfer: int = TRANSFER, jobs: int | None = None,
            experiment: str | None = None, settings: Sequence[str] = (), say=None,
            executor: str = "local") -> list[Path]:
    """Tunes, trains and tests all arms, then writes the comparison.

    Args:
        preset: a preset's name, or `auto`.
        seeds: of every arm.
        methods: setups, or methods for those of its setups that are compared unless told
            otherwise, its control among them; unless given the paper's setups, RL's whole budget
            after SFT, and of every method the setup that stands for it and its control.
        grid: factors that the preset's learning rates are multiplied with.
        transfer: with how many of the seeds every arm is also trained on each benchmark alone and
            tested on all; 0 for none.
        jobs, experiment, settings, say, executor: as for `reproduce`; the experiment is the
            preset's name with `-compare` unless given.

    Returns:
        The files of the comparison.

    Raises:
        UserError: a run failed (after all others were run), or nothing can be tuned.
        Stopped: by Ctrl-C; the same command goes on.
    """
    say = say or (lambda line: print(line, flush=True))
    plan = make_plan(preset, seeds, methods, grid, jobs, experiment, settings, connect(executor))
    folder = experiment_folder(plan.experiment)
    for sentence in kept(plan):
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
            "goes on")
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
            raise UsageError(f"No arm has the settings {section}.*, which are those of the method "
                             f"{section}; leave them out, or add {section} to --methods.")
    for arm in arms:  # refuses impossible settings here, once, rather than in every run
        load_settings(preset, given(arm, settings), setup=arm)
    seeds, grid = tuple(dict.fromkeys(seeds)), tuple(sorted(set(grid)))
    if not grid or not all(math.isfinite(factor) and factor > 0 for factor in grid):
        raise UsageError("The grid of learning rates is one or more factors above 0, such as "
                         "0.5,1,2.")
    reserved = sorted(set(seeds) & set(DEVELOPMENT_SEEDS))
    if reserved and len(grid) > 1:
        raise UsageError(f"The seed {reserved[0]} is one that learning rates are chosen with; take "
                         "another, so that no arm is tested with what it was tuned on.")
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


def kept(plan: Plan) -> list[str]:
    """Sentences on the arms that keep a setting of their own against the comparison's."""
    found = []
    for arm in plan.arms:
        asked, fixed = parse_overrides(own_settings(arm, plan.settings)), parse_overrides(
            arm.settings)
        own = [text for text in arm.settings if (key := text.partition("=")[0]) in asked
               and asked[key] != fixed[key]]
        if own:
            found.append(f"{arm.name} keeps {', '.join(own)}, which makes it {arm.title}")
    return found


# Transfer -----------------------------------------------------------------------------------------


def only(plan: Plan, benchmark: str) -> str:
    """The experiment of arms that were trained on one benchmark."""
    return f"{plan.experiment}-only-{benchmark}"


def trained_on(plan: Plan, benchmark: str) -> tuple[str, ...]:
    """The settings that leave one benchmark's training and validation problems; all are tested."""
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
    from ..report.arm_tables import report_arms
    from ..report.arms import make_arms

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

"""Every arm tuned alike, then trained and tested with the same seeds: `hybridrl compare`.

An arm is a setup. Its learning rates are the preset's times one factor of a small grid, the same
for all arms; the factor is chosen on validation problems with two seeds that are used for nothing
else. What each arm then used (rollouts, optimiser updates, demonstration tokens) is in the table.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from .cluster import Cluster, connect
from .config import (
    MEMORY_ALONE,
    Settings,
    default_experiment,
    difference,
    load_settings,
    parse_overrides,
    resolve_preset,
    sections_of,
    settings_from_dict,
    show,
    split_overrides,
)
from .errors import Stopped, UsageError, UserError, unknown
from .jobs import Job, Queue
from .locks import only_writer
from .methods import METHODS, make_method, method_class
from .methods.method import Method
from .records import RunFolder, experiment_folder, from_here, run_folder
from .reproduce import default_jobs, gpus_for, joined, relative_cost, threads_for
from .setups import SETUPS, Setup, paper_setups

BASELINE = "sft_then_rl"
# What a claim has to be held against: all of RL after SFT, PEAR's demonstrations unweighted, and
# SuperRL's problems for SFT left out.
CONTROLS = ("sft_then_full_rl", "sft_sampled_then_rl", "superrl_drop")
VARIANTS = ("combined_cosine",)  # that change what a method is: here its lambda moves
GRID = (0.0625, 0.25, 1.0)  # at `tiny` most arms do best in the middle
DEVELOPMENT_SEEDS = (1000, 1001)
TRANSFER = 2  # seeds
# Of runs for transfer one greedy answer is asked for, and tuning runs are judged on validation
# problems alone; both are probed at their ends alone unless the method decides by its probes.
GREEDY = ("evaluation.samples=0", "evaluation.train_samples=0", "evaluation.train_limit=0")
UNPROBED = "probe.every=1000000"
ALL = 1_000_000_000  # problems: no benchmark has more


@dataclass(frozen=True)
class Tuned:
    """What one tuning run of an arm scored with its last weights on validation problems.

    Attributes:
        validation: greedy exact match, which chooses the factor.
        sampled: share of right samples in the last probe; None where there was none.
    """

    setup: str
    factor: float
    seed: int
    validation: float
    sampled: float | None = None


@dataclass(frozen=True)
class Plan:
    """What is compared, and where.

    Attributes:
        arms: setups, the base model and the baseline among them.
        seeds: of every arm but the base model, which is scored once.
        grid: factors of the learning rates.
        experiment: the folder's name; those of tuning and transfer begin with it.
        benchmarks: those that the settings train on; with transfer each is trained on alone, too.
        jobs: processes at a time.
        cluster: where they run; None for this machine.
    """

    preset: str
    settings: tuple[str, ...]
    arms: tuple[Setup, ...]
    seeds: tuple[int, ...]
    grid: tuple[float, ...]
    experiment: str
    benchmarks: tuple[str, ...]
    jobs: int
    cluster: Cluster | None = None


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


def work_and_write(plan: Plan, runs: Sequence[Job], say: Callable[[str], None],
                   write: Callable[[], list[Path]]) -> list[Path]:
    """Runs the jobs and returns the files that `write` makes of what is finished.

    Raises:
        Stopped: by Ctrl-C; nothing is written.
        UserError: a run failed; raised after the rest was run and written.
    """
    failure = None
    try:
        work(plan, runs, say)
    except Stopped:
        raise
    except UserError as error:
        failure = error
    try:
        files = write()
    except UserError as error:  # why there is nothing to show says more than that there is nothing
        raise failure or error from None
    if failure:
        raise failure
    return files


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
        make_method(arm, load_settings(preset, given(arm, settings), setup=arm))
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


def own_settings(arm: Setup, settings: Sequence[str]) -> tuple[str, ...]:
    """The settings without those of other methods, which an arm would refuse."""
    return tuple(text for text in settings
                 if text.partition(".")[0].strip() not in set(METHODS) - {arm.method})


def given(arm: Setup, settings: Sequence[str]) -> tuple[str, ...]:
    """The settings of the comparison that an arm takes: not those of other methods, nor those that
    make it what it is called, or a control would become the arm that it controls for."""
    fixed = parse_overrides(arm.settings)
    return tuple(text for text in own_settings(arm, settings)
                 if text.partition("=")[0].strip() not in fixed)


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


def seeds_of(plan: Plan, arm: Setup) -> tuple[int, ...]:
    """An arm's seeds; the base model is not trained, and one is enough."""
    return plan.seeds if arm.stages else plan.seeds[:1]


# Learning rates -----------------------------------------------------------------------------------


def rates(plan: Plan, arm: Setup, factor: float) -> tuple[str, ...]:
    """The settings that multiply an arm's learning rates."""
    if factor == 1 or not arm.stages:
        return ()
    chosen = load_settings(plan.preset, given(arm, plan.settings), setup=arm)
    return tuple(f"{key}={show(rate * factor)}" for key, rate in learning_rates(chosen).items())


def learning_rates(settings: Settings) -> dict[str, float]:
    """{section.key: rate} of all that are set, a method's own among them."""
    found = {f"{section.section}.{field.name}": getattr(section, field.name)
             for section in sections_of(settings) for field in fields(section)
             if field.name.endswith("learning_rate")}
    return {key: rate for key, rate in found.items() if rate is not None}


def tune(plan: Plan, say: Callable[[str], None]) -> tuple[dict[str, float], list[Tuned]]:
    """({arm: its factor}, every tuning run's score); with one factor there is nothing to choose."""
    if len(plan.grid) == 1:
        return {arm.name: plan.grid[0] for arm in plan.arms}, []
    trained = [arm for arm in plan.arms if arm.stages]
    jobs = {(arm.name, factor, seed): run_job(
                plan, arm, seed, f"{plan.experiment}-tuning-{factor:g}",
                (*given(arm, plan.settings), *rates(plan, arm, factor), *tuning_settings(arm)))
            for arm in trained for factor in plan.grid for seed in DEVELOPMENT_SEEDS}
    say(f"{len(jobs)} tuning runs: {len(trained)} arms, learning rates times "
        f"{', '.join(f'{factor:g}' for factor in plan.grid)}, seeds "
        f"{' and '.join(map(str, DEVELOPMENT_SEEDS))}, judged on validation problems")
    work(plan, list(jobs.values()), say)
    tuned = [tuned_by(job.record, *key) for key, job in jobs.items()]
    return {arm.name: choose(tuned, arm.name) if arm.stages else 1.0 for arm in plan.arms}, tuned


def tuning_settings(arm: Setup) -> tuple[str, ...]:
    """What a tuning run leaves out, and the method does not need."""
    return (*greedy_alone(arm), "data.test_limits=1")


def greedy_alone(arm: Setup) -> tuple[str, ...]:
    """The settings that leave out what is sampled beside training, and the method does not need."""
    reads_probes = method_class(arm.method).after_probe is not Method.after_probe
    return GREEDY if reads_probes else (*GREEDY, UNPROBED)


def tuned_by(record: RunFolder, setup: str, factor: float, seed: int) -> Tuned:
    """What the record of a tuning run says.

    Raises:
        UserError: there are no validation problems.
    """
    probe = record.lines("probe.jsonl")
    return Tuned(setup, factor, seed, last_validation(record),
                 float(probe[-1]["reward"]) if probe else None)


def last_validation(record: RunFolder) -> float:
    """Exact match of the last weights on the validation problems."""
    lines = record.lines("validation.jsonl")
    if not lines:
        raise UserError("There are no validation problems to choose learning rates with; set "
                        "data.validation_fraction and data.validation_limits so that there are, or "
                        "take a grid of one factor.")
    return float(lines[-1]["strict"])


def choose(tuned: Sequence[Tuned], setup: str) -> float:
    """The factor with the best mean; among equals the one nearest to 1, then the smaller."""
    def merit(factor: float) -> tuple[float, float, float]:
        scores = [t.validation for t in tuned if (t.setup, t.factor) == (setup, factor)]
        return round(sum(scores) / len(scores), 9), -abs(math.log(factor)), -factor

    return max({t.factor for t in tuned if t.setup == setup}, key=merit)


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


# Runs ---------------------------------------------------------------------------------------------


def run_job(plan: Plan, arm: Setup, seed: int, experiment: str, settings: Sequence[str]) -> Job:
    """One run as a process of `hybridrl run`.

    Raises:
        UserError: it is finished, and was made with other settings.
    """
    folder = experiment_folder(experiment)
    record = run_folder(folder, arm.name, seed)
    settings = own_settings(arm, settings)
    if record.is_complete:
        before = settings_from_dict((record.read("config.json") or {}).get("settings", {}))
        wanted = load_settings(plan.preset, settings, setup=arm)
        if changes := difference(before, wanted, ignored=MEMORY_ALONE):
            raise UserError(f"The run {arm.name}/seed-{seed} of experiment {experiment} was made "
                            f"with other settings ({'; '.join(changes)}); choose another "
                            "--experiment or delete its folder.")
        record.refuse_other_numerics(experiment)
    log = (folder / "logs" / f"{arm.name}-seed-{seed}.log").absolute()
    command = (sys.executable, "-m", "hybridrl_lib.cli", "run", arm.name, "--preset", plan.preset,
               "--seed", str(seed), "--experiment", experiment,
               *(("--set", *settings) if settings else ()))
    return Job(name=f"{experiment.removeprefix(plan.experiment).strip('-')} {arm.name} seed "
                    f"{seed}".strip(), command=command, folder=Path.cwd(),
               output=log.with_suffix(".ipynb"), log=log, weight=relative_cost(arm), seed=seed,
               record=record)


def work(plan: Plan, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
    """Runs what is not finished.

    Raises:
        UserError: some failed, after all others were run.
    """
    left = [job for job in jobs if not job.record.is_complete]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished already")
    failures = Queue(left, plan.jobs, environment(plan), say, gpus_for(plan.preset, plan.settings),
                     plan.cluster).run()
    if failures:
        for job, why in failures.items():
            say(f"* {job.name}: {why} (log: {job.log})")
        raise UserError(f"{len(failures)} of {len(left)} runs failed "
                        f"({', '.join(job.name for job in failures)}); mend what is said above and "
                        "run the same command again: what is finished is not run again.")


def environment(plan: Plan) -> dict[str, str]:
    """Environment variables of every run: this package, this results folder, its share of cores."""
    threads = threads_for(plan.preset, plan.jobs, plan.cluster)
    return {"OMP_NUM_THREADS": str(threads), **os.environ,
            "HYBRIDRL_RESULTS_DIR": str(experiment_folder(plan.experiment).parent.absolute()),
            "PYTHONPATH": joined(Path(__file__).parent.parent, os.environ.get("PYTHONPATH")),
            "PYTHONUNBUFFERED": "1"}


# The comparison -----------------------------------------------------------------------------------


def write_comparison(plan: Plan, factors: dict[str, float], tuned: Sequence[Tuned],
                     say: Callable[[str], None]) -> list[Path]:
    """Writes tables and figures from the records and prints the main table."""
    from .report.arm_tables import report_arms
    from .report.arms import make_arms

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


def only_runs(plan: Plan, folder: Path):
    """The plan's arms and seeds in a folder, which may hold others from an earlier command."""
    from .report import load_experiment

    experiment = load_experiment(folder)
    wanted = {(arm.name, seed) for arm in plan.arms for seed in seeds_of(plan, arm)}
    return replace(experiment, runs=tuple(run for run in experiment.runs
                                          if (run.setup, run.seed) in wanted))

"""Plans training runs as jobs, and executes those that are not finished."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.methods import METHODS
from ..config.presets import (
    MEMORY_ALONE,
    difference,
    load_settings,
    parse_overrides,
    settings_from_dict,
)
from ..machine.memory import NEEDS, main_memory, usable_cores
from ..records.folders import experiment_folder
from ..records.run_folder import run_folder
from ..report.loading import Experiment, load_experiment
from ..setups import Setup
from ..system.errors import Stopped, UserError
from ..system.paths import PACKAGE
from .cluster import Cluster
from .jobs import Job, Queue, Start
from .process import start_here

# Where and how many -------------------------------------------------------------------------------


def gpus_for(preset: str, settings: Sequence[str]) -> int:
    """Number of GPUs that runs can share: all, or none with model.device=cpu."""
    if load_settings(preset, settings).model.device == "cpu":
        return 0
    import torch  # the only way to know how many the runs will see

    return torch.cuda.device_count()


def default_jobs(preset: str, count: int, gpus: int, cluster: Cluster | None = None) -> int:
    """One job per GPU; without GPUs one per core, as far as the memory for the preset goes.

    On a cluster, as many as fit there.
    """
    if cluster is not None:
        return min(count, cluster.slots(threads_for(preset, 1, cluster)))
    if gpus:
        return min(gpus, count)
    fitting = int(main_memory() // max(1, NEEDS[preset][1])) or 1
    return max(1, min(usable_cores(), fitting, count))


def threads_for(preset: str, jobs: int, cluster: Cluster | None = None) -> int:
    """CPU threads of a run.

    The number of threads changes the last bits of sums. At `tiny` it is always 1, so a run leaves
    the same record no matter how many run at the same time; one thread is nearly as fast as two.
    """
    if preset == "tiny":
        return 1
    if cluster is not None:  # the share of the cores per GPU, or a machine like this one
        return max(1, cluster.cpus // cluster.gpus if cluster.gpus else usable_cores())
    return max(1, usable_cores() // jobs)


def start_for(gpus: int, cluster: Cluster | None) -> Start:
    """Starts jobs on the cluster, or on this machine without one."""
    return cluster.start if cluster is not None else start_here(gpus)


def relative_cost(setup: Setup) -> float:
    """Relative duration of a setup, in evaluations: RL samples, and the entropy term adds some."""
    stages = sum({"sft": 1.0, "rl": 9.0}[stage] for stage in setup.stages)
    return 1.0 + stages / max(1, len(setup.stages)) + 0.5 * setup.entropy


def joined(first: Path, others: str | None) -> str:
    """A search path with one more folder in front."""
    return os.pathsep.join([str(first), *([others] if others else [])])


# Runs of a comparison or a sweep ------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is trained, and where.

    Attributes:
        preset, settings: as for a single run.
        arms: setups; in a comparison with the base model and the baseline.
        seeds: of every arm except the base model, which is scored once.
        grid: factors of the learning rates.
        experiment: the folder's name; names of the folders that belong to it start with it.
        benchmarks: those that the settings train on; with transfer, each is also trained on alone.
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


def own_settings(arm: Setup, settings: Sequence[str]) -> tuple[str, ...]:
    """The settings without those of other methods, which an arm would refuse."""
    return tuple(text for text in settings
                 if text.partition(".")[0].strip() not in set(METHODS) - {arm.method})


def given(arm: Setup, settings: Sequence[str]) -> tuple[str, ...]:
    """The settings that an arm takes: not those of other methods, nor those that define the arm.

    Otherwise a control would become the arm that it controls for.
    """
    fixed = parse_overrides(arm.settings)
    return tuple(text for text in own_settings(arm, settings)
                 if text.partition("=")[0].strip() not in fixed)


def seeds_of(plan: Plan, arm: Setup) -> tuple[int, ...]:
    """An arm's seeds; the base model is not trained, so one is enough."""
    return plan.seeds if arm.stages else plan.seeds[:1]


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
    """Executes the jobs that are not finished.

    Raises:
        UserError: some failed, after all others have run.
    """
    left = [job for job in jobs if not job.record.is_complete]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} runs are already finished")
    start = start_for(gpus_for(plan.preset, plan.settings), plan.cluster)
    failures = Queue(left, plan.jobs, environment(plan), say, start).run()
    if failures:
        raise failed(failures, len(left), "runs", say)


def failed(failures: dict[Job, str], count: int, what: str,
           say: Callable[[str], None]) -> UserError:
    """The error for jobs that failed; the reason of each is printed before."""
    for job, why in failures.items():
        say(f"* {job.name}: {why} (log: {job.log})")
    return UserError(f"{len(failures)} of {count} {what} failed "
                     f"({', '.join(job.name for job in failures)}); fix the errors above and rerun "
                     "the command; finished runs are skipped.")


def work_and_write(plan: Plan, runs: Sequence[Job], say: Callable[[str], None],
                   write: Callable[[], list[Path]]) -> list[Path]:
    """Executes the jobs and returns the files that `write` makes of what is finished.

    Raises:
        Stopped: by Ctrl-C; nothing is written.
        UserError: a run failed; raised after all others have run and the files are written.
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
    except UserError as error:  # why a run failed says more than that there is nothing to show
        raise failure or error from None
    if failure:
        raise failure
    return files


def environment(plan: Plan) -> dict[str, str]:
    """Environment variables of every run: this package, this results folder, its share of cores."""
    threads = threads_for(plan.preset, plan.jobs, plan.cluster)
    return {"OMP_NUM_THREADS": str(threads), **os.environ,
            "HYBRIDRL_RESULTS_DIR": str(experiment_folder(plan.experiment).parent.absolute()),
            "PYTHONPATH": joined(PACKAGE.parent, os.environ.get("PYTHONPATH")),
            "PYTHONUNBUFFERED": "1"}


def only_runs(plan: Plan, folder: Path) -> Experiment:
    """The plan's arms and seeds in a folder, which may hold others from earlier commands."""
    experiment = load_experiment(folder)
    wanted = {(arm.name, seed) for arm in plan.arms for seed in seeds_of(plan, arm)}
    return replace(experiment, runs=tuple(run for run in experiment.runs
                                          if (run.setup, run.seed) in wanted))

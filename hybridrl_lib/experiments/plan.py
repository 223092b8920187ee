"""Plans runs and executes them as processes."""

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
from ..setups import Setup
from ..system.errors import Stopped, UserError
from ..system.paths import PACKAGE
from .cluster import Cluster
from .jobs import Job, Queue


def gpus_for(preset: str, settings: Sequence[str]) -> int:
    """How many GPUs runs can share: all that there are, and none where the settings say `cpu`."""
    if load_settings(preset, settings).model.device == "cpu":
        return 0
    import torch  # the only way to know how many the runs will see

    return torch.cuda.device_count()


def default_jobs(preset: str, count: int, gpus: int, cluster: Cluster | None = None) -> int:
    """One a GPU; without one, one a core as far as the preset's share of memory goes.

    On a cluster as many as have room there.
    """
    if cluster is not None:
        return min(count, cluster.slots(threads_for(preset, 1, cluster)))
    if gpus:
        return min(gpus, count)
    fitting = int(main_memory() // max(1, NEEDS[preset][1])) or 1
    return max(1, min(usable_cores(), fitting, count))


def threads_for(preset: str, jobs: int, cluster: Cluster | None = None) -> int:
    """CPU threads of a run.

    The number of threads moves the last bits of sums. At `tiny` it is always 1, so that a run
    leaves the same record however many go on beside it, and one thread is nearly as fast as two.
    """
    if preset == "tiny":
        return 1
    if cluster is not None:  # its share of the cores beside a GPU, or a machine such as this one
        return max(1, cluster.cpus // cluster.gpus if cluster.gpus else usable_cores())
    return max(1, usable_cores() // jobs)


def relative_cost(setup: Setup) -> float:
    """About how long a setup takes, in evaluations: RL samples, and the entropy term adds some."""
    stages = sum({"sft": 1.0, "rl": 9.0}[stage] for stage in setup.stages)
    return 1.0 + stages / max(1, len(setup.stages)) + 0.5 * setup.entropy


def joined(first: Path, others: str | None) -> str:
    return os.pathsep.join([str(first), *([others] if others else [])])


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


def seeds_of(plan: Plan, arm: Setup) -> tuple[int, ...]:
    """An arm's seeds; the base model is not trained, and one is enough."""
    return plan.seeds if arm.stages else plan.seeds[:1]


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
            "PYTHONPATH": joined(PACKAGE.parent, os.environ.get("PYTHONPATH")),
            "PYTHONUNBUFFERED": "1"}


def only_runs(plan: Plan, folder: Path):
    """The plan's arms and seeds in a folder, which may hold others from an earlier command."""
    from ..report.loading import load_experiment

    experiment = load_experiment(folder)
    wanted = {(arm.name, seed) for arm in plan.arms for seed in seeds_of(plan, arm)}
    return replace(experiment, runs=tuple(run for run in experiment.runs
                                          if (run.setup, run.seed) in wanted))

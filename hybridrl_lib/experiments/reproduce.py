"""Executes the notebooks of the setups and seeds through papermill, then writes the report.

Every notebook is its own process and trains by calling the library, which resumes from checkpoints
and reads finished runs instead of running them again. So the whole can be stopped and restarted at
any time, and one failure does not affect the others.
"""

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.presets import (
    default_experiment,
    get_setup,
    load_settings,
    resolve_preset,
)
from ..records.folders import experiment_folder, project_folder
from ..records.locks import only_writer
from ..records.run_folder import RunFolder, run_folder
from ..report.loading import load_experiment
from ..report.page import beside_published, published_to_compare
from ..report.report import make_report
from ..report.table2 import make_table2
from ..setups import Setup, setups_with_notebook
from ..system.errors import UsageError, UserError
from ..system.paths import PACKAGE, without_home
from .cluster import Cluster, connect
from .jobs import Job, Queue
from .plan import (
    default_jobs,
    failed,
    gpus_for,
    joined,
    relative_cost,
    start_for,
    threads_for,
)

REPORT_NOTEBOOKS = ("20_table2", "21_training_dynamics")
KERNEL = "python3"


@dataclass(frozen=True)
class Reproduction:
    """What is executed, and where.

    Attributes:
        preset, experiment, settings: as for a single run.
        folder: the experiment's folder, absolute.
        notebooks: the folder of the notebooks, absolute.
        jobs: processes at a time.
        threads: CPU threads of each.
        gpus: number of GPUs to share; 0 for none.
        cluster: where the notebooks run; None for this machine.
    """

    preset: str
    experiment: str
    settings: tuple[str, ...]
    folder: Path
    notebooks: Path
    jobs: int
    threads: int
    gpus: int
    cluster: Cluster | None = None


def reproduce(preset: str = "tiny", seeds: Sequence[int] = (0,), setups: Sequence[str] = (),
              jobs: int | None = None, experiment: str | None = None,
              settings: Sequence[str] = (), say=None, executor: str = "local") -> list[Path]:
    """Executes the notebooks of the setups and seeds, then those of the report.

    Args:
        preset: a preset's name, or `auto`.
        seeds: the seeds of every setup.
        setups: names of `setups.SETUPS`; default: the base model and the paper's six.
        jobs: notebooks at a time; default: one per GPU, or without GPUs one per core as far as the
            memory goes.
        experiment: the folder under `results/runs/`; default: the preset's name.
        settings: differences from the preset, as in `--set`.
        say: takes a line of progress; default: prints it.
        executor: `local`, or the Ray cluster to run on, see `cluster.connect`.

    Returns:
        The files of the report.

    Raises:
        UserError: a notebook failed (after all others have run), there are no notebooks, another
            process is reproducing the same experiment, or no cluster answers.
        Stopped: by Ctrl-C, after the running steps were finished and their checkpoints written.
    """
    say = say or (lambda line: print(line, flush=True))
    preset = resolve_preset(preset)
    chosen = [get_setup(name) for name in dict.fromkeys(setups or setups_with_notebook())]
    load_settings(preset, settings)  # refuses a wrong key here, once, rather than in every notebook
    plan = make_plan(preset, experiment or default_experiment(preset), tuple(settings), jobs,
                     len(chosen) * len(seeds), connect(executor))
    runs = [setup_job(plan, setup, seed) for setup in chosen for seed in dict.fromkeys(seeds)]
    with (only_writer(plan.folder, f"The experiment {plan.experiment}"),
          # The nodes of a cluster only share the results folder.
          tempfile.TemporaryDirectory(prefix="hybridrl-", dir=plan.folder if plan.cluster else None
                                      ) as temporary):
        environment = job_environment(plan, Path(temporary))
        threads = environment["OMP_NUM_THREADS"]
        say(f"{len(runs)} notebooks ({', '.join(setup.name for setup in chosen)}; "
            f"seeds {', '.join(map(str, dict.fromkeys(seeds)))}), "
            f"{plan.jobs} at a time with {threads} thread{'' if threads == '1' else 's'} each, "
            f"into {plan.folder}; Ctrl-C stops, and the same command resumes")
        start = start_for(plan.gpus, plan.cluster)
        failures = Queue(runs, plan.jobs, environment, say, start).run()
        pages = report_jobs(plan, [job.seed for job in runs], say)
        failures |= Queue(pages, plan.jobs, environment, say, start).run()
        files = write_report(plan, say)
    if failures:
        raise failed(failures, len(runs) + len(pages), "notebooks", say)
    return files


# The plan ---------------------------------------------------------------------------------------


def make_plan(preset: str, experiment: str, settings: tuple[str, ...], jobs: int | None,
              count: int, cluster: Cluster | None = None) -> Reproduction:
    """Where `count` runs go, and how many at a time."""
    gpus = gpus_for(preset, settings) if cluster is None else cluster.gpus
    jobs = min(jobs or default_jobs(preset, count, gpus, cluster), count)
    notebooks = notebooks_folder()
    return Reproduction(
        preset=preset, experiment=experiment,
        settings=tuple(seen_from(notebooks, text) for text in settings),
        folder=experiment_folder(experiment).absolute(), notebooks=notebooks, jobs=jobs,
        threads=threads_for(preset, jobs, cluster), gpus=gpus, cluster=cluster)


def notebooks_folder() -> Path:
    """The notebooks of the checkout.

    Raises:
        UserError: there are none, as in a package that was installed without its checkout.
    """
    for root in (project_folder(), PACKAGE.parent):
        if (root / "notebooks").is_dir() and any((root / "notebooks").glob("*.ipynb")):
            return (root / "notebooks").absolute()
    raise UserError("There is no folder with notebooks here; run this command inside a checkout of "
                    "the project.")


def seen_from(folder: Path, text: str) -> str:
    """A setting as a process in `folder` must write it: a relative model path is rewritten.

    No path names the user's home folder, since it appears in the executed notebooks.
    """
    key, _, value = text.partition("=")
    if key.strip() != "model.path" or value == "tiny" or not Path(value).exists():
        return text
    if Path(value).is_absolute():
        return f"{key}={without_home(value)}"
    return f"{key}={os.path.relpath(value, folder)}"


def setup_job(plan: Reproduction, setup: Setup, seed: int) -> Job:
    """The job of one run, with its weight.

    Raises:
        UsageError: the setup has no notebook.
    """
    if not setup.notebook:
        raise UsageError(f"The setup {setup.name} has no notebook; train it with 'hybridrl run "
                         f"{setup.name}'.")
    record = run_folder(plan.folder, setup.name, seed)
    weight = 0.3 if record.is_complete else relative_cost(setup)
    return notebook_job(plan, setup.notebook, f"{setup.name} seed {seed}", seed, weight,
                        output=f"{setup.notebook}-seed-{seed}", record=record)


def notebook_job(plan: Reproduction, notebook: str, name: str, seed: int, weight: float,
                 output: str, record: RunFolder | None = None) -> Job:
    """A notebook with its parameters, as a papermill command.

    Raises:
        UserError: the notebook is missing.
    """
    source = plan.notebooks / f"{notebook}.ipynb"
    if not source.is_file():
        raise UserError(f"The notebook {source.name} is missing in {plan.notebooks}; restore it "
                        "with 'git checkout notebooks'.")
    written = plan.folder / "notebooks" / f"{output}.ipynb"
    # Texts are passed raw (-r): papermill would turn an experiment called 2025 into a number.
    command = [sys.executable, "-m", "papermill", source.name, str(written), "-k", KERNEL,
               "-p", "seed", str(seed), "-r", "preset", plan.preset, "-r", "experiment",
               plan.experiment, "-r", "settings", shlex.join(plan.settings),
               "--no-progress-bar", "--log-output"]
    return Job(name=name, command=tuple(command), folder=plan.notebooks, output=written,
               log=written.with_suffix(".log"), weight=weight, seed=seed, record=record)


# The environment of a notebook -------------------------------------------------------------------


def job_environment(plan: Reproduction, temporary: Path) -> dict[str, str]:
    """Environment variables of every job.

    Paths are absolute, since notebooks run in their own folder. The kernel is this interpreter with
    this package, whatever `python3` means in the user's Jupyter, and ignores the user's IPython
    profile.
    """
    write_kernel(temporary / "jupyter")
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(plan.threads))
    environment |= {
        "HYBRIDRL_RESULTS_DIR": str(plan.folder.parent),
        "JUPYTER_PATH": joined(temporary / "jupyter", os.environ.get("JUPYTER_PATH")),
        "JUPYTER_RUNTIME_DIR": str(temporary / "runtime"),
        "IPYTHONDIR": str(temporary / "ipython"),
        "PYTHONPATH": joined(PACKAGE.parent, os.environ.get("PYTHONPATH")),
        "PYTHONUNBUFFERED": "1",
        "HYBRIDRL_HEADLESS": "1",  # plain lines in the log instead of a live view
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # a debugger's warning in every log
    }
    for name in ("HYBRIDRL_DATA_DIR", "HF_HOME"):
        if environment.get(name):
            environment[name] = str(Path(environment[name]).expanduser().absolute())
    return environment


def write_kernel(folder: Path) -> None:
    """A Jupyter kernel named python3 that is this interpreter; Jupyter looks there first."""
    spec = folder / "kernels" / KERNEL / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3", "language": "python"}), encoding="utf-8")


# The report -------------------------------------------------------------------------------------


def report_jobs(plan: Reproduction, seeds: Sequence[int], say: Callable[[str], None]) -> list[Job]:
    """The report's notebooks, for a seed that every setup has.

    By default they train what is missing. Here they must not: the user chose the setups, and one
    that has failed would fail again.
    """
    finished = [seed for seed in dict.fromkeys(seeds) if all(
        run_folder(plan.folder, name, seed).is_complete for name in setups_with_notebook())]
    if finished:
        return [notebook_job(plan, name, name, finished[0], 1.0, name) for name in REPORT_NOTEBOOKS]
    say(f"skipping {' and '.join(REPORT_NOTEBOOKS)}, since not every setup is finished")
    return []


def write_report(plan: Reproduction, say: Callable[[str], None]) -> list[Path]:
    """Writes the report's files and prints Table 2, next to the published one if there is one."""
    if not any(RunFolder(path.parent).is_complete
               for path in plan.folder.glob("*/seed-*/manifest.json")):
        say("no run is finished, so there is no report yet")
        return []
    published = published_to_compare(plan.preset)
    say("")
    files = make_report(plan.folder, published=published)
    if published is not None:
        experiment = load_experiment(plan.folder)
        say("\n" + beside_published(experiment, make_table2(experiment), published))
    return files

"""What each command of `hybridrl` does. The parser is in `cli.py`."""

import argparse
import json
import os
import sys
from pathlib import Path

from ..system.errors import UsageError, UserError, unknown
from ..system.paths import tiny_model_folder
from ..system.processes import end, is_first


def run_command(arguments: argparse.Namespace) -> None:
    from ..config.presets import get_setup, load_settings

    get_setup(arguments.setup)  # wrong names are refused before torch is imported
    load_settings(arguments.preset, arguments.settings)
    prepare_torch(arguments.preset)
    from .run import run

    folder = run(arguments.setup, arguments.preset, arguments.seed, arguments.experiment,
                 arguments.settings)
    if is_first():
        print(f"the record is in {folder.path}")
    end()


def prepare_torch(preset: str = "") -> None:
    """Sets threads like `hybridrl reproduce`, and hides progress bars, before torch is imported.

    At `tiny` a run uses one thread, so that the same command leaves the same record on machines
    with more cores, and while other runs are going.
    """
    if preset == "tiny":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def reproduce_command(arguments: argparse.Namespace) -> None:
    from .reproduce import reproduce

    reproduce(arguments.preset, arguments.seeds, names_in(arguments.setups), arguments.jobs,
              arguments.experiment, arguments.settings, executor=arguments.executor)


def compare_command(arguments: argparse.Namespace) -> None:
    from .compare import compare

    compare(arguments.preset, arguments.seeds, names_in(arguments.methods), arguments.grid,
            arguments.transfer, arguments.jobs, arguments.experiment, arguments.settings,
            executor=arguments.executor)


def names_in(texts: list[str]) -> list[str]:
    """The names in arguments such as `sft,rl base`."""
    return [name for text in texts for name in text.split(",") if name]


def sweep_command(arguments: argparse.Namespace) -> None:
    from .sweep import sweep

    sweep(arguments.parameter, arguments.values, arguments.preset, arguments.seeds,
          arguments.setup, arguments.jobs, arguments.experiment, arguments.settings,
          executor=arguments.executor)


def report_command(arguments: argparse.Namespace) -> None:
    from ..records.folders import from_here, project_folder, published_folder, results_folder

    if arguments.docs:
        from ..report.docs import write_tables

        for page in write_tables(project_folder()):
            print(f"rewrote {from_here(page)}")
        return
    if arguments.experiment is None:
        raise UsageError("Name an experiment, such as tiny, or use --docs.")
    folder, out, published = find_experiment(
        arguments.experiment, results_folder(), published_folder())
    from ..report.report import make_report

    make_report(folder, out_folder=arguments.out or out, published=published)


def find_experiment(name: str, runs: Path, published: Path
                    ) -> tuple[Path, Path | None, Path | None]:
    """(folder of the records, where to write, published table to show next to it).

    Args:
        name: of an experiment, or a path. Published records are read-only: their report goes to the
            folder of new runs, unless the folder is given as a path.

    Raises:
        UserError: there is no finished run of that name.
    """
    if os.sep in name or name in (".", ".."):
        return Path(name), None, None
    mine, theirs = runs / name, published / name
    if has_records(mine):
        return mine, None, theirs if (theirs / "table2.csv").is_file() else None
    if has_records(theirs):
        return theirs, mine, None
    known = sorted({path.name for root in (runs, published) if root.is_dir()
                    for path in root.iterdir() if has_records(path)})
    if known:
        raise unknown("experiment with a finished run", name, known)
    raise UserError(f"There is no finished run of experiment {name!r}; train a setup first, for "
                    "example with 'hybridrl run sft'.")


def has_records(folder: Path) -> bool:
    return any(folder.glob("*/seed-*/manifest.json"))


def rerun_command(arguments: argparse.Namespace) -> int:
    prepare_torch()
    from .rerun import rerun

    return rerun(arguments.manifest, arguments.experiment, arguments.settings)


def merge_command(arguments: argparse.Namespace) -> None:
    prepare_torch()
    from .merge import merge

    merge(arguments.run_folder, arguments.out)
    print(f"the whole model is in {arguments.out}; use it with --set model.path={arguments.out}")


def publish_command(arguments: argparse.Namespace) -> None:
    from ..records.folders import from_here, project_folder
    from .publish import publish

    folder = publish(arguments.experiment,
                     arguments.to or project_folder() / "results" / "published")
    print(f"published in {from_here(folder)}")


def list_command(arguments: argparse.Namespace) -> None:
    from ..machine.catalogue import catalogue, render

    listing = catalogue()
    print(json.dumps(listing, indent=2) if arguments.json else render(listing))


def doctor_command(arguments: argparse.Namespace) -> int:
    from ..machine.doctor import render, report

    rows = report(arguments.preset)
    names = ("topic", "value", "advice")
    print(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2)
          if arguments.json else render(rows=rows))
    verdicts = [value for topic, value, _ in rows if topic.startswith("preset ")]
    return int(arguments.preset is not None and "no" in verdicts)


def pretrain_command(arguments: argparse.Namespace) -> None:
    folder = arguments.out or tiny_model_folder()
    if (folder / "config.json").exists():
        raise UsageError(f"The folder {folder} already holds a model; choose another --out.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same bytes on machines with more cores
    from .pretraining import pretrain

    pretrain(folder, seed=arguments.seed, report=lambda line: print(line, flush=True))
    print(f"the model is in {folder}; use it with --set model.path={folder}")

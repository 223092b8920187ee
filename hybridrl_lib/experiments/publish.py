"""Copies finished runs to the published results: records, tables, and figures, no checkpoints."""

import gzip
import shutil
from dataclasses import replace
from pathlib import Path

from ..records.files import PACKED, write_folder
from ..records.folders import experiment_folder, results_folder
from ..records.locks import only_writer
from ..records.run_folder import ANSWERS, LOGS, RunFolder
from ..report.arm_tables import arms_texts
from ..report.arms import make_arms
from ..report.loading import load_experiment
from ..report.report import make_texts
from ..report.sweeps import sweep_texts
from ..report.table2 import make_table2
from ..report.text import read_csv
from ..system.errors import UserError
from .compare import BASELINE
from .sweep import SWEEPS, part_of
from .tuning import tuned_by

SHORT = 16_000  # bytes; longer logs are packed


def publish(experiment: str, to: Path) -> Path:
    """Copies an experiment to `<to>/<experiment>`, replacing what is there.

    Folders that `hybridrl compare` and `hybridrl sweep` make next to it, such as
    `<experiment>-tuning-1`, become folders in it, such as `tuning-1`.

    Returns:
        The new folder.

    Raises:
        UserError: there is no run; a run is not finished, or is not reproducible (uncommitted code,
            or logs that differ from the manifest); the tables are not those of the runs; or
            published runs would be lost.
    """
    folder = experiment_folder(experiment)
    if to.resolve().is_relative_to(results_folder().resolve()):
        raise UserError(f"{to} is in the folder of new runs, whose own records would be replaced; "
                        "choose another --to.")
    parts = {"": folder, **{name: folder.with_name(f"{folder.name}-{name}")
                            for name in parts_of(folder)}}
    runs = {Path(part) / run.parent.name / run.name: run for part, path in parts.items()
            for run in sorted(path.glob("*/seed-*"))}
    if not runs:
        raise UserError(f"There is no run of experiment {experiment!r} in {folder.parent}; train a "
                        "setup first, for example with 'hybridrl run sft'.")
    wrong = [f"{run.relative_to(folder.parent).as_posix()} {why}" for run in runs.values()
             if (why := why_not(RunFolder(run)))]
    if wrong:
        raise UserError(f"{len(wrong)} of {len(runs)} runs cannot be published: "
                        f"{'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''}. Finish these "
                        "runs or delete their folders.")
    final = to / folder.name
    lost = [path.parent.relative_to(final).as_posix() for path in sorted(
        final.rglob("manifest.json")) if path.parent.relative_to(final) not in runs]
    if lost:
        raise UserError(f"{len(lost)} published runs are not here and would be lost ({lost[0]}); "
                        "choose another --to, or delete the published folder first.")

    def fill(new: Path) -> None:
        for place, run in runs.items():
            copy_run(run, new / place)
        copy_pages(folder, new)
        for name, text in tables_of(new, folder.name).items():
            if not (new / name).is_file() or (new / name).read_text(encoding="utf-8") != text:
                raise UserError(f"{name} of {experiment} is not what its runs give; write it again "
                                f"('hybridrl report {experiment}', or the compare or sweep with "
                                "all arms, values and seeds), then publish.")

    try:
        with only_writer(to, "The folder of published records"), only_writer(
                folder, f"The experiment {experiment}"):
            write_folder(final, fill)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise UserError(f"Could not write to {to} ({error.__cause__.strerror}); free some "
                            "space, or choose another --to. The experiment is as it was."
                            ) from error
        raise
    return final


def parts_of(folder: Path) -> list[str]:
    """The suffixes of the folders next to an experiment that belong to it."""
    return list(dict.fromkeys((
        *(f"tuning-{row['rate_factor']}" for row in read_csv(folder / "tuning.csv")),
        *(f"only-{row['trained_on']}" for row in read_csv(folder / "transfer.csv")),
        *(part_of(row["value"]) for row in read_csv(folder / "sweep.csv")))))


def why_not(run: RunFolder) -> str | None:
    """Why a run cannot be published, or None."""
    manifest = run.read("manifest.json") or {}
    if manifest.get("complete") is not True:
        return "is not finished"
    if not manifest.get("git_commit") or manifest.get("git_dirty"):
        return "was made with code that is not committed"
    altered = run.altered()
    return f"was changed afterwards ({', '.join(altered)})" if altered else None


def copy_run(run: Path, new: Path) -> None:
    """Copies a run's record with long logs packed; the bytes do not depend on when."""
    new.mkdir(parents=True)
    for name in ("config.json", "manifest.json", *LOGS, ANSWERS):
        if not (run / name).is_file():
            continue
        content = (run / name).read_bytes()
        if name.endswith(".jsonl") and len(content) > SHORT:
            with (new / (name + PACKED)).open("wb") as stream, gzip.GzipFile(
                    filename="", fileobj=stream, mode="wb", mtime=0) as packed:
                packed.write(content)
        else:
            (new / name).write_bytes(content)


def copy_pages(folder: Path, new: Path) -> None:
    """Copies the tables and figures that a report wrote."""
    for path in sorted([*folder.glob("*.*"), *folder.glob("figures/*")]):
        if path.is_file() and path.suffix in (".md", ".csv", ".tex", ".svg", ".png"):
            (new / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, new / path.relative_to(folder))


def tables_of(folder: Path, name: str) -> dict[str, str]:
    """{file name: text} of the tables of a published experiment, from its records.

    Args:
        name: of the experiment.
    """
    texts = {}
    with_table, with_comparison = ((folder / table).is_file()
                                   for table in ("table2.csv", "comparison.csv"))
    if with_table or with_comparison:
        experiment = replace(load_experiment(folder), name=name)
    if with_table:
        texts |= make_texts(experiment, make_table2(experiment))
    if with_comparison:
        factors = {row["setup"]: float(row["rate_factor"])
                   for row in read_csv(folder / "comparison.csv")}
        tuned = [tuned_by(RunFolder(folder / f"tuning-{row['rate_factor']}" / row["setup"]
                                    / f"seed-{row['seed']}"),
                          row["setup"], float(row["rate_factor"]), int(row["seed"]))
                 for row in read_csv(folder / "tuning.csv")]
        alone = {benchmark: load_experiment(folder / f"only-{benchmark}")
                 for benchmark in experiment.benchmarks if (folder / f"only-{benchmark}").is_dir()}
        texts |= arms_texts(experiment, make_arms(experiment, BASELINE, factors), BASELINE, tuned,
                            alone)
    swept = read_csv(folder / "sweep.csv")
    if swept:
        experiments = {value: load_experiment(folder / part_of(value))
                       for value in dict.fromkeys(row["value"] for row in swept)}
        parameter, setup = swept[0]["parameter"], swept[0]["setup"]
        texts |= sweep_texts(parameter, SWEEPS[parameter].title, setup, experiments)
    return texts

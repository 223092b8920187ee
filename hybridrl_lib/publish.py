"""Copies finished runs to where they stay: records, tables and figures, without checkpoints."""

import gzip
import shutil
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError
from .records import ANSWERS, LOGS, PACKED, RunFolder, experiment_folder, write_folder

SHORT = 16_000  # bytes; longer logs are packed, to an eighth or so
TABLES = ("comparison.csv", "sweep.csv")  # what only an experiment of several folders has


def publish(experiment: str, to: Path) -> Path:
    """Copies an experiment to `<to>/<experiment>`, in place of what is there.

    The folders that `hybridrl compare` and `hybridrl sweep` keep beside it, such as
    `<experiment>-tuning-1`, become folders in it, such as `tuning-1`.

    Returns:
        The new folder.

    Raises:
        UserError: there is no finished run, one is not finished, or nobody could make it again: its
            code was not committed, or its logs are not what the manifest says.
    """
    folder = experiment_folder(experiment)
    parts = {"": folder, **{path.name.removeprefix(f"{folder.name}-"): path
                            for path in parts_of(folder)}}
    runs = {part: sorted(path.glob("*/seed-*")) for part, path in parts.items()}
    if not any(runs.values()):
        raise UserError(f"There is no run of experiment {experiment!r} in {folder.parent}; train a "
                        "setup first, for example with 'hybridrl run sft'.")
    wrong = [f"{run.relative_to(folder.parent).as_posix()} {why}" for some in runs.values()
             for run in some if (why := why_not(RunFolder(run)))]
    if wrong:
        raise UserError(f"{len(wrong)} of {sum(map(len, runs.values()))} runs cannot be published: "
                        f"{'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''}. Finish these "
                        "runs or delete their folders.")

    def fill(new: Path) -> None:
        for part, some in runs.items():
            for run in some:
                copy_run(run, new / part / run.parent.name / run.name)
        copy_pages(folder, new)

    write_folder(to / folder.name, fill)
    return to / folder.name


def parts_of(folder: Path) -> Sequence[Path]:
    """The folders beside an experiment that belong to it."""
    if not any((folder / name).is_file() for name in TABLES):
        return []
    return [path for path in sorted(folder.parent.glob(f"{folder.name}-*")) if path.is_dir()
            and not any((path / name).is_file() for name in TABLES)]


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
    """Copies a run's record, long logs packed; the bytes are the same whenever it is done."""
    new.mkdir(parents=True)
    for name in ("config.json", "manifest.json", *LOGS, ANSWERS):
        if not (run / name).is_file():
            continue
        content = (run / name).read_bytes()
        if name.endswith(".jsonl") and len(content) > SHORT:
            (new / (name + PACKED)).write_bytes(gzip.compress(content, 9, mtime=0))
        else:
            (new / name).write_bytes(content)


def copy_pages(folder: Path, new: Path) -> None:
    """Copies the tables and figures that a report wrote."""
    for path in sorted([*folder.glob("*.*"), *folder.glob("figures/*")]):
        if path.is_file() and path.suffix in (".md", ".csv", ".tex", ".svg", ".png"):
            (new / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, new / path.relative_to(folder))

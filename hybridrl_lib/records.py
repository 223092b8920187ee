"""What a run leaves on disk, and how it goes on where it stopped.

Everything is written whole or not at all (a temporary name, then a rename); a line log may lose its
last line and never an earlier one. `results/` and its names are described in the README.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError
from .setups import get_setup

# Raised whenever the three-step digest of a reference run changes (tests/test_numerics.py).
NUMERICS_VERSION = 2

PLAIN_NAME = re.compile(r"\w[\w.+-]*")

LOGS = ("metrics.jsonl", "probe.jsonl", "validation.jsonl", "samples.jsonl")


def results_folder() -> Path:
    """Where new runs go: `HYBRIDRL_RESULTS_DIR`, or `results/runs` of the nearest checkout.

    A notebook runs in `notebooks/`, a command anywhere: the folder above that holds the project's
    `pyproject.toml` is taken, and the current one if there is none.
    """
    chosen = os.environ.get("HYBRIDRL_RESULTS_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return project_folder() / "results" / "runs"


def project_folder() -> Path:
    """The checkout that the current folder lies in, or the current folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "hybridrl_lib").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    return here


def experiment_folder(experiment: str) -> Path:
    """The folder of an experiment's new runs.

    Raises:
        UserError: the name would leave the results folder.
    """
    if not is_plain_name(experiment):
        raise UserError(f"The experiment name {experiment!r} is not a plain folder name; use a "
                        "text of letters, digits, '-', '_' and '.' that begins with a letter or "
                        "digit.")
    return results_folder() / experiment


def run_folder(experiment: Path, setup: str, seed: int) -> "RunFolder":
    """The folder of a run: `<experiment>/<setup>/seed-<n>/`.

    Args:
        experiment: what `experiment_folder` gives.
        setup, seed: from a user, a notebook's parameters or somebody's record.

    Raises:
        UserError: they would make another path than that.
    """
    get_setup(setup)
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or seed < 0:
        raise UserError(f"The seed {seed!r} is no whole number of 0 and up; give one, such as 0.")
    return RunFolder(experiment / setup / f"seed-{int(seed)}")


def is_plain_name(name: object) -> bool:
    """Whether a text is a folder's name on every system and nothing else to a shell or a page."""
    return isinstance(name, str) and len(name) <= 100 and bool(PLAIN_NAME.fullmatch(name))


def to_json(value: Any, **arguments) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **arguments)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> UserError:
    return UserError(f"Could not write {path.name} ({error.strerror or error}); free some space or "
                     "set HYBRIDRL_RESULTS_DIR to another folder, then run the same command again: "
                     "it goes on from the last checkpoint.")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the writers of tensors raise when a file cannot be written into our sentence.

    safetensors raises a type of its own and torch.save a RuntimeError that only its text tells.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error
    except Exception as error:
        text = str(error)
        if type(error).__name__ == "SafetensorError" or any(
                sign in text for sign in ("iostream error", "inline_container", "StreamWriter")):
            raise disk_error(path, OSError("the disk may be full")) from error
        raise


def read_lines(path: Path) -> list[dict]:
    """The lines of a log. A last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number + 1 == len(lines):
                break
            raise UserError(f"Line {number + 1} of {path.name} is damaged; delete the run folder "
                            f"{path.parent.name} and run it again.") from error
    return rows


class RunFolder:
    """The folder of one run: `<experiment>/<setup>/seed-<n>/`."""

    def __init__(self, path: Path):
        self.path = path

    # Whole files -------------------------------------------------------------------------------

    def write(self, name: str, value: Any) -> None:
        write_whole(self.path / name, to_json(value, indent=2) + "\n")

    def write_lines(self, name: str, rows: Iterable[Mapping]) -> None:
        write_whole(self.path / name, "".join(to_json(row) + "\n" for row in rows))

    def read(self, name: str) -> dict | None:
        path = self.path / name
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("no object")
            return content
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} of the run {self.path.parent.name}/{self.path.name} is "
                            "damaged; delete the run's folder and run it again.") from error

    def lines(self, name: str) -> list[dict]:
        return read_lines(self.path / name)

    @property
    def is_complete(self) -> bool:
        """Whether the run was trained, evaluated and recorded to its end."""
        manifest = self.read("manifest.json")
        return bool(manifest and manifest.get("complete"))

    @property
    def has_begun(self) -> bool:
        """Whether anything was recorded beside the settings."""
        return any((self.path / name).exists()
                   for name in (*LOGS, "eval.jsonl", "manifest.json", "checkpoint"))

    # Logs --------------------------------------------------------------------------------------

    def append(self, name: str, row: Mapping) -> None:
        """Adds a line to a log."""
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(to_json(row) + "\n")
        except OSError as error:
            raise disk_error(path, error) from error

    def forget_after(self, step: int) -> None:
        """Cuts the logs back to a checkpoint: the steps after it will be taken again."""
        for name in LOGS:
            if (self.path / name).exists():
                self.write_lines(name, [row for row in self.lines(name) if row["step"] <= step])

    # Checkpoints -------------------------------------------------------------------------------

    def save_checkpoint(self, step: int, write: Any) -> None:
        """Keeps the newest checkpoint: `write(folder)` fills a new folder, the old one goes last.

        The folder gets its final name only when it is complete.
        """
        root = self.path / "checkpoint"
        temporary, final = root / "writing", root / f"step-{step:06d}"
        try:
            with disk_errors(final):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                write(temporary)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temporary, final)
        except UserError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for folder in root.glob("step-*"):
            if folder != final:
                shutil.rmtree(folder, ignore_errors=True)

    def drop_step_checkpoints(self) -> None:
        """Removes what only an unfinished run needs; the final model stays."""
        for folder in (self.path / "checkpoint").glob("step-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def newest_checkpoint(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest checkpoint, or None."""
        folders = sorted((self.path / "checkpoint").glob("step-*"))
        return (int(folders[-1].name.split("-")[1]), folders[-1]) if folders else None


def seed_of(*parts: int | str) -> int:
    """A seed for one purpose of one run, from the run's seed and the purpose's names."""
    return zlib.crc32("/".join(map(str, parts)).encode())

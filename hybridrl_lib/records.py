"""What a run leaves on disk, and how it gets there.

Everything is written whole or not at all: under a temporary name, waited for until it is on the
disk, renamed, and waited for again. A line log may lose its last lines, never an earlier one; each
checkpoint knows how far the logs went (`checkpoints.py`). The README describes `results/`.
"""

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError
from .setups import get_setup

# Raised whenever the three-step digest of a reference run changes (tests/test_numerics.py).
NUMERICS_VERSION = 2

PLAIN_NAME = re.compile(r"\w[\w.+-]*")

LOGS = ("metrics.jsonl", "probe.jsonl", "validation.jsonl", "samples.jsonl")
ANSWERS = "eval.jsonl"
PACKED, LARGEST_LOG = ".gz", 2**30  # bytes; a packed file could hold far more than the disk
WRITING, REMOVING = "writing", "removing"  # folders that are not yet, or no longer
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # some network and user-space folders


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


def from_here(path: Path) -> Path:
    """A path inside the checkout as it is written from the current folder; others as they are."""
    inside = path.resolve().is_relative_to(project_folder().resolve())
    return Path(os.path.relpath(path)) if inside else path


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


# Writing ----------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Waits until what is in a file, or which names are in a folder, would survive a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows gives no handle to a folder
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(number)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, so that a power cut does not take it away."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        make_folder(path.parent)
        temporary.write_bytes(text.encode())
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise disk_error(path, error) from error


def write_folder(final: Path, write: Callable[[Path], Any]) -> None:
    """Like `write_whole` for a folder, which `write(folder)` fills.

    Raises:
        UserError: as there.
    """
    temporary = final.with_name(WRITING)
    try:
        with disk_errors(final):
            if temporary.exists():  # what an interrupted write has left
                shutil.rmtree(temporary)
            make_folder(temporary)
            write(temporary)
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            discard(final)
            os.replace(temporary, final)
            sync(final.parent)
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def discard(folder: Path) -> None:
    """Removes a folder, if it is there; no half of it is ever found under its name."""
    if folder.is_dir():
        going = folder.with_name(REMOVING)
        shutil.rmtree(going, ignore_errors=True)
        os.replace(folder, going)
        shutil.rmtree(going, ignore_errors=True)


def sha256_of(path: Path, size: int | None = None) -> str:
    """The checksum of a file, or of its first `size` bytes."""
    with path.open("rb") as stream:
        if size is None:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        return hashlib.sha256(stream.read(size)).hexdigest()


def disk_error(path: Path, error: OSError) -> UserError:
    remedy = "allow writing there" if error.errno in FORBIDDEN else "free some space"
    return UserError(f"Could not write {path.name} ({error.strerror or error}); {remedy} or "
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


def log_bytes(path: Path) -> bytes | None:
    """What is in a log; a published one may be packed, as `<name>.gz`. None where there is neither.

    Raises:
        UserError: the packed file is damaged, or holds more than `LARGEST_LOG` bytes.
    """
    packed = path.with_name(path.name + PACKED)
    if path.exists() or not packed.exists():
        return path.read_bytes() if path.exists() else None
    try:
        with gzip.open(packed) as stream:
            content = stream.read(LARGEST_LOG + 1)
        if len(content) > LARGEST_LOG:
            raise OSError(f"it unpacks to more than {LARGEST_LOG:,} bytes")
        return content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{packed.name} in {path.parent} cannot be unpacked ({error}); get it back "
                        "from where it came.") from error


def parse_lines(content: bytes) -> list[dict]:
    """The lines of a log. A last line that was cut off is left out.

    Raises:
        DamagedLine: another line is not a JSON object.
    """
    lines, rows = content.splitlines(), []  # of a text it would split at U+2028 too
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no object")
            rows.append(row)
        except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
            if number < len(lines):
                raise DamagedLine(number) from error
    return rows


class DamagedLine(ValueError):
    """The line of a log, from 1 on, that is not a JSON object."""


class RunFolder:
    """The folder of one run: `<experiment>/<setup>/seed-<n>/`.

    Args:
        silent: what is written goes nowhere: another process writes this record.
    """

    def __init__(self, path: Path, silent: bool = False):
        self.path, self.silent = path, silent

    # Whole files -------------------------------------------------------------------------------

    def write(self, name: str, value: Any) -> None:
        if self.silent:
            return
        write_whole(self.path / name, to_json(value, indent=2) + "\n")

    def write_lines(self, name: str, rows: Iterable[Mapping]) -> None:
        if self.silent:
            return
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
        """The lines of a log; none where there is no such log.

        Raises:
            UserError: a line before the last is damaged.
        """
        try:
            return parse_lines(log_bytes(self.path / name) or b"")
        except DamagedLine as line:
            raise UserError(f"Line {line} of {name} is damaged; delete the run folder "
                            f"{self.path.name} and run it again.") from line

    @property
    def is_complete(self) -> bool:
        """Whether the run was trained, evaluated and recorded to its end."""
        manifest = self.read("manifest.json")
        return bool(manifest and manifest.get("complete"))

    @property
    def has_begun(self) -> bool:
        """Whether anything was recorded beside the settings."""
        return any((self.path / name).exists()
                   for name in (*LOGS, ANSWERS, "manifest.json", "checkpoint"))

    def refuse_other_numerics(self, experiment: str) -> None:
        """Refuses a run whose numbers this version would not give.

        Args:
            experiment: for the sentence.

        Raises:
            UserError: it was begun by a version with another `NUMERICS_VERSION`.
        """
        numerics = (self.read("config.json") or {}).get("numerics_version", 1)  # the first say none
        if numerics != NUMERICS_VERSION:
            raise UserError(
                f"The run {self.path.parent.name}/{self.path.name} of experiment {experiment} was "
                "made by an older or newer hybridrl_lib, whose numbers differ (numerics version "
                f"{numerics}, this is {NUMERICS_VERSION}); choose another --experiment or delete "
                "its folder.")

    def checksums(self) -> dict[str, str]:
        """{name: sha256} of the logs and answers that are there; packing them changes none."""
        contents = {name: log_bytes(self.path / name) for name in (*LOGS, ANSWERS)}
        return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()
                if content is not None}

    def altered(self) -> list[str]:
        """Logs and answers of a finished run that are not what its manifest says.

        Manifests from before checksums say nothing.
        """
        manifest, now = self.read("manifest.json") or {}, self.checksums()
        return [name for name, value in manifest.get("checksums", {}).items()
                if now.get(name) != value]

    # Logs --------------------------------------------------------------------------------------

    def append(self, name: str, row: Mapping) -> None:
        """Adds a line to a log."""
        if self.silent:
            return
        path = self.path / name
        try:
            make_folder(path.parent)
            with path.open("ab") as stream:
                stream.write((to_json(row) + "\n").encode())
        except OSError as error:
            raise disk_error(path, error) from error

    def sync_logs(self) -> None:
        """Waits until the logs are on the disk."""
        with disk_errors(self.path):
            for path in (self.path / name for name in LOGS):
                if path.exists():
                    sync(path)
            sync(self.path)

    def log_marks(self) -> dict[str, list]:
        """{name: [bytes, sha256]} of the logs as they are now."""
        paths = [self.path / name for name in LOGS if (self.path / name).exists()]
        return {path.name: [path.stat().st_size, sha256_of(path)] for path in paths}

    def damaged_logs(self, marks: Mapping[str, list]) -> list[str]:
        """Logs that are no longer what they were when `marks` were taken, further lines aside."""
        def is_whole(path: Path, size: int, checksum: str) -> bool:
            return path.is_file() and sha256_of(path, size) == checksum

        return [name for name, mark in marks.items() if not is_whole(self.path / name, *mark)]

    def cut_logs(self, marks: Mapping[str, list]) -> None:
        """Takes back the lines after `marks`, whose steps will be taken again."""
        for path in (self.path / name for name in LOGS):
            if path.exists():
                with disk_errors(path):
                    if path.name in marks:
                        os.truncate(path, marks[path.name][0])
                    else:
                        path.unlink()


def seed_of(*parts: int | str) -> int:
    """A seed for one purpose of one run, from the run's seed and the purpose's names."""
    return zlib.crc32("/".join(map(str, parts)).encode())

"""Writes files and folders atomically, and reads line logs.

Everything is written under a temporary name, synced to disk, and renamed. A line log can lose its
last line only.
"""

import errno
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..system.errors import UserError

PACKED, LARGEST_LOG = ".gz", 2**30  # bytes; packed files could hold far more
WRITING, REMOVING = "writing", "removing"  # folders that are not complete, or no longer
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # some network file systems


def to_json(value: Any, **arguments) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **arguments)


# Writing ----------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, would survive a power failure."""
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
    """Makes a folder and its parents so that they survive a power failure."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def write_whole(path: Path, content: str | bytes) -> Path:
    """Writes a file so that readers see the old one or the new one; returns its path.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        make_folder(path.parent)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise disk_error(path, error) from error
    return path


def write_folder(final: Path, write: Callable[[Path], Any]) -> None:
    """Like `write_whole` for a folder, which `write(folder)` fills.

    Raises:
        UserError: as there.
    """
    temporary = final.with_name(WRITING)
    try:
        with disk_errors(final):
            if temporary.exists():  # left by an interrupted write
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
    """Removes a folder if it exists; no part of it is ever found under its name."""
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
                     "it resumes from the last checkpoint.")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Converts errors of tensor writers on a full or read-only disk to a `UserError`.

    safetensors has its own type of error; torch.save raises a RuntimeError known by its text only.
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
    """The content of a log, which may be packed as `<name>.gz`; None if there is neither.

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
        raise UserError(f"{packed.name} in {path.parent} cannot be unpacked ({error}); restore it "
                        "from its source.") from error


def parse_lines(content: bytes) -> list[dict]:
    """The lines of a log, without an incomplete last line.

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
    """The number of a log's line, from 1, that is not a JSON object."""

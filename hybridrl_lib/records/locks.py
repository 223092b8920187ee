"""Locks a folder so that one process at a time writes it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..system.errors import UserError
from .files import disk_error, make_folder

try:
    import fcntl
except ImportError:  # Windows has no flock; nothing is locked there
    fcntl = None


@contextmanager
def only_writer(folder: Path, what: str) -> Iterator[None]:
    """Holds the lock file `folder/.lock` inside the `with` block.

    The system releases the lock when the process ends, even if it is killed. On a file system
    without locks nothing is locked.

    Args:
        folder: made if missing.
        what: the folder's content, for the message, such as `The run sft/seed-0`.

    Raises:
        UserError: another process holds the lock (the message has its number), or the folder cannot
            be written.
    """
    path = folder / ".lock"
    try:
        make_folder(folder)
        stream = _open_locked(path, what) if fcntl else None
    except OSError as error:
        raise disk_error(folder, error) from error
    try:
        yield
    finally:
        if stream is not None:
            with suppress(OSError):  # the folder may have become read-only meanwhile
                path.unlink()  # while it is still locked and so still ours
            stream.close()


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of a folder."""
    path = folder / ".lock"
    if not fcntl or not path.exists():
        return False
    try:
        with path.open("r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # it was just removed, or there are no locks
        return False
    return False


def _open_locked(path: Path, what: str):
    """The locked file with this process's number in it; None if locks are not supported."""
    while True:
        stream = path.open("a+", encoding="utf-8")
        try:
            _take(stream)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read().strip() or "unknown"
            stream.close()
            raise UserError(f"{what} is being written by another process (number {owner}); wait "
                            "until it ends, stop it, or choose another --experiment.") from None
        except OSError:  # some network file systems
            stream.close()
            return None
        if _is_current(stream, path):
            break
        stream.close()  # its owner has just removed it; take the new one
    with suppress(OSError):  # on a full disk only the owner's number is missing
        stream.truncate(0)
        os.write(stream.fileno(), str(os.getpid()).encode())
    return stream


def _take(stream) -> None:
    """Locks a file, with some retries because `is_locked` may hold it for an instant."""
    for again in (True, True, True, True, False):
        try:
            return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not again:
                raise
            time.sleep(0.02)


def _is_current(stream, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False

"""A folder that one process at a time may write."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock: nothing is locked there
    fcntl = None


@contextmanager
def only_writer(folder: Path, what: str) -> Iterator[None]:
    """Holds the lock file `folder/.lock` inside the `with` block.

    The system gives the lock back when its process ends, however it ends: a file left behind by a
    process that was killed keeps nobody out. A file system without locks is written unlocked.

    Args:
        folder: made if missing.
        what: what the folder holds, for the error, such as `The run sft/seed-0`.

    Raises:
        UserError: another process holds it; the sentence has its number.
    """
    path = folder / ".lock"
    folder.mkdir(parents=True, exist_ok=True)
    stream = _open_locked(path, what) if fcntl else None
    try:
        yield
    finally:
        if stream is not None:
            path.unlink(missing_ok=True)  # while it is still locked, so that it is surely ours
            stream.close()


def _open_locked(path: Path, what: str):
    """The locked file with this process's number in it; None where locks are not supported."""
    while True:
        stream = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        stream.close()  # its owner has just removed it: take the new one
    stream.truncate(0)
    stream.write(str(os.getpid()))
    stream.flush()
    return stream


def _is_current(stream, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False

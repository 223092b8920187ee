"""Moments of a run: its operations on the results folder, counted, one of which is struck."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


class Moments:
    """Counts this process's operations on a folder and calls `strike` before each from `at` on."""

    def __init__(self, folder: Path, at: int, strike: Callable[[], None],
                 changes_only: bool = False):
        self.folder, self.at, self.strike = str(folder), at, strike
        self.changes_only, self.count, self.changes = changes_only, 0, 0
        self.fsync = os.fsync
        os.fsync = self._sync
        sys.addaudithook(self._hear)

    def _sync(self, number: int) -> None:
        self._happen()
        self.fsync(number)

    def _hear(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes | os.PathLike):
                return
            if self._is_ours(path):
                self._happen(changes=bool(flags & WRITING))
        elif event in CHANGES and (self._is_ours(arguments[0]) or arguments[-1] not in (-1, None)
                                   and event in ("os.remove", "os.rmdir")):
            self._happen()

    def _is_ours(self, path) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder)

    def _happen(self, changes: bool = True) -> None:
        self.count += 1
        self.changes += changes
        if changes or not self.changes_only:
            if (self.changes if self.changes_only else self.count) >= self.at:
                self.strike()

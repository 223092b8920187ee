"""The record of one run: `<experiment>/<setup>/seed-<n>/`."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..setups import SETUPS
from ..system.errors import UserError, unknown
from .files import (
    DamagedLine,
    disk_error,
    disk_errors,
    log_bytes,
    make_folder,
    parse_lines,
    sha256_of,
    sync,
    to_json,
    write_whole,
)

# Raised whenever a reference run's digest changes (tests/training/test_numerics.py).
NUMERICS_VERSION = 2
LOGS = ("metrics.jsonl", "probe.jsonl", "validation.jsonl", "samples.jsonl")
ANSWERS = "eval.jsonl"


def run_folder(experiment: Path, setup: str, seed: int) -> "RunFolder":
    """The folder of a run: `<experiment>/<setup>/seed-<n>/`.

    Args:
        experiment: from `experiment_folder`.
        setup, seed: from a user, a notebook's parameters, or a record.

    Raises:
        UserError: an unknown setup or an invalid seed.
    """
    if not isinstance(setup, str) or setup not in SETUPS:
        raise unknown("setup", setup, SETUPS)
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or seed < 0:
        raise UserError(f"The seed {seed!r} is not a non-negative integer; give one, such as 0.")
    return RunFolder(experiment / setup / f"seed-{int(seed)}")


class RunFolder:
    """The folder of one run: `<experiment>/<setup>/seed-<n>/`.

    Args:
        silent: write nothing, because another process writes this record.
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
        """The lines of a log; none if it does not exist.

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
        """Whether the run was trained, evaluated, and recorded completely."""
        manifest = self.read("manifest.json")
        return bool(manifest and manifest.get("complete"))

    @property
    def has_begun(self) -> bool:
        """Whether anything was recorded in addition to the settings."""
        return any((self.path / name).exists()
                   for name in (*LOGS, ANSWERS, "manifest.json", "checkpoint"))

    def refuse_other_numerics(self, experiment: str) -> None:
        """Refuses a run that another version would continue with other numbers.

        Args:
            experiment: for the message.

        Raises:
            UserError: it has another `NUMERICS_VERSION`.
        """
        numerics = (self.read("config.json") or {}).get("numerics_version", 1)  # the first say none
        if numerics != NUMERICS_VERSION:
            raise UserError(
                f"The run {self.path.parent.name}/{self.path.name} of experiment {experiment} was "
                "made by an older or newer hybridrl_lib, whose numbers differ (numerics version "
                f"{numerics}, this is {NUMERICS_VERSION}); choose another --experiment or delete "
                "its folder.")

    def checksums(self) -> dict[str, str]:
        """{name: sha256} of the existing logs and answers, packed or not."""
        contents = {name: log_bytes(self.path / name) for name in (*LOGS, ANSWERS)}
        return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()
                if content is not None}

    def altered(self) -> list[str]:
        """Logs and answers of a finished run that differ from its manifest.

        Old manifests have no checksums.
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
        """Logs that differ from what they were at `marks`, apart from further lines."""
        def is_whole(path: Path, size: int, checksum: str) -> bool:
            return path.is_file() and sha256_of(path, size) == checksum

        return [name for name, mark in marks.items() if not is_whole(self.path / name, *mark)]

    def cut_logs(self, marks: Mapping[str, list]) -> None:
        """Removes the lines after `marks`, whose steps will be repeated."""
        for path in (self.path / name for name in LOGS):
            if path.exists():
                with disk_errors(path):
                    if path.name in marks:
                        os.truncate(path, marks[path.name][0])
                    else:
                        path.unlink()

"""Checkpoints, from which an unfinished run resumes.

A checkpoint is a folder `checkpoint/step-<n>`. Its `checksums.json`, written last, has the checksum
of every file in it and of every log up to it. A run resumes only from a checkpoint whose files and
logs match. Others are renamed, and the one before is used.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..records.files import (
    REMOVING,
    WRITING,
    discard,
    disk_errors,
    sha256_of,
    sync,
    to_json,
    write_folder,
)
from ..records.run_folder import LOGS, RunFolder

CHECKSUMS = "checksums.json"
KEPT = 2  # should the newest be damaged, the other is there


@dataclass
class Snapshot:
    """The content of a checkpoint.

    Attributes:
        state: counters and other plain data.
        weights: the trained weights.
        best: the same at the step with the best validation score.
        optimizer, scaler: their state; a scaler exists in fp16 only.
        more: other tensors, of the method and of the KL anchor.
    """

    state: dict[str, Any]
    weights: dict[str, Tensor]
    best: dict[str, Tensor] | None
    optimizer: dict
    scaler: dict | None
    more: dict[str, Tensor] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        save_file({name: weight.detach().cpu().contiguous()
                   for name, weight in self.weights.items()}, folder / "weights.safetensors")
        if self.best is not None:
            save_file(self.best, folder / "best.safetensors")
        torch.save(self.optimizer, folder / "optimizer.pt")
        if self.scaler is not None:
            torch.save(self.scaler, folder / "scaler.pt")
        if self.more:
            save_file({name: tensor.detach().cpu().contiguous()
                       for name, tensor in self.more.items()}, folder / "more.safetensors")
        (folder / "state.json").write_text(to_json(self.state), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Snapshot":
        """The inverse of `write`. Passes on what the libraries raise for a damaged file."""
        best, scaler, more = (folder / name for name in
                              ("best.safetensors", "scaler.pt", "more.safetensors"))
        return cls(
            state=json.loads((folder / "state.json").read_text(encoding="utf-8")),
            weights=load_file(folder / "weights.safetensors"),
            best=load_file(best) if best.exists() else None,
            optimizer=read_tensors(folder / "optimizer.pt"),
            scaler=read_tensors(scaler) if scaler.exists() else None,
            more=load_file(more) if more.exists() else {})


def read_tensors(path: Path) -> dict:
    """Reads a file written by torch.save that holds tensors and plain values only.

    The format is a pickle, which could run code. torch refuses that; this project does not turn the
    refusal off.

    Raises:
        ValueError: it is damaged or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path.name} is damaged or holds more than tensors") from error


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: RunFolder):
        self.run, self.root = run, run.path / "checkpoint"

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Writes the checkpoint of a step, filled by `write(folder)`, then removes older ones.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        def write_with_checksums(folder: Path) -> None:
            self.run.sync_logs()
            write(folder)
            seal = {"files": {path.name: sha256_of(path) for path in sorted(folder.iterdir())},
                    "logs": self.run.log_marks()}
            (folder / CHECKSUMS).write_text(to_json(seal), encoding="utf-8")

        write_folder(self.root / f"step-{step:06d}", write_with_checksums)
        for _, folder in self.found()[KEPT:]:
            with disk_errors(folder):
                discard(folder)

    def found(self) -> list[tuple[int, Path]]:
        """(step, folder) of all checkpoints, valid or not, newest first."""
        numbers = {path: path.name.removeprefix("step-") for path in self.root.glob("step-*")}
        return sorted(((int(number), path) for path, number in numbers.items()
                       if number.isdecimal() and path.is_dir()), reverse=True)

    def resume(self, say: Callable[[str], None]) -> tuple[int, Path] | None:
        """(step, folder) of the newest valid checkpoint, with the logs cut back to it.

        Returns None, with empty logs, if there is none. Invalid ones are renamed.

        Args:
            say: receives a sentence for each of these.
        """
        damaged, whole = [], None
        for step, folder in self.found():
            fault = self._fault(folder)
            if not fault:
                whole = step, folder
                break
            damaged.append((step, fault, self._set_aside(folder)))
        then = f"resumes from step {whole[0]}" if whole else "starts from its beginning"
        for step, fault, place in damaged:
            say(f"the checkpoint of step {step} cannot be used ({fault}) and is kept as "
                f"checkpoint/{place.name}; the run {then}")
        self.run.cut_logs(read_checksums(whole[1])["logs"] if whole else {})
        return whole

    def left_over(self) -> list[Path]:
        """What only an unfinished run needs, without the final model and renamed checkpoints."""
        return [path for path in self.root.glob("*")
                if path.name.startswith("step-") or path.name in (WRITING, REMOVING)]

    def drop(self) -> None:
        """Removes what only an unfinished run needs."""
        for path in self.left_over():
            shutil.rmtree(path, ignore_errors=True)

    def _fault(self, folder: Path) -> str:
        """Why a run cannot resume from a checkpoint; empty if it can."""
        try:
            seal = read_checksums(folder)
            wrong = [name for name, checksum in seal["files"].items()
                     if sha256_of(folder / name) != checksum]
            wrong += self.run.damaged_logs(seal["logs"])
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return f"{CHECKSUMS} is damaged"
        return f"{wrong[0]} is damaged or cut off" if wrong else ""

    def _set_aside(self, folder: Path) -> Path:
        """Renames a checkpoint to `damaged-step-<n>` and adds a copy of the logs."""
        name = f"damaged-{folder.name}"
        places = (folder.with_name(name + (f"-{number}" if number else "")) for number in count())
        place = next(path for path in places if not path.exists())
        with disk_errors(folder):
            for log in (self.run.path / log for log in LOGS):
                if log.exists():
                    shutil.copy2(log, folder / log.name)
            os.replace(folder, place)
            sync(self.root)
        return place


def read_checksums(folder: Path) -> dict:
    """{"files": {name: sha256}, "logs": {name: [bytes, sha256]}} of a checkpoint."""
    return json.loads((folder / CHECKSUMS).read_bytes())

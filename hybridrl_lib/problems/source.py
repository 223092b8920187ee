"""Rows of a public data set, from the folder `HYBRIDRL_DATA_DIR` or from the hub.

Both give the same rows in the same order, and so the same ids and splits.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..system.errors import UserError
from ..system.hub import cache_only_if_unreachable

FOLDER_VARIABLE = "HYBRIDRL_DATA_DIR"
FOLDER_HINT = (f"set {FOLDER_VARIABLE} to a folder with gsm8k/train.jsonl, gsm8k/test.jsonl "
               "and math500/test.jsonl")


@dataclass(frozen=True)
class Source:
    """Where a data set is.

    Attributes:
        folder: its folder under `HYBRIDRL_DATA_DIR`, with one `<split>.jsonl` per split.
        path: its name on the hub.
        name: its configuration there; None if there is only one.
        splits: its splits, in the order in which they are joined.
        revision: the commit on the hub, so that the rows never change.
    """

    folder: str
    path: str
    name: str | None
    splits: tuple[str, ...]
    revision: str


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Attributes:
        values: column -> value.
        split: its split (file).
        index: its number in the split, from 0.
        place: the same in words, for messages.
    """

    values: dict
    split: str
    index: int
    place: str

    def text(self, column: str) -> str:
        """The text in a column.

        Raises:
            UserError: it is missing or empty.
        """
        value = self.values.get(column)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"There is no {column} in {self.place}; fix or remove that row.")
        return value


def load_rows(source: Source) -> tuple[list[Row], str]:
    """All rows of a data set, and their revision.

    Raises:
        UserError: a file is missing or is not JSON lines, or the hub cannot be reached.
    """
    folder = os.environ.get(FOLDER_VARIABLE, "").strip()
    if folder:
        return _from_folder(source, Path(folder).expanduser())
    return _from_hub(source)


def _from_folder(source: Source, folder: Path) -> tuple[list[Row], str]:
    if not folder.is_dir():
        raise UserError(f"{FOLDER_VARIABLE} names {folder}, which is not a folder; {FOLDER_HINT}, "
                        "or unset it to read the hub.")
    rows, digests = [], []
    for split in source.splits:
        file = folder / source.folder / f"{split}.jsonl"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); {FOLDER_HINT}, or unset it "
                            "to read the hub.") from error
        digests.append(f"{file.name}={hashlib.sha256(content).hexdigest()}")
        rows.extend(_parse(content, file, split))
    return rows, "sha256 " + " ".join(digests)


def _parse(content: bytes, file: Path, split: str) -> Iterator[Row]:
    index = 0
    # Split on "\n" alone: text may hold other line separators, such as U+2028.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number} of {file}"
        try:
            values = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise UserError(f"There is no valid JSON in {place}; copy the file again.") from error
        if not isinstance(values, dict):
            raise UserError(f"There is no JSON object in {place}; copy the file again.")
        yield Row(values, split, index, place)
        index += 1
    if index == 0:
        raise UserError(f"{file} holds no rows; copy the file again.")


def _from_hub(source: Source) -> tuple[list[Row], str]:
    from datasets import load_dataset  # takes a second, and only this function needs it

    rows = []
    for split in source.splits:
        try:
            with cache_only_if_unreachable():
                table = load_dataset(source.path, source.name, split=split,
                                     revision=source.revision)
        except Exception as error:  # no connection, proxy, time-out, full disk: many types
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(f"{source.path} could not be read from the hub ({reason.rstrip('.')}); "
                            f"go online or {FOLDER_HINT}.") from error
        rows.extend(Row(dict(values), split, index, f"row {index} of {source.path} ({split})")
                    for index, values in enumerate(table))
    return rows, f"hub {source.path}@{source.revision}"

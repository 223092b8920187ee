"""What a model's own files ask for, looked at before anything is loaded.

transformers keeps code out (`trust_remote_code`) and reads pickles as tensors only. Three ways are
left in which a folder decides what is loaded besides itself; they are closed here.
"""

import json
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from transformers.utils import cached_file

from .errors import UserError

INDEX = "model.safetensors.index.json"


def refuse_redirections(source: str, arguments: dict, path: str) -> None:
    """Refuses a folder or hub model that points away from its own safetensors files.

    Args:
        source: a folder or a hub name.
        arguments: what `from_pretrained` takes beside it, such as `revision`.
        path: what the user calls it, for the sentence.

    Raises:
        UserError: an index of shards that names another kind of file or another folder, an adapter
            (its base model would be loaded from wherever it says), or a kernel from the hub.
    """
    if _content(source, "adapter_config.json", arguments) is not None:
        raise UserError(f"The model {path} is an adapter of another model; merge it into that one "
                        "and give the folder of the whole model.")
    index = _content(source, INDEX, arguments)
    shards = index.get("weight_map") if isinstance(index, dict) else {}
    for shard in shards.values() if isinstance(shards, dict) else [shards]:
        name = str(shard)
        if PurePath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"The file {INDEX} of the model {path} names {name!r}; only "
                            "safetensors files of the same folder are read, so save the model "
                            "again.")
    for key, value in _entries(_content(source, "config.json", arguments)):
        # transformers would fetch that repository and run its code; trust_remote_code does not
        # cover it, and this entry wins over the argument of from_pretrained
        if key.lstrip("_").startswith("attn_implementation") and "/" in str(value):
            raise UserError(f"The config.json of the model {path} asks for the kernel {value!r}, "
                            f"which is code from the hub and is not run; remove the entry {key}.")


def _content(source: str, name: str, arguments: dict) -> Any:
    """A JSON file of the model; None if it is not there or broken, which loading reports."""
    try:
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False, **arguments)
        if file is None:
            return None
        with open(file, encoding="utf-8") as stream:
            return json.load(stream)
    except (OSError, ValueError):
        return None


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested JSON objects with its value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner)

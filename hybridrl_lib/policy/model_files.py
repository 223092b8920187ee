"""Checks of a model's files before anything is loaded.

transformers refuses code (`trust_remote_code`) and reads pickles as tensors only. A folder has
three more ways to load something other than itself; they are refused here.
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, __version__

from ..system.errors import UserError

INDEX = "model.safetensors.index.json"


def refuse_wrong_architecture(folder: Path, path: str) -> None:
    """Refuses a model that is not a causal language model, before its weights are fetched or read.

    transformers would load some of them with a random output layer.

    Args:
        folder: with its config.json.
        path: the user's name for it, for the message.

    Raises:
        UserError: its config.json names another kind of model, or one that transformers lacks.
    """
    config = _content(folder, "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return  # loading says what is wrong
    kind, names = config["model_type"], config.get("architectures") or []
    needed = "a causal language model such as Qwen2ForCausalLM is needed; choose another model.path"
    if kind not in CONFIG_MAPPING:
        raise UserError(f"The model {path} has the architecture {kind!r}, which transformers "
                        f"{__version__} lacks, and code from a model is not run; {needed}.")
    known = {one.__name__ for one in MODEL_FOR_CAUSAL_LM_MAPPING.values()}
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING or (
            names and not known & {str(name) for name in names}):
        raise UserError(f"The model {path} is of the architecture {str((names or [kind])[0])!r}, "
                        f"and {needed}.")


def refuse_redirections(folder: Path, path: str) -> None:
    """Refuses a model that refers to anything but its own safetensors files.

    Args:
        folder: with its JSON files.
        path: the user's name for it, for the message.

    Raises:
        UserError: an index of shards that names another kind of file or another folder, an adapter,
            whose base model could be anywhere, or a kernel from the hub.
    """
    if _content(folder, "adapter_config.json") is not None:
        raise UserError(f"The model {path} is an adapter of another model; merge it into that one "
                        "and give the folder of the whole model.")
    index = _content(folder, INDEX)
    shards = index.get("weight_map") if isinstance(index, dict) else {}
    for shard in shards.values() if isinstance(shards, dict) else [shards]:
        name = str(shard)
        if PurePath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"The file {INDEX} of the model {path} names {name!r}; only "
                            "safetensors files of the same folder are read, so save the model "
                            "again.")
    for key, value in _entries(_content(folder, "config.json")):
        # transformers would fetch that repository and run its code; trust_remote_code does not
        # cover it, and this entry wins over the argument of from_pretrained
        if key.lstrip("_").startswith("attn_implementation") and "/" in str(value):
            raise UserError(f"The config.json of the model {path} asks for the kernel {value!r}, "
                            f"which is code from the hub and is not run; remove the entry {key}.")


def _content(folder: Path, name: str) -> Any:
    """A JSON file of the model; None if it is missing or broken, which loading reports."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested JSON objects with its value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner)

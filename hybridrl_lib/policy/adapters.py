"""LoRA adapters: which model an adapter folder belongs to, and merging it.

The folder is not trusted. Weights are read from safetensors only, a few numbers and names are taken
from its configuration, and its base model is loaded like any other.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..system.errors import UserError, reason
from ..system.paths import is_missing, without_home

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEEPEST = 8  # adapters of adapters
# What an adapter's configuration may say without changing how it is computed. Anything else has to
# be off: an unknown option of another release may make another model of the same weights.
HARMLESS = {"base_model_name_or_path", "revision", "task_type", "peft_type", "auto_mapping",
            "peft_version", "inference_mode", "r", "lora_alpha", "target_modules", "lora_dropout",
            "bias", "use_rslora", "init_lora_weights", "megatron_core", "qalora_group_size"}
OFF = (None, False, [], {})
# Other ways to begin (PiSSA, OLoRA, CorDA, ...) change the base weights, too.
BEGINNINGS = (True, False, "gaussian")


def inner_model(model) -> PreTrainedModel:
    """The model of `transformers` in a `PeftModel`; without an adapter the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def in_embeddings(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The layer names that belong to an embedding or the output layer.

    Scores and sampler read these weights directly, and they may be shared, so they get no adapter.
    """
    words = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module in words}
    return [name for name in names if name in found]


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hides a PEFT warning about a renamed argument, which users cannot fix."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        yield


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter but no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def unfold(path: str) -> tuple[list[Path], str, str | None]:
    """(adapter folders, the model beneath them, its commit) for `model.path`.

    An adapter may belong to a model that is itself an adapter folder. Folders are in the order in
    which they are merged.

    Raises:
        UserError: an adapter does not name its model, or names a folder that does not exist.
    """
    folders: list[Path] = []
    revision = None
    while is_adapter(Path(path).expanduser()):
        folder = Path(path).expanduser()
        if len(folders) == DEEPEST or folder.resolve() in [f.resolve() for f in folders]:
            raise UserError(f"The adapter {folders[0]} is one of itself or of too many others; "
                            "give the folder of a whole model.")
        folders.insert(0, folder)
        path, revision = base_of(folder)
    return folders, path, revision


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base model of an adapter, as for `model.path`, and its commit on the hub."""
    config = read_config(folder)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    advice = (f"write it into base_model_name_or_path of its {CONFIG} (a folder, a hub name or a "
              "GGUF file)")
    if not isinstance(base, str) or not base.strip():
        raise UserError(f"The adapter {folder} does not name its base model; {advice}.")
    if is_missing(base):
        raise UserError(f"The model {base} that the adapter {folder} belongs to is not there; "
                        f"{advice}.")
    return base, revision if isinstance(revision, str) and revision else None


def read_config(folder: Path) -> dict:
    """The content of adapter_config.json."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no settings")
        return config
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"The {CONFIG} of {folder} cannot be read ({reason(error)}); save the "
                        "adapter again.") from error


def remember_base(model, path: str, revision: str | None) -> None:
    """Records in an adapter's folder what it was trained on, as for `model.path`."""
    place = Path(path).expanduser()
    if path != "tiny" and place.exists():
        path = without_home(str(place.resolve()))
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = path, revision


def merge_into(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with an adapter merged into its weights.

    Raises:
        UserError: it is not a plain LoRA adapter in safetensors, or belongs to another model.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = read_config(folder)
    odd = [name for name, value in config.items() if name not in HARMLESS and value not in OFF]
    odd += [name for name, allowed in (("peft_type", ("LORA",)), ("bias", ("none",)),
                                       ("init_lora_weights", BEGINNINGS))
            if config.get(name, allowed[0]) not in allowed]
    targets, rank, alpha = (config.get(name) for name in ("target_modules", "r", "lora_alpha"))
    if not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)
            and type(rank) is int and 0 < rank <= 65_536 and isinstance(alpha, int | float)):
        odd.append("target_modules, r or lora_alpha")
    if odd:
        raise UserError(f"The adapter {folder} is not a plain LoRA adapter ({', '.join(odd)}); "
                        "merge it with the tool that made it and give the merged model's folder.")
    if in_embeddings(model, targets):
        raise UserError(f"The adapter {folder} is one of the embeddings too, which may be tied to "
                        "each other; merge it with the tool that made it and give the folder of "
                        "the whole model.")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"The adapter {folder} has no {WEIGHTS}; only safetensors are read, so "
                        "save the adapter again.")
    try:
        weights = load_file(folder / WEIGHTS)
        # By name, not by pattern: a pattern out of a file could keep a machine busy for ever.
        with quiet_peft():
            both = get_peft_model(model, LoraConfig(
                r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=sorted(set(targets)),
                use_rslora=bool(config.get("use_rslora", False)), task_type="CAUSAL_LM"))
        left = set_peft_model_state_dict(both, weights)
        own = {name for name, _ in both.named_parameters() if "lora_" in name}
        missing = own & set(left.missing_keys)
        if left.unexpected_keys or missing:
            raise ValueError("its weights are those of other layers")
        return both.merge_and_unload()
    except Exception as error:  # of PEFT, safetensors or torch: wrong names, sizes or a cut file
        raise UserError(f"The adapter {folder} cannot be added to its model ({reason(error)}); "
                        f"check base_model_name_or_path in its {CONFIG}.") from error

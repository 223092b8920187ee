"""Adapter folders, as a LoRA run leaves them: whose adapter it is, and adding it to those weights.

What the folder says is not trusted: its weights are read from safetensors alone, of its
configuration a handful of numbers and names is used, and its base model is loaded like any other.
"""

import json
import warnings
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from .errors import UserError, reason
from .home import without_home

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEEPEST = 8  # adapters of adapters
# What changes how an adapter is computed, and its value in those of this project.
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "modules_to_save": None,
         "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {},
         "fan_in_fan_out": False, "trainable_token_indices": None, "target_parameters": None,
         "layer_replication": None, "megatron_config": None, "exclude_modules": None}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def unfold(path: str) -> tuple[list[Path], str]:
    """(adapter folders, the model beneath them) for what `model.path` says.

    An adapter may be one of a model that is itself given as an adapter folder: the folders are in
    the order in which they are added to the weights.

    Raises:
        UserError: an adapter does not say whose it is, or says a folder that is not there.
    """
    folders: list[Path] = []
    while is_adapter(Path(path).expanduser()):
        folder = Path(path).expanduser()
        if len(folders) == DEEPEST or folder.resolve() in [f.resolve() for f in folders]:
            raise UserError(f"The adapter {folders[0]} is one of itself or of too many others; "
                            "give the folder of a whole model.")
        folders.insert(0, folder)
        path = base_of(folder)
    return folders, path


def base_of(folder: Path) -> str:
    """What an adapter was trained on, as `model.path` takes it."""
    base = read_config(folder).get("base_model_name_or_path")
    advice = (f"write it into base_model_name_or_path of its {CONFIG} (a folder, a hub name or a "
              "GGUF file)")
    if not isinstance(base, str) or not base.strip():
        raise UserError(f"The adapter {folder} does not say which model it belongs to; {advice}.")
    place = Path(base).expanduser()
    if (place.is_absolute() or base.startswith((".", "~"))) and not place.exists():
        raise UserError(f"The model {base} that the adapter {folder} belongs to is not there; "
                        f"{advice}.")
    return base


def read_config(folder: Path) -> dict:
    """adapter_config.json, as far as JSON goes."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no settings")
        return config
    except (OSError, ValueError) as error:
        raise UserError(f"The {CONFIG} of {folder} cannot be read ({reason(error)}); save the "
                        "adapter again.") from error


def remember_base(model, path: str) -> None:
    """Has an adapter's own folder say what it was trained on, as `model.path` takes it."""
    place = Path(path).expanduser()
    if path != "tiny" and place.exists():
        path = without_home(str(place.resolve()))
    for config in model.peft_config.values():
        config.base_model_name_or_path = path


def merge_into(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with an adapter added into its weights.

    Raises:
        UserError: it is no plain LoRA adapter in safetensors, or one of another model.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = read_config(folder)
    odd = [name for name, value in PLAIN.items() if config.get(name, value) not in (value, None)]
    targets, rank, alpha = (config.get(name) for name in ("target_modules", "r", "lora_alpha"))
    if not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)
            and type(rank) is int and 0 < rank <= 65_536 and isinstance(alpha, int | float)):
        odd.append("target_modules, r or lora_alpha")
    if odd:
        raise UserError(f"The adapter {folder} is no plain LoRA adapter ({', '.join(odd)}); merge "
                        "it with the tool that made it and give the folder of the whole model.")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"The adapter {folder} has no {WEIGHTS}; only safetensors are read, so "
                        "save the adapter again.")
    try:
        weights = load_file(folder / WEIGHTS)
        # By name, not by pattern: a pattern out of a file could keep a machine busy for ever.
        with warnings.catch_warnings():
            # PEFT asks for what transformers has renamed: nothing that a user could mend.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
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


def merge(run: Path, out: Path) -> Path:
    """Writes the whole model of a LoRA run: its adapter added into its base's weights, in fp32.

    Args:
        run: a run's folder, or an adapter folder.
        out: a new folder.

    Returns:
        The adapter folder.

    Raises:
        UserError: there is no adapter, its base is not there, or `out` is.
    """
    from .card import merged_card
    from .config import ModelSettings
    from .policy import load_policy
    from .records import write_folder

    folder = next((f for f in (run, run / "checkpoint" / "final") if (f / CONFIG).is_file()), None)
    if folder is None:
        whole = run / "checkpoint" / "final"
        raise UserError(
            f"The weights in {whole} are whole already; use that folder as it is."
            if (whole / "config.json").is_file() else
            f"There is no adapter in {run}; name the folder of a finished run with "
            "model.adapter=lora, or of an adapter.")
    if out.exists():
        raise UserError(f"{out} is already there; choose a new folder.")
    policy = load_policy(ModelSettings(path=str(folder), device="cpu", precision="fp32"))

    def save(final: Path) -> None:
        policy.save(final)
        card = folder / "README.md"
        if card.is_file():
            (final / "README.md").write_text(merged_card(card.read_text(encoding="utf-8")),
                                             encoding="utf-8")

    write_folder(out, save)
    return folder

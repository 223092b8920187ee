"""Loads a policy from a folder, a hub name, or a GGUF file."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.utils.logging import tqdm as transformers_tqdm

from ..config.sections import ModelSettings
from ..system.errors import UsageError, UserError, reason
from ..system.hub import fetch_description, fetch_weights
from ..system.paths import is_place, tiny_model_folder
from . import adapters, attention
from .device import choose_device, choose_precision
from .model_files import refuse_redirections, refuse_wrong_architecture
from .policy import KNOWN, Policy
from .products import use_fast_products
from .prompts import pad_token_id, prompt_text, stop_token_ids

TINY = "tiny-v1"  # the model that ships with the package


# Loading ----------------------------------------------------------------------------------------


def load_policy(settings: ModelSettings,
                say: Callable[[str], None] = lambda line: print(line, flush=True)) -> Policy:
    """Loads model and tokenizer as `settings` says.

    No code from a model folder is run and no pickle is read: `trust_remote_code` is off, and only
    safetensors and GGUF files are accepted. Chat templates run in transformers' sandbox.

    Args:
        say: receives sentences, on downloads or on what is unusual about the model.

    Raises:
        UserError: the folder, file, or hub name cannot be loaded.
    """
    if settings.sampler == "vllm" and not find_spec("vllm"):
        raise UsageError("model.sampler=vllm needs the package vllm; install it with "
                         "'pip install hybridrl_lib[vllm]' or set model.sampler=own.")
    device, found = choose_device(settings.device), _describe(settings)
    folders, base, source, arguments = found.folders, found.base, found.source, found.arguments
    name, on_hub, tokenizer = found.name, found.on_hub, found.tokenizer
    if not tokenizer.chat_template and name != TINY:
        say(f"the tokenizer of {name} has no chat template: questions are asked as plain text, "
            "'Problem: ... Solution:'")
    if on_hub:
        source = str(fetch_weights(name, Path(source).name))
    model = _load_model(source, arguments, base)
    if on_hub:  # a saved adapter must not name a folder of this machine
        model.name_or_path = model.config._name_or_path = name
    if getattr(model, "hf_quantizer", None) is not None:  # a GGUF file, read into plain weights
        model.hf_quantizer.remove_quantization_config(model)  # else it could not be saved
    sha256 = _checksum(source, arguments)
    for folder in folders:
        model = adapters.merge_into(model, folder)
        name, sha256 = folder.resolve().name, _checksum(str(folder), {}, sha256)
    use_fast_products(model)
    if model.config.model_type in KNOWN:  # they hand arguments through to the attention
        model.set_attn_implementation(attention.NAME)
    model.eval()  # dropout off in all passes: sampling and training must see the same policy
    if settings.adapter == "lora":
        model = _add_adapter(model, settings)
        adapters.remember_base(model, settings.path, Path(source).name if on_hub else None)
    if settings.gradient_checkpointing:
        # The newer name first: the older one is to go with transformers 6.
        enable = getattr(model, "activation_checkpointing_enable", None) or (
            model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only; dropout is refused below
        _refuse_dropout(model)
    ends = model.generation_config.eos_token_id
    stop_ids, pad_id = stop_token_ids(tokenizer, ends), pad_token_id(tokenizer, ends)
    if pad_id in stop_ids:
        say(f"the tokenizer of {name} has no padding token: token {pad_id} fills "
            "batches and also ends answers; lengths distinguish the two")
    return Policy(
        model=model.to(device), tokenizer=tokenizer, name=name, sha256=sha256,
        precision=choose_precision(settings.precision, device),
        stop_ids=stop_ids, pad_id=pad_id, adapter=settings.adapter, sampler=settings.sampler,
        revision=Path(source).name if on_hub else "")


def load_tokenizer(settings: ModelSettings):
    """The tokenizer of a model, without its weights.

    Raises:
        UserError: as `load_policy`.
    """
    return _describe(settings).tokenizer


@dataclass(frozen=True)
class _Description:
    """A model before its weights are read.

    Attributes:
        folders: of the adapters that are merged into it, in order.
        base: the path or hub name of the base model, as given.
        source, arguments: what from_pretrained takes.
        on_hub: whether `source` is a folder of the hub's cache, named after a commit.
    """

    folders: Sequence[Path]
    base: str
    source: str
    arguments: dict
    name: str
    on_hub: bool
    tokenizer: object


def _describe(settings: ModelSettings) -> _Description:
    folders, base, commit = adapters.unfold(settings.path)
    source, arguments, name = _locate(replace(settings, path=base) if folders else settings)
    on_hub = not source
    if on_hub:
        source = str(fetch_description(name, settings.revision or commit))
    if "gguf_file" not in arguments:
        refuse_redirections(Path(source), base)
        refuse_wrong_architecture(Path(source), base)
    return _Description(folders, base, source, arguments, name, on_hub,
                        _load_tokenizer(source, arguments, base))


@contextmanager
def _switchable_bar() -> Iterator[None]:
    """Makes transformers' progress bar for GGUF tensors respect its own switch."""
    before = gguf_reader.tqdm
    gguf_reader.tqdm = transformers_tqdm
    try:
        yield
    finally:
        gguf_reader.tqdm = before


def _load_model(source: str, arguments: dict, path: str) -> PreTrainedModel:
    try:
        with _switchable_bar():
            model, found = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, trust_remote_code=False, attn_implementation="sdpa",
                output_loading_info=True,
                **({} if "gguf_file" in arguments else {"use_safetensors": True}), **arguments)
    except Exception as error:
        raise _loading_error(path, error) from error
    if missing := sorted(found["missing_keys"]):  # transformers invents them
        raise UserError(f"The model {path} lacks {len(missing)} of its weights, {missing[0]} among "
                        "them; fetch or save it again.")
    return model


def _locate(settings: ModelSettings) -> tuple[str, dict, str]:
    """(folder, arguments of from_pretrained, name for records); no folder for a model on the hub.
    """
    if settings.path == "tiny":
        folder = tiny_model_folder()
        if not (folder / "config.json").exists():
            raise UserError("The shipped tiny model is missing from the package; make it again "
                            "with 'hybridrl pretrain-tiny'.")
        return str(folder), {}, TINY
    path = Path(settings.path).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"There is no GGUF file {settings.path}; check model.path.")
        return str(path.parent), {"gguf_file": path.name}, path.name
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"The folder {settings.path} holds no model (no config.json); "
                            "model.path takes a model folder, a hub name or a GGUF file.")
        return str(path), {}, path.resolve().name
    if is_place(settings.path):
        raise UserError(f"There is no model folder {settings.path}; check model.path.")
    return "", {}, settings.path


def _load_tokenizer(source: str, arguments: dict, path: str):
    gguf = "gguf_file" in arguments
    try:
        loader = PreTrainedTokenizerFast if _is_plain_fast(source) else AutoTokenizer
        tokenizer = loader.from_pretrained(source, trust_remote_code=False, **arguments)
        if not tokenizer("1 + 1")["input_ids"]:  # transformers invents one if there is none
            raise ValueError("its tokenizer has no vocabulary")
    except Exception as error:
        if Path(source).is_dir() and not gguf and not (
                Path(source) / "tokenizer_config.json").exists():
            raise UserError(f"The folder {path} has a model but no tokenizer; put tokenizer.json "
                            "and tokenizer_config.json next to its config.json.") from error
        raise _loading_error(path, error) from error
    if tokenizer.eos_token_id is None:
        where = "set eos_token in its tokenizer_config.json."
        if gguf:
            where = "take a conversion of the model that names one, or the model's own folder."
        elif not Path(path).expanduser().is_dir():
            where = f"fetch it into a folder and {where}"
        raise UserError(f"The tokenizer of {path} has no EOS token, so an answer could never end; "
                        f"{where}")
    try:
        prompt_text(tokenizer, "1 + 1")
    except Exception as error:  # anything that a template or its sandbox raises
        raise UserError(f"The chat template of {path} cannot be used ({reason(error)}); " + (
            "take another conversion of the model, or the model's own folder." if gguf else
            "fix it or remove it from the tokenizer's files.")) from error
    return tokenizer


def _is_plain_fast(source: str) -> bool:
    """Whether a folder asks for its tokenizer.json to be used unchanged.

    AutoTokenizer would replace it by the usual class of the architecture, which misreads a Qwen2
    model with another vocabulary.
    """
    path = Path(source) / "tokenizer_config.json"
    if not path.is_file():
        return False
    named = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class", "")
    return named in ("TokenizersBackend", "PreTrainedTokenizerFast")


def _loading_error(path: str, error: Exception) -> UserError:
    why = reason(error)
    if path.lower().endswith(".gguf"):
        if isinstance(error, ImportError):
            return UserError("Reading a GGUF file needs the package gguf; install it with "
                             "'pip install gguf'.")
        if "not supported" in why:  # whole, but of a kind that transformers does not know
            return UserError(f"The GGUF file {path} cannot be used ({why}); take a Qwen2 or Llama "
                             "model, or the model's own folder.")
        return UserError(f"The GGUF file {path} cannot be read ({why}); it may be cut off: fetch "
                         "it again.")
    what = "folder " if Path(path).expanduser().is_dir() else ""
    return UserError(f"The model {what}{path} cannot be loaded ({why}); it needs config.json, "
                     "tokenizer files and weights in safetensors.")


def _checksum(source: str, arguments: dict, before: str = "") -> str:
    """sha256 of the weight files; `before` is that of the model that an adapter belongs to."""
    folder, digest = Path(source), hashlib.sha256(before.encode())
    weights = ([folder / arguments["gguf_file"]] if "gguf_file" in arguments else
               sorted(folder.glob("*.safetensors")))
    for path in weights:
        with path.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def _add_adapter(model: PreTrainedModel, settings: ModelSettings):
    from peft import LoraConfig, get_peft_model

    layers = {name.rsplit(".", 1)[-1]: module for name, module in model.named_modules()}
    targets = [target for target in settings.lora_targets if target in layers]
    for target in adapters.in_embeddings(model, targets):
        raise UserError(f"model.lora_targets names {target}, but an adapter goes into the linear "
                        "layers between the embeddings only; leave it out.")
    if not targets:
        raise UserError("None of model.lora_targets is a layer of this model; its layers are "
                        + ", ".join(sorted(layers)[:20]) + ".")
    with torch.random.fork_rng(devices=[]), adapters.quiet_peft():
        torch.manual_seed(0)  # the same adapter in every run, as the base model
        return get_peft_model(model, LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=0.0,
            target_modules=targets, task_type="CAUSAL_LM"))


def _refuse_dropout(model: torch.nn.Module) -> None:
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    if rates or json.loads(model.config.to_json_string()).get("attention_dropout", 0) > 0:
        raise UserError("This model has dropout, which makes the sampled and the trained policy "
                        "differ; set its dropout rates to 0 in its config.json.")

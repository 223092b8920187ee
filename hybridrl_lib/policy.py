"""The policy: model and tokenizer from a folder, a hub name or a GGUF file, and back to disk."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.utils.logging import tqdm as transformers_tqdm

from . import adapters, attention
from .config import ModelSettings
from .downloads import fetch_description, fetch_weights
from .errors import UsageError, UserError, reason
from .home import hide_home, is_place
from .model_files import refuse_redirections, refuse_wrong_architecture
from .objectives import score_tokens
from .packing import Packed
from .problems.prompts import encode_prompt, pad_token_id, prompt_text, stop_token_ids
from .products import use_fast_products, use_plain_products
from .sharding import weights_to_save

KNOWN = ("qwen2", "llama")  # architectures that sampler and attention of this project know
TINY = "tiny-v1"  # the model that ships with the package
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tiny_model_folder() -> Path:
    """The folder of the tiny base model that ships with the package."""
    return Path(str(files("hybridrl_lib") / "assets" / "tiny"))


def choose_device(wanted: str = "auto") -> torch.device:
    """The device to run on: `auto` takes a CUDA GPU if there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device is 'cuda', but torch sees no CUDA GPU; set it to 'auto'.")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def choose_precision(wanted: str, device: torch.device) -> str:
    """The arithmetic of matrix products; weights and optimiser state stay in fp32.

    `auto`: fp32 on a CPU; bf16 on GPUs of compute capability 8.0 and up; fp32 on older ones (a T4
    has no bf16, and fp16 needs loss scaling, which RL's small gradients suffer from).

    Raises:
        UserError: bf16 was asked for on a GPU that would only imitate it, slower than fp32.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if wanted == "bf16" and device.type == "cuda" and capability < (8, 0):
        raise UserError("model.precision is 'bf16', which GPUs have from compute capability 8.0 "
                        f"on, and this one has {capability[0]}.{capability[1]}; set it to 'auto' "
                        "or 'fp16'.")
    if wanted != "auto":
        return wanted
    return "bf16" if capability >= (8, 0) else "fp32"


@dataclass
class Policy:
    """A causal language model with its tokenizer.

    Attributes:
        model: the model being trained (a `PeftModel` when an adapter is on).
        tokenizer: its tokenizer.
        name: what it was loaded from, without any folder of this machine.
        sha256: checksum of the weights that were loaded.
        precision: `fp32`, `bf16` or `fp16`.
        stop_ids: tokens that end a completion.
        pad_id: token at unused places.
        adapter: `none` or `lora`.
        trains_base: whether the base weights are trained beside the adapter.
        sampler: `own` or `vllm`.
        revision: the commit of a hub model; empty for others.
    """

    model: PreTrainedModel
    tokenizer: object
    name: str
    sha256: str
    precision: str
    stop_ids: tuple[int, ...]
    pad_id: int
    adapter: str = "none"
    trains_base: bool = False
    sampler: str = "own"
    revision: str = ""
    engine: object = None  # of vllm, once it has sampled
    _frozen: PreTrainedModel | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos_id(self) -> int:
        """The token that a demonstration ends with."""
        return self.stop_ids[0]

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    # Text and tokens ---------------------------------------------------------------------------

    def encode_prompt(self, question: str) -> list[int]:
        """Token ids of the prompt for a question (the one template of the project)."""
        return encode_prompt(self.tokenizer, question)

    def encode_completion(self, text: str) -> list[int]:
        """Token ids of a demonstration, with exactly one EOS at its end."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    # Scores ------------------------------------------------------------------------------------

    def autocast(self):
        """The context in which forward passes run."""
        return torch.autocast(self.device.type, DTYPES[self.precision],
                              enabled=self.precision != "fp32")

    def score(self, packed: Packed, *, temperature: float | Tensor = 1.0, chunk_tokens: int = 1024,
              with_entropy: bool = True, model: PreTrainedModel | None = None,
              ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every completion token of a micro-batch.

        Args:
            packed: N completion tokens, on this policy's device.
            model: another model of the same shape (the reference) instead of this one.

        Returns:
            (N,) and (N,), nats, fp32.
        """
        model = model or self.model
        base = adapters.inner_model(model)
        if packed.segments is not None and base.config._attn_implementation == attention.NAME:
            groups = base.config.num_attention_heads // base.config.num_key_value_heads
            more = (0, len(packed.segments.back) - packed.input_ids.numel())
            layout = {name: F.pad(getattr(packed, name).flatten(), more)[None]
                      for name in ("input_ids", "position_ids")}
            layout["segments"] = packed.segments.with_scores_masks(groups, DTYPES[self.precision])
            # What is not read still has to look like a mask to `transformers`.
            layout["attention_mask"] = packed.segments.back.new_empty(1, 1, 1, 1)
        else:
            layout = {"input_ids": packed.input_ids, "position_ids": packed.position_ids,
                      "attention_mask": packed.with_mask().attention_mask}
        def compute() -> tuple[Tensor, Tensor]:
            hidden = base.get_decoder()(use_cache=False, **layout).last_hidden_state
            hidden = hidden.flatten(0, 1)[packed.before]
            head = base.get_output_embeddings()
            return score_tokens(hidden, head.weight, packed.targets, bias=head.bias,
                                temperature=temperature, chunk_tokens=chunk_tokens,
                                with_entropy=with_entropy)

        inside = getattr(model, "run_inside", None)  # of a model that is shared out
        with self.autocast():
            return compute() if inside is None else inside(compute)

    # Weights and the reference -----------------------------------------------------------------

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights that training moves, by name: all of them, or the adapter's."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def train_base(self) -> None:
        """Trains the base weights beside the adapter; the reference is a frozen copy from now on.

        It is the model as it is now, without the adapter.
        """
        self._frozen = copy.deepcopy(self.model).unload().eval().requires_grad_(False)
        self.model.requires_grad_(True)
        self.trains_base = True

    @contextmanager
    def with_weights(self, weights: dict[str, Tensor]) -> Iterator[PreTrainedModel]:
        """The model with other trained weights, inside the `with` block; nothing is copied."""
        trained = self.trained_weights()
        own = {name: parameter.data for name, parameter in trained.items()}
        for name, parameter in trained.items():
            parameter.data = weights[name]
        try:
            yield self.model
        finally:
            for name, parameter in trained.items():
                parameter.data = own[name]

    def plain_model(self) -> PreTrainedModel:
        """A copy of the model with the products and the attention of `transformers` and torch.

        It is what to compare speed with: the model itself has this project's.
        """
        model = use_plain_products(copy.deepcopy(self.model))
        base = adapters.inner_model(model)
        if base.config._attn_implementation == attention.NAME:
            base.set_attn_implementation("sdpa")
        return model

    # The reference -----------------------------------------------------------------------------

    def keep_reference(self) -> None:
        """Remembers the weights as they are now as the KL anchor.

        With an adapter nothing is copied: the reference is the model without it.
        """
        if self.adapter == "none":
            self._frozen = copy.deepcopy(self.model).eval().requires_grad_(False)

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The reference model, for scoring inside the `with` block."""
        if self.adapter != "none" and not self.trains_base:
            with self.model.disable_adapter():
                yield self.model
        elif self._frozen is None:
            raise RuntimeError("keep_reference() was not called before reference()")
        else:
            yield self._frozen

    # Disk --------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Writes an ordinary model folder (or adapter folder): config, safetensors, tokenizer.

        An adapter whose base weights were trained too is added into a copy of them.
        """
        model = copy.deepcopy(self.model).merge_and_unload() if self.trains_base else self.model
        # No adapter is in the embeddings (_add_adapter), so PEFT need not look whether one is.
        more = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        model.save_pretrained(folder, **more, **weights_to_save(model))
        self.tokenizer.save_pretrained(folder)
        for name in ("adapter_config.json", "README.md"):  # PEFT says where the base model lies
            hide_home(folder / name)


# Loading ----------------------------------------------------------------------------------------


def load_policy(settings: ModelSettings,
                say: Callable[[str], None] = lambda line: print(line, flush=True)) -> Policy:
    """Loads model and tokenizer as `settings` says.

    No code from a model folder is run and no pickle is read: `trust_remote_code` is off and only
    safetensors (or a GGUF file) are accepted. Chat templates run in transformers' sandbox.

    Args:
        say: takes a sentence: how far a download is, or what is unusual about the model.

    Raises:
        UserError: the folder, file or hub name cannot be loaded; says why and what to do.
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
        source = str(fetch_weights(name, Path(source).name, say))
    model = _load_model(source, arguments, base)
    if on_hub:  # what a saved adapter says of its base: not a folder of this machine
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
        say(f"the tokenizer of {name} has no padding token of its own: token {pad_id} fills "
            "batches and also ends answers, which are told apart by their lengths")
    return Policy(
        model=model.to(device), tokenizer=tokenizer, name=name, sha256=sha256,
        precision=choose_precision(settings.precision, device),
        stop_ids=stop_ids, pad_id=pad_id, adapter=settings.adapter, sampler=settings.sampler,
        revision=Path(source).name if on_hub else "")


def load_tokenizer(settings: ModelSettings):
    """The tokenizer of a model, whose weights are neither fetched nor read.

    Raises:
        UserError: as `load_policy`.
    """
    return _describe(settings).tokenizer


@dataclass(frozen=True)
class _Description:
    """A model before its weights: where it is, its name in records, its tokenizer.

    Attributes:
        folders: of the adapters that are merged into it, in order.
        base: the path or hub name of the model beneath them, as it was given.
        source, arguments: what from_pretrained takes.
        on_hub: whether `source` is a folder of the hub's cache, and named after a commit.
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
    """transformers' bar over the tensors of a GGUF file is one that its own switch misses."""
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
    if missing := sorted(found["missing_keys"]):  # transformers makes them up
        raise UserError(f"The model {path} lacks {len(missing)} of its weights, {missing[0]} among "
                        "them; fetch or save it again.")
    return model


def _locate(settings: ModelSettings) -> tuple[str, dict, str]:
    """(folder, arguments of from_pretrained, the name for records); no folder: it is on the hub."""
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
        if not tokenizer("1 + 1")["input_ids"]:  # what transformers makes up where there is none
            raise ValueError("its tokenizer has no vocabulary")
    except Exception as error:
        if Path(source).is_dir() and not gguf and not (
                Path(source) / "tokenizer_config.json").exists():
            raise UserError(f"The folder {path} has a model but no tokenizer; put tokenizer.json "
                            "and tokenizer_config.json beside its config.json.") from error
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
    except Exception as error:  # whatever a template raises, or the sandbox at what it reaches for
        raise UserError(f"The chat template of {path} cannot be used ({reason(error)}); " + (
            "take another conversion of the model, or the model's own folder." if gguf else
            "mend it or remove it from the tokenizer's files.")) from error
    return tokenizer


def _is_plain_fast(source: str) -> bool:
    """Whether a folder asks for its tokenizer.json to be used as it is.

    AutoTokenizer would replace it with the class usual for the architecture, and a Qwen2 model
    with a vocabulary of its own would read nonsense.
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
    """sha256 of the weight files; `before` is that of the model an adapter's files belong to."""
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

"""The policy pi_theta: a causal language model with its tokenizer."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..system.paths import hide_home
from . import adapters, attention
from .device import DTYPES
from .packing import Packed
from .products import use_plain_products
from .prompts import encode_prompt
from .scoring import score_tokens

KNOWN = ("qwen2", "llama")  # architectures that sampler and attention of this project know


@dataclass
class Policy:
    """A causal language model with its tokenizer.

    Attributes:
        model: the model being trained (a `PeftModel` with an adapter).
        tokenizer: its tokenizer.
        name: what it was loaded from, without folders of this machine.
        sha256: checksum of the loaded weights.
        precision: `fp32`, `bf16`, or `fp16`.
        stop_ids: tokens that end a completion.
        pad_id: token at unused places.
        adapter: `none` or `lora`.
        trains_base: whether the base weights are trained along with the adapter.
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
        """Token ids of the prompt for a question."""
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
            # It is ignored, but `transformers` wants a mask.
            layout["attention_mask"] = packed.segments.back.new_empty(1, 1, 1, 1)
        else:
            layout = {"input_ids": packed.input_ids, "position_ids": packed.position_ids,
                      "attention_mask": packed.with_mask().attention_mask}
        with self.autocast():
            hidden = base.get_decoder()(use_cache=False, **layout).last_hidden_state
            hidden = hidden.flatten(0, 1)[packed.before]  # (R, L, width) -> (N, width)
            head = base.get_output_embeddings()
            return score_tokens(hidden, head.weight, packed.targets, bias=head.bias,
                                temperature=temperature, chunk_tokens=chunk_tokens,
                                with_entropy=with_entropy)

    # Weights and the reference -----------------------------------------------------------------

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights that training moves, by name: all of them, or the adapter's."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def train_base(self) -> None:
        """Also trains the base weights. The reference becomes a frozen copy of the present model
        without the adapter.
        """
        self._frozen = copy.deepcopy(self.model).unload().eval().requires_grad_(False)
        self.model.requires_grad_(True)
        self.trains_base = True

    @contextmanager
    def with_weights(self, weights: dict[str, Tensor]) -> Iterator[PreTrainedModel]:
        """The model with other trained weights inside the `with` block; nothing is copied."""
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
        """A copy of the model with the products and the attention of torch and `transformers`.

        For speed comparisons, since the model itself uses this project's.
        """
        model = use_plain_products(copy.deepcopy(self.model))
        base = adapters.inner_model(model)
        if base.config._attn_implementation == attention.NAME:
            base.set_attn_implementation("sdpa")
        return model

    # The reference -----------------------------------------------------------------------------

    def keep_reference(self) -> None:
        """Keeps the present weights as the KL anchor.

        With an adapter nothing is copied; the reference is the model without it.
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

        An adapter whose base weights were trained is merged into a copy of them.
        """
        model = copy.deepcopy(self.model).merge_and_unload() if self.trains_base else self.model
        # No adapter is in the embeddings (_add_adapter), so PEFT need not look whether one is.
        more = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        model.save_pretrained(folder, **more)
        self.tokenizer.save_pretrained(folder)
        for name in ("adapter_config.json", "README.md"):  # PEFT says where the base model lies
            hide_home(folder / name)

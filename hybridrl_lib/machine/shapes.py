"""The sizes of a model's parts, from its config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.sections import ModelSettings
from ..system.paths import tiny_model_folder


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama or Qwen2 model.

    Attributes:
        vocabulary, width, layers, heads, key_value_heads, head_size: as in its config.json.
        feed_forward: inner width of the feed-forward block.
        tied: whether the embeddings are also the output layer.
        biases: whether queries, keys, and values have biases.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    feed_forward: int
    tied: bool
    biases: bool

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        return self.key_value_heads * self.head_size

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one layer, by name."""
        width, wide = self.width, self.feed_forward
        return {"q_proj": (width, self.queries), "k_proj": (width, self.keys),
                "v_proj": (width, self.keys), "o_proj": (self.queries, width),
                "gate_proj": (width, wide), "up_proj": (width, wide), "down_proj": (wide, width)}

    @property
    def linear(self) -> int:
        """Number of weights in the linear layers between the embeddings."""
        return self.layers * sum(a * b for a, b in self.products.values())

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        biases = self.layers * (self.queries + 2 * self.keys) if self.biases else 0
        norms = (2 * self.layers + 1) * self.width
        return self.linear + biases + norms + self.embedding * (1 if self.tied else 2)

    def adapter(self, model: ModelSettings) -> int:
        """Number of weights of the adapter that the settings ask for."""
        if model.adapter == "none":
            return 0
        return self.layers * model.lora_rank * sum(
            sum(self.products[name]) for name in model.lora_targets if name in self.products)


# Shapes of the presets' models, known before anything is fetched; each is compared with the
# model's config.json once that exists.
KNOWN_SHAPES = {
    "Qwen/Qwen2.5-0.5B": Shape(151_936, 896, 24, 14, 2, 64, 4864, True, True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Shape(49_152, 576, 30, 9, 3, 64, 1536, True, False),
}


def shape_from(config: Mapping[str, Any]) -> Shape | None:
    """The shape described by a config.json (or `config.to_dict()`); None for other models."""
    try:
        kind, heads = config["model_type"], config["num_attention_heads"]
        if kind not in ("qwen2", "llama"):
            return None
        return Shape(
            config["vocab_size"], config["hidden_size"], config["num_hidden_layers"], heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads, config["intermediate_size"],
            bool(config.get("tie_word_embeddings", False)),
            kind == "qwen2" or bool(config.get("attention_bias", False)))
    except (KeyError, TypeError):
        return None


def shape_of(model: ModelSettings) -> Shape | None:
    """The shape of a model that is not loaded, from its folder or from the presets' models.

    None if it is unknown before loading, as for a GGUF file.
    """
    if model.path in KNOWN_SHAPES:
        return KNOWN_SHAPES[model.path]
    folder = (tiny_model_folder() if model.path == "tiny" else Path(model.path).expanduser())
    try:
        return shape_from(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None

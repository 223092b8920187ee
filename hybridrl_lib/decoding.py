"""A decoder for Llama and Qwen2 models that samples G answers to a prompt without wasted work.

`transformers` calls some twenty small modules a layer for every new token; a small model spends
its time there. This one reads the same weights, fused into four products a layer, and keeps the
keys and values in one preallocated cache. It computes the same function (tests/test_decoding.py),
in half precision rounded where autocast rounds in training: products and attention are in half
precision, the sum that runs through the layers and the norms are in fp32. Models of other
architectures go through `transformers` itself (`rollouts.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from .policy import DTYPES, Policy

SUPPORTED = ("qwen2", "llama")


def effective(linear: torch.nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer, with its LoRA adapter (if any) added in."""
    if hasattr(linear, "get_delta_weight"):
        weight, bias = linear.get_base_layer().weight, linear.get_base_layer().bias
        for name in linear.active_adapters:
            weight = weight + linear.get_delta_weight(name)
        return weight, bias
    return linear.weight, linear.bias


class _Layer:
    """The weights of one transformer layer, fused."""

    def __init__(self, layer, dtype: torch.dtype):
        attention, feed_forward = layer.self_attn, layer.mlp
        parts = [effective(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.qkv = torch.cat([weight for weight, _ in parts]).to(dtype)
        biases = [bias for _, bias in parts]
        self.qkv_bias = torch.cat(biases).to(dtype) if biases[0] is not None else None
        output, output_bias = effective(attention.o_proj)
        self.output, self.output_bias = output.to(dtype), _cast(output_bias, dtype)
        self.gate_up = torch.cat([effective(feed_forward.gate_proj)[0],
                                  effective(feed_forward.up_proj)[0]]).to(dtype)
        self.down = effective(feed_forward.down_proj)[0].to(dtype)
        self.input_norm = layer.input_layernorm.weight
        self.post_norm = layer.post_attention_layernorm.weight


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


class Decoder:
    """A snapshot of the policy's weights, ready to decode. Make a new one after every update."""

    def __init__(self, policy: Policy):
        model = policy.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config, body = base.config, base.get_decoder()
        self.dtype = DTYPES[policy.precision]
        self.embedding = body.embed_tokens.weight
        self.head = effective(base.get_output_embeddings())[0].to(self.dtype)
        self.norm = body.norm.weight
        self.layers = [_Layer(layer, self.dtype) for layer in body.layers]
        self.rotary = body.rotary_emb
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.epsilon = config.rms_norm_eps
        self.device = policy.device

    @staticmethod
    def supports(policy: Policy) -> bool:
        """Whether the policy's architecture is one this decoder computes exactly."""
        config = policy.model.config
        plain = not getattr(config, "mlp_bias", False) and config.hidden_act == "silu"
        full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
        return config.model_type in SUPPORTED and plain and full

    def new_cache(self, rows: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Empty keys and values: per layer two tensors (rows, key-value heads, length, size)."""
        shape = (rows, self.key_value_heads, length, self.head_size)
        return [(torch.empty(shape, dtype=self.dtype, device=self.device),
                 torch.empty(shape, dtype=self.dtype, device=self.device)) for _ in self.layers]

    def share(self, cache: list[tuple[Tensor, Tensor]], samples: int,
              room: int) -> list[tuple[Tensor, Tensor]]:
        """The cache of every prompt handed to its `samples` rows, with room for more tokens."""
        return [tuple(F.pad(t.repeat_interleave(samples, dim=0), (0, 0, 0, room)) for t in pair)
                for pair in cache]

    def keep(self, cache: list[tuple[Tensor, Tensor]], rows: Tensor,
             filled: int) -> list[tuple[Tensor, Tensor]]:
        """The cache of the given rows alone; only its first `filled` columns hold anything."""
        kept = [tuple(t.new_empty((len(rows), *t.shape[1:])) for t in pair) for pair in cache]
        for pair, smaller in zip(cache, kept, strict=True):
            for old, new in zip(pair, smaller, strict=True):
                new[:, :, :filled] = old[:, :, :filled].index_select(0, rows)
        return kept

    def advance(self, ids: Tensor, positions: Tensor, cache: list[tuple[Tensor, Tensor]],
                start: int, mask: Tensor) -> Tensor:
        """Reads T tokens a row into the cache and returns the last hidden state of each row.

        Args:
            ids, positions: (R, T).
            cache: written at columns start .. start + T.
            mask: (R, 1, T, start + T) bool, True where a query may look.

        Returns:
            (R, width) after the final norm.
        """
        rows, time = ids.shape
        x = F.embedding(ids, self.embedding)
        cos, sin = self.rotary(x, positions)
        cos, sin = cos[:, None], sin[:, None]
        groups = self.heads // self.key_value_heads
        sizes = [self.heads * self.head_size] + 2 * [self.key_value_heads * self.head_size]
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            y = F.linear(self._rms(x, layer.input_norm), layer.qkv, layer.qkv_bias)
            q, k, v = (part.view(rows, time, -1, self.head_size).transpose(1, 2)
                       for part in y.split(sizes, dim=-1))
            q, k = _rotate(q, cos, sin).to(self.dtype), _rotate(k, cos, sin)
            keys[:, :, start:start + time] = k
            values[:, :, start:start + time] = v
            k, v = keys[:, :, :start + time], values[:, :, :start + time]
            if time == 1:  # the queries that share a key head become its rows: nothing is repeated
                q = q.reshape(rows, self.key_value_heads, groups, self.head_size)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                y = y.reshape(rows, 1, -1)
            else:
                k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                y = y.transpose(1, 2).reshape(rows, time, -1)
            x = x + F.linear(y, layer.output, layer.output_bias)
            gate, up = F.linear(self._rms(x, layer.post_norm), layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return self._rms(x[:, -1], self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, vocabulary) in fp32."""
        return F.linear(hidden, self.head).float()

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (weight * normal).to(self.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class TransformersDecoder:
    """The same interface through `transformers` itself: any architecture, at its own speed."""

    def __init__(self, policy: Policy):
        self.policy = policy
        model = policy.model
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def new_cache(self, rows: int, length: int) -> DynamicCache:
        return DynamicCache(config=self.base.config)

    def share(self, cache: DynamicCache, samples: int, room: int) -> DynamicCache:
        cache.batch_repeat_interleave(samples)
        return cache

    def keep(self, cache: DynamicCache, rows: Tensor, filled: int) -> DynamicCache:
        cache.batch_select_indices(rows)
        return cache

    def advance(self, ids: Tensor, positions: Tensor, cache: DynamicCache, start: int,
                mask: Tensor) -> Tensor:
        with self.policy.autocast():
            return self.base.get_decoder()(
                input_ids=ids, position_ids=positions, attention_mask=mask,
                past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    def logits(self, hidden: Tensor) -> Tensor:
        with self.policy.autocast():
            return self.base.get_output_embeddings()(hidden).float()

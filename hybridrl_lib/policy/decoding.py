"""A fast decoder for Llama and Qwen2 models that samples G answers per prompt.

`transformers` calls about twenty small modules per layer for every token, which dominates for a
small model. This decoder reads the same weights, fused into four products per layer, and keeps keys
and values in one preallocated cache. It computes the same function (tests/policy/test_decoding.py).
In half precision it rounds where autocast rounds in training: products and attention in half
precision, residuals and norms in fp32. Other architectures are sampled through `transformers`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from .adapters import inner_model
from .device import DTYPES
from .policy import KNOWN, Policy
from .products import linear


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


class _Cache:
    """Keys and values: of every prompt once, and of the tokens that each row has written.

    Attributes:
        prompts: per layer the two tensors (P, key-value heads, longest prompt, size).
        own: per layer keys (R, key-value heads, size, C), the faster layout for the product with
            the queries, and values (R, key-value heads, C, size). All C columns are read, which
            avoids copies; `unwritten` hides the empty ones.
        unwritten: (C,) added to the scores: 0 at written columns, -inf at others.
        hidden_by: (P, 1, 1, longest prompt) added to the scores, -inf at padding; None if there is
            none.
        owner: (R,) the prompt of each row, ascending.
        positions: (R,) of the next token in its sequence.
        filled: number of written columns of `own`.
        slots: (R,) place of each row in a table (P prompts, their maximum number of rows), in which
            all rows of a prompt meet its keys in one product; None if the rows are that table.
        slots_each: rows per prompt in that table.
    """

    def __init__(self, prompts: list, hidden_by: Tensor | None, owner: Tensor, positions: Tensor,
                 own: list, unwritten: Tensor | None = None, filled: int = 0):
        self.prompts, self.hidden_by, self.owner = prompts, hidden_by, owner
        self.positions, self.own = positions, own
        self.unwritten, self.filled = unwritten, filled
        counts = owner.bincount(minlength=len(prompts[0][0]))
        self.slots_each, most = int(counts.max()), owner.numel()
        self.slots = None
        if most != self.slots_each * len(counts):
            before = counts.cumsum(0) - counts
            self.slots = owner * self.slots_each + torch.arange(
                most, device=owner.device) - before[owner]


class Decoder:
    """A snapshot of the policy's weights for decoding. Make a new one after every update.

    Attributes:
        columns: minimum number of columns by which the cache grows.
        compact_below: share of unfinished rows below which finished ones are dropped.
    """

    columns = 16
    compact_below = 0.8

    def __init__(self, policy: Policy):
        model = policy.model
        base = inner_model(model)
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
        """Whether this decoder computes the policy's architecture exactly."""
        config = policy.model.config
        plain = not getattr(config, "mlp_bias", False) and config.hidden_act == "silu"
        full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
        return config.model_type in KNOWN and plain and full

    # The cache ---------------------------------------------------------------------------------

    def read(self, ids: Tensor, present: Tensor) -> tuple[Tensor, _Cache]:
        """Reads left-padded prompts.

        Args:
            ids, present: (P, longest); `present` is False at padding.

        Returns:
            (P, width) hidden state after each prompt's last token, and a cache with one row per
            prompt for `share`.
        """
        count, longest = ids.shape
        positions = (present.cumsum(1) - 1).clamp(min=0)
        causal = torch.ones(longest, longest, dtype=torch.bool, device=ids.device).tril()
        mask = (present[:, None, None] & causal) | torch.eye(
            longest, dtype=torch.bool, device=ids.device)
        prompts = []

        def attend(q: Tensor, k: Tensor, v: Tensor, _: int) -> Tensor:
            q, k, v = (t.view(count, longest, -1, self.head_size).transpose(1, 2)
                       for t in (q, k, v))
            prompts.append((k.contiguous(), v.contiguous()))
            groups = self.heads // self.key_value_heads
            k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return y.transpose(1, 2).reshape(count * longest, -1)

        x = self._layers(ids.flatten(), positions.flatten(), attend)
        hidden = self._rms(x.view(count, longest, -1)[:, -1], self.norm)
        hidden_by = None
        if not bool(present.all()):
            hidden_by = torch.zeros(count, 1, 1, longest, device=ids.device)
            hidden_by.masked_fill_(~present[:, None, None], float("-inf"))
        return hidden, _Cache(prompts, hidden_by, torch.arange(count, device=ids.device),
                              positions[:, -1] + 1, [])

    def share(self, cache: _Cache, samples: int) -> _Cache:
        """The cache with `samples` rows per prompt."""
        shared = _Cache(cache.prompts, cache.hidden_by, cache.owner.repeat_interleave(samples),
                        cache.positions.repeat_interleave(samples), [])
        self._make_room(shared, self._columns(0))
        return shared

    def _columns(self, filled: int) -> int:
        """Number of columns to allocate when `filled` are written."""
        return (filled + max(self.columns, filled // 4)) // self.columns * self.columns

    def _make_room(self, cache: _Cache, columns: int, rows: Tensor | None = None) -> None:
        """Copies what is written, or these rows of it, to tensors of that many columns."""
        count, end, own = len(cache.owner) if rows is None else len(rows), cache.filled, []
        for index in range(len(self.layers)):
            # Zeros: a column that is hidden has no weight, and 0 times nothing must not be NaN.
            keys = torch.zeros(count, self.key_value_heads, self.head_size, columns,
                               dtype=self.dtype, device=self.device)
            values = torch.zeros(count, self.key_value_heads, columns, self.head_size,
                                 dtype=self.dtype, device=self.device)
            if end:
                old = (cache.own[index][0][..., :end], cache.own[index][1][:, :, :end])
                keys[..., :end], values[:, :, :end] = old if rows is None else (
                    t.index_select(0, rows) for t in old)
            own.append((keys, values))
        cache.own = own
        cache.unwritten = torch.full((columns,), float("-inf"), device=self.device)
        cache.unwritten[:end] = 0

    def keep(self, cache: _Cache, rows: Tensor) -> _Cache:
        """The cache with the given rows only, in ascending order."""
        self._make_room(cache, self._columns(cache.filled), rows)
        left, owner = cache.owner[rows].unique_consecutive(return_inverse=True)
        prompts, hidden_by = cache.prompts, cache.hidden_by
        if len(left) < len(prompts[0][0]):
            prompts = [tuple(t.index_select(0, left) for t in pair) for pair in prompts]
            hidden_by = None if hidden_by is None else hidden_by.index_select(0, left)
        return _Cache(prompts, hidden_by, owner, cache.positions[rows], cache.own,
                      cache.unwritten, cache.filled)

    # Computing ---------------------------------------------------------------------------------

    def step(self, ids: Tensor, cache: _Cache) -> Tensor:
        """Reads one more token per row, (R,), into the cache.

        Returns:
            (R, width) after the final norm.
        """
        if cache.filled == len(cache.unwritten):
            self._make_room(cache, self._columns(cache.filled))
        column = cache.filled
        cache.unwritten[column] = 0

        def write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> None:
            keys[..., column] = k
            values[:, :, column] = v

        hidden = self._read_one(ids, cache, write)
        cache.positions, cache.filled = cache.positions + 1, column + 1
        return hidden

    def _read_one(self, ids: Tensor, cache: _Cache, write) -> Tensor:
        """`step` without its bookkeeping; `write` stores a layer's keys and values in the cache."""
        def attend(q: Tensor, k: Tensor, v: Tensor, index: int) -> Tensor:
            write(*cache.own[index], k, v)
            return self._attend(q, cache, index)

        return self._rms(self._layers(ids, cache.positions, attend), self.norm)

    def _attend(self, q: Tensor, cache: _Cache, index: int) -> Tensor:
        """Attention of one query per row to its prompt and to what the row has written.

        All rows of a prompt meet its keys in one product, so these are read once. The softmax is
        over both parts together.
        """
        rows, (prompt_keys, prompt_values) = len(q), cache.prompts[index]
        count, kv, longest, size = prompt_keys.shape
        groups, each = self.heads // kv, cache.slots_each
        q = (q * size ** -0.5).view(rows, kv, groups, size)
        table = q if cache.slots is None else q.new_zeros(
            count * each, kv, groups, size).index_copy_(0, cache.slots, q)
        table = table.view(count, each, kv, groups, size).transpose(1, 2)
        scores = table.reshape(count, kv, each * groups, size) @ prompt_keys.transpose(2, 3)
        scores = scores.float() if cache.hidden_by is None else scores + cache.hidden_by
        scores = scores.view(count, kv, each, groups, longest).transpose(1, 2).reshape(
            count * each, kv, groups, longest)
        if cache.slots is not None:
            scores = scores.index_select(0, cache.slots)
        keys, values = cache.own[index]
        scores = torch.cat([scores, (q @ keys) + cache.unwritten], dim=-1)
        shares = scores.softmax(-1).to(self.dtype)
        to_prompt, to_own = shares[..., :longest], shares[..., longest:]
        if cache.slots is not None:
            to_prompt = to_prompt.new_zeros(count * each, kv, groups, longest).index_copy_(
                0, cache.slots, to_prompt)
        to_prompt = to_prompt.reshape(count, each, kv, groups, longest).transpose(1, 2)
        y = to_prompt.reshape(count, kv, each * groups, longest) @ prompt_values
        y = y.view(count, kv, each, groups, size).transpose(1, 2).reshape(-1, kv, groups, size)
        if cache.slots is not None:
            y = y.index_select(0, cache.slots)
        return (y + to_own @ values).reshape(rows, -1)

    def _layers(self, ids: Tensor, positions: Tensor, attend) -> Tensor:
        """All layers over N tokens (N,); returns (N, width) before the final norm.

        Args:
            attend: (queries, keys, values, number of the layer) -> (N, heads * size), with queries
                (N, heads, size), and keys and values (N, key-value heads, size).
        """
        x = F.embedding(ids, self.embedding)
        cos, sin = (t.view(len(ids), 1, -1) for t in self.rotary(x[None], positions[None]))
        half = self.head_size // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        rotated = self.heads + self.key_value_heads
        for index, layer in enumerate(self.layers):
            y = linear(self._rms(x, layer.input_norm), layer.qkv, layer.qkv_bias)
            y = y.view(len(ids), -1, self.head_size)
            qk, v = y[:, :rotated], y[:, rotated:]
            turned = torch.cat((qk[..., half:], qk[..., :half]), dim=-1)
            qk = (qk * cos + turned * sin).to(self.dtype)
            y = attend(qk[:, :self.heads], qk[:, self.heads:], v, index)
            x = x + linear(y, layer.output, layer.output_bias)
            gate, up = linear(self._rms(x, layer.post_norm), layer.gate_up).chunk(2, dim=-1)
            x = x + linear(F.silu(gate).mul_(up), layer.down)
            del gate, up  # the largest tensors; free them before the next layer
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, vocabulary)."""
        return linear(hidden, self.head)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return normal.mul_(weight).to(self.dtype)


class TransformersDecoder:
    """The same interface through `transformers`, for any architecture; slower."""

    compact_below = 0.8

    def __init__(self, policy: Policy):
        self.policy = policy
        model = policy.model
        self.base = inner_model(model)

    def read(self, ids: Tensor, present: Tensor) -> tuple[Tensor, tuple]:
        longest = ids.shape[1]
        positions = (present.cumsum(1) - 1).clamp(min=0)
        causal = torch.ones(longest, longest, dtype=torch.bool, device=ids.device).tril()
        mask = (present[:, None, None] & causal) | torch.eye(
            longest, dtype=torch.bool, device=ids.device)
        cache = DynamicCache(config=self.base.config)
        hidden = self._advance(ids, positions, mask, cache)
        return hidden, (cache, present, positions[:, -1] + 1)

    def share(self, cache: tuple, samples: int) -> tuple:
        keys, *more = cache
        keys.batch_repeat_interleave(samples)
        return keys, *(t.repeat_interleave(samples, 0) for t in more)

    def keep(self, cache: tuple, rows: Tensor) -> tuple:
        keys, *more = cache
        keys.batch_select_indices(rows)
        return keys, *(t[rows] for t in more)

    def step(self, ids: Tensor, cache: tuple) -> Tensor:
        keys, present, positions = cache
        seen = F.pad(present, (0, keys.get_seq_length() + 1 - present.shape[1]), value=True)
        hidden = self._advance(ids[:, None], positions[:, None], seen[:, None, None], keys)
        positions += 1
        return hidden

    def _advance(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        with self.policy.autocast():
            return self.base.get_decoder()(
                input_ids=ids, position_ids=positions, attention_mask=mask,
                past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    def logits(self, hidden: Tensor) -> Tensor:
        with self.policy.autocast():
            return self.base.get_output_embeddings()(hidden)

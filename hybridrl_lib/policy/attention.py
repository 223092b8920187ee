"""Attention in packed rows: every completion sees its prompt and itself, and nothing else.

Most pairs of tokens in a packed row belong to different completions, which must not see each other.
They are not computed here: prompts attend to themselves, and every completion, as a row of its own,
to the prompt's keys followed by its own. `transformers` calls `attend` in each layer instead of its
own attention. Without segments it is ordinary attention.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed"  # the name of this attention in `transformers`


@dataclass(frozen=True)
class Answers:
    """Completions of similar length in a micro-batch.

    Attributes:
        places: (S, T) flat index (row * L + column) of their tokens, padded with index 0.
        owner: (S,) the row of each.
        mask: (S, 1, T, P + T) bool, True where a completion's token may look: its prompt, and the
            tokens before it.
    """

    places: Tensor
    owner: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Segments:
    """The places of prompts and completions in a micro-batch, as indices into its flattened rows.

    Attributes:
        prompts: (R, P) flat index of the tokens of each row's prompt, or of all its tokens if it
            has one completion; padded with index 0.
        answers: the completions, grouped by similar length.
        back: (M,) for every place of the flattened rows, its index in the concatenation of prompts
            and answers. M is R * L rounded up.
    """

    prompts: Tensor
    answers: tuple[Answers, ...]
    back: Tensor

    def with_scores_masks(self, groups: int, dtype: torch.dtype) -> "Segments":
        """With masks (S, 1, groups * T, P + T) that are added to the scores in all layers."""
        def added(mask: Tensor) -> Tensor:
            hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            return hidden.masked_fill_(~mask, float("-inf")).repeat(1, 1, groups, 1)

        return replace(self, answers=tuple(replace(a, mask=added(a.mask)) for a in self.answers))

    def to(self, device) -> "Segments":
        return Segments(self.prompts.to(device), tuple(
            Answers(a.places.to(device), a.owner.to(device), a.mask.to(device))
            for a in self.answers), self.back.to(device))


def attend(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
           attention_mask: Tensor | None, *, segments: Segments | None = None, scaling=None,
           **arguments) -> tuple[Tensor, None]:
    """An attention function of `transformers`.

    Args:
        query: (R, heads, L, size), with segments (1, heads, M, size).
        key, value: (R, key-value heads, L, size), with segments (1, key-value heads, M, size).
        attention_mask: ignored with segments.
        segments: with masks to add; without segments this is scaled dot-product attention with
            `attention_mask`.

    Returns:
        (R, L, heads, size), with segments (1, M, heads, size); None.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      **arguments)
    rows, heads, length, size = query.shape
    kv = key.shape[1]
    q, k, v = (t.transpose(1, 2).reshape(rows * length, -1) for t in (query, key, value))

    def take(tokens: Tensor, index: Tensor, count: int) -> Tensor:  # (.., tokens, count, size)
        return tokens.index_select(0, index.flatten()).view(*index.shape, count, size)

    groups = heads // kv
    prompt_keys, prompt_values = take(k, segments.prompts, kv), take(v, segments.prompts, kv)
    repeated = (t.transpose(1, 2).repeat_interleave(groups, dim=1)
                for t in (prompt_keys, prompt_values))
    y = F.scaled_dot_product_attention(take(q, segments.prompts, heads).transpose(1, 2), *repeated,
                                       is_causal=True, scale=scaling)
    parts = [y.transpose(1, 2).reshape(-1, heads * size)]
    for answers in segments.answers:
        count, longest = answers.places.shape
        keys, values = (
            torch.cat([shared.index_select(0, answers.owner),
                       take(own, answers.places, kv)], dim=1).transpose(1, 2)
            for shared, own in ((prompt_keys, k), (prompt_values, v)))
        # The queries that share a key head become its rows, so that no key is repeated.
        queries = take(q, answers.places, heads).transpose(1, 2).reshape(
            count, kv, groups * longest, size)
        y = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=answers.mask, scale=scaling)
        parts.append(y.view(count, heads, longest, size).transpose(1, 2).reshape(-1, heads * size))
    y = torch.cat(parts).index_select(0, segments.back)
    return y.view(rows, length, heads, size), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

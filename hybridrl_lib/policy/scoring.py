"""Log-probabilities and entropies of tokens, without all logits in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import TOKENS, linear, rounded_up

# 1. Log-probabilities and entropy ---------------------------------------------------------------


def _shifted_logits(hidden: Tensor, head: Tensor, bias: Tensor | None,
                    warmth: float | Tensor) -> tuple[Tensor, Tensor]:
    """(chunk, vocabulary) logits at a temperature minus their maximum; their log normalizer."""
    logits = linear(hidden, head, bias).float()
    if isinstance(warmth, Tensor) or warmth != 1:
        logits = logits.div_(warmth)
    logits = logits.sub_(logits.amax(-1, keepdim=True))
    return logits, logits.logsumexp(-1, keepdim=True)


class _Scores(torch.autograd.Function):
    """Log-probabilities and entropies, one chunk at a time.

    The backward pass recomputes the logits, unless there is only one chunk, which is then kept.
    With p = softmax(z): d log p_y / dz = 1_y - p, dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(ctx, hidden, head, bias, targets, temperature, chunk_tokens, with_entropy):
        scores = hidden.new_empty(len(targets), dtype=torch.float32)
        entropies = torch.zeros_like(scores)
        ctx.chunks = [slice(i, i + chunk_tokens) for i in range(0, len(targets), chunk_tokens)]
        ctx.kept = None
        for part in ctx.chunks:
            warmth = temperature[part, None] if isinstance(temperature, Tensor) else temperature
            logits, normalizer = _shifted_logits(hidden[part], head, bias, warmth)
            scores[part] = (logits.gather(-1, targets[part, None]) - normalizer).squeeze(-1)
            if with_entropy:  # H = log Z - sum_v p_v logit_v
                shares = (logits - normalizer).exp_()
                # A word without any probability has no share in it, whatever its logit is.
                entropies[part] = normalizer.squeeze(-1) - torch.linalg.vecdot(
                    shares, logits.clamp_(min=-1e30))
            if len(ctx.chunks) == 1 and any(ctx.needs_input_grad):
                ctx.kept = logits, normalizer
            logits = shares = None  # gone before the next chunk's are there
        ctx.save_for_backward(hidden, head, bias, targets, entropies,
                              temperature if isinstance(temperature, Tensor) else None)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        return scores, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, for_scores, for_entropies):
        hidden, head, bias, targets, entropies, temperatures = ctx.saved_tensors
        for_hidden, for_head, for_bias = torch.empty_like(hidden), None, None
        for part in ctx.chunks:
            warmth = ctx.temperature if temperatures is None else temperatures[part, None]
            logits, normalizer = ctx.kept or _shifted_logits(hidden[part], head, bias, warmth)
            log_p = logits - normalizer if ctx.kept else logits.sub_(normalizer)
            p = log_p.exp()
            factor = for_scores[part, None]
            if ctx.with_entropy:
                factor = log_p.clamp_(min=-1e30).add_(entropies[part, None]).mul_(
                    for_entropies[part, None]).add_(factor)
            gradient = p.mul_(factor).neg_()
            gradient.scatter_add_(-1, targets[part, None], for_scores[part, None])
            if not isinstance(warmth, float) or warmth != 1:
                gradient = gradient.div_(warmth)
            gradient = gradient.to(head.dtype)
            for_hidden[part] = linear(gradient, head.t())
            if ctx.needs_input_grad[1]:
                more = linear(gradient.t(), hidden[part].t())
                for_head = more if for_head is None else for_head.add_(more)
            if bias is not None and ctx.needs_input_grad[2]:
                more = gradient.sum(0)
                for_bias = more if for_bias is None else for_bias.add_(more)
            logits = log_p = p = factor = gradient = None  # as in the forward pass
        return for_hidden, for_head, for_bias, None, None, None, None


def score_tokens(hidden: Tensor, head: Tensor, targets: Tensor, *, bias: Tensor | None = None,
                 temperature: float | Tensor = 1.0, chunk_tokens: int = 1024,
                 with_entropy: bool = True) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and entropy of the distribution it was drawn from.

    The (tokens, vocabulary) logits are the largest tensor of a small model. Only `chunk_tokens`
    tokens of them exist at a time, in up to three buffers; the backward pass recomputes them.

    Args:
        hidden: (N, width) last hidden states, at the positions *before* the targets.
        head: (vocabulary, width) weights of the output layer.
        targets: (N,) token ids.
        bias: (vocabulary,) of the output layer, if it has one.
        temperature: the sampling temperature, which divides the logits; a number, or (N,).
        chunk_tokens: number of tokens whose logits are in memory at a time.
        with_entropy: False saves the work and returns zeros.

    Returns:
        log_probabilities (N,) and entropies over the vocabulary (N,), in nats, fp32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, head = hidden.to(dtype), head.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    tokens = len(targets)
    more = (0, rounded_up(tokens, TOKENS) - tokens)  # these tokens' scores are cut off again
    hidden, targets = F.pad(hidden, (0, 0, *more)), F.pad(targets, more)
    if isinstance(temperature, Tensor):
        temperature = F.pad(temperature, more, value=1.0)
    with torch.autocast(device, enabled=False):  # the entropy's sum would be in half precision
        scores, entropies = _Scores.apply(hidden, head, bias, targets, temperature, chunk_tokens,
                                          with_entropy)
    return scores[:tokens], entropies[:tokens]

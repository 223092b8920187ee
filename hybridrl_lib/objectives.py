"""The losses, as pure functions of tensors: L_SFT, L_GRPO, KL and entropy (paper, section 3).

Tokens of all completions of an optimiser step lie flat in one dimension, N; `sequence` (N,) says
which completion each belongs to. A loss is then always a weighted sum over tokens,

    L = sum_t  weight_t * loss_t,

and everything that papers argue about in normalisation is in the weights (`token_weights`), which
are computed once over the whole optimiser step. However the tokens are then cut into
micro-batches, the gradient is the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import TOKENS, linear, rounded_up

# Log-ratios are clamped before exp() so that one freak token cannot make the loss infinite.
LARGEST_LOG_RATIO = 20.0


# 1. Log-probabilities and entropy ---------------------------------------------------------------


def _shifted_logits(hidden: Tensor, head: Tensor, bias: Tensor | None,
                    warmth: float | Tensor) -> tuple[Tensor, Tensor]:
    """(chunk, vocabulary) logits at a temperature less their largest; their log normaliser."""
    logits = linear(hidden, head, bias).float()
    if isinstance(warmth, Tensor) or warmth != 1:
        logits = logits.div_(warmth)
    logits = logits.sub_(logits.amax(-1, keepdim=True))
    return logits, logits.logsumexp(-1, keepdim=True)


class _Scores(torch.autograd.Function):
    """Log-probabilities and entropies a chunk at a time.

    The backward pass computes the logits again, unless there is one chunk: to keep that one costs
    no more memory than to compute it then.
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
            logits, normaliser = _shifted_logits(hidden[part], head, bias, warmth)
            scores[part] = (logits.gather(-1, targets[part, None]) - normaliser).squeeze(-1)
            if with_entropy:  # H = log Z - sum_v p_v logit_v
                shares = (logits - normaliser).exp_()
                # A word without any probability has no share in it, whatever its logit is.
                entropies[part] = normaliser.squeeze(-1) - torch.linalg.vecdot(
                    shares, logits.clamp_(min=-1e30))
            if len(ctx.chunks) == 1 and any(ctx.needs_input_grad):
                ctx.kept = logits, normaliser
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
            logits, normaliser = ctx.kept or _shifted_logits(hidden[part], head, bias, warmth)
            log_p = logits - normaliser if ctx.kept else logits.sub_(normaliser)
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
    """Log-probability of each target token and entropy of the distribution it was drawn from.

    The (tokens x vocabulary) logits are the memory of a small model. They exist here for
    `chunk_tokens` tokens at a time and are computed again in the backward pass, in three buffers of
    that size at most.

    Args:
        hidden: (N, width) last hidden states, at the positions *before* the targets.
        head: (vocabulary, width) weights of the output layer.
        targets: (N,) token ids.
        bias: (vocabulary,) of the output layer, if it has one.
        temperature: divides the logits; the one used for sampling. A number, or (N,).
        chunk_tokens: how many tokens' logits are in memory at a time.
        with_entropy: False saves the work and returns zeros.

    Returns:
        log_probabilities (N,) and entropies (N,), in nats, fp32. The entropy is over the whole
        vocabulary.
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


# 2. Normalisation -------------------------------------------------------------------------------


def token_weights(lengths: Tensor, normalisation: str, longest: int | None = None) -> Tensor:
    """The weight of each token of each completion in a mean over the optimiser step.

    Args:
        lengths: (S,) number of tokens T_i of every completion of the step, EOS included.
        normalisation:
            `sequence_mean`  1 / (S * T_i), the paper's 1/G sum_i 1/T_i sum_t;
            `token_mean`     1 / sum_i T_i, every token counts the same;
            `sequence_sum`   1 / S, the letter of the paper's L_SFT and H;
            `constant`       1 / (S * longest), Dr. GRPO.
        longest: the cap on completion tokens, for `constant`.

    Returns:
        (S,) weights; token t of completion i has weight result[i].
    """
    lengths = lengths.to(torch.float32)
    count = len(lengths)
    if normalisation == "sequence_mean":
        return 1.0 / (count * lengths.clamp(min=1))
    if normalisation == "token_mean":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    if normalisation == "sequence_sum":
        return torch.ones_like(lengths) / count
    if normalisation == "constant":
        if not longest:
            raise ValueError("normalisation 'constant' needs `longest`, the cap on tokens")
        return torch.ones_like(lengths) / (count * longest)
    raise ValueError(f"unknown normalisation {normalisation!r}")


# 3. Advantages ----------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale: str = "group_std", epsilon: float = 1e-4) -> Tensor:
    """The gain of each answer over the mean reward of its group (paper, L_GRPO).

    Args:
        rewards: (groups, G).
        scale: `group_std` divides by the group's standard deviation (GRPO, Bessel-corrected) plus
            epsilon; `none` leaves the plain gain (the paper's words).

    Returns:
        (groups, G). All zero in a group whose rewards are all equal.
    """
    gains = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "none" or rewards.shape[1] < 2:
        return gains
    if scale != "group_std":
        raise ValueError(f"unknown advantage scale {scale!r}")
    return gains / (rewards.std(dim=1, keepdim=True) + epsilon)


def overlong_punishment(lengths: Tensor, finished: Tensor, longest: int, share: float) -> Tensor:
    """What a long completion loses of its reward: DAPO's soft overlong punishment.

    0 up to (1 - share) * longest tokens, then linearly down to -1 at the cap; -1 for a completion
    that was cut off there.

    Args:
        lengths: tokens; finished: bool, of the same shape.
        longest: the cap on completion tokens.
        share: of the cap, over which the punishment grows; 0 for none.
    """
    if not share:
        return torch.zeros_like(lengths, dtype=torch.float32)
    soft = ((1 - share) * longest - lengths) / (share * longest)
    return torch.where(finished, soft.clamp(-1, 0), torch.full_like(soft, -1))


# 4. KL divergence -------------------------------------------------------------------------------


def kl_to_old(log_probabilities: Tensor, old: Tensor) -> Tensor:
    """KL(pi_theta || pi_old) per token from samples of pi_old: rho log rho - rho + 1.

    Unbiased under pi_old, never negative, and its gradient is that of the divergence.
    Shapes (N,), nats.
    """
    log_ratio = (log_probabilities - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = log_ratio.exp()
    return ratio * log_ratio - ratio + 1


def k3(log_probabilities: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimate of KL(pi_theta || pi_reference) per token, from samples of pi_theta.

    exp(u) - u - 1 with u = log pi_reference - log pi_theta: never negative. Shapes (N,), nats.
    """
    u = (reference - log_probabilities).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return u.exp() - u - 1


def kl_to_reference(log_probabilities: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """KL(pi_theta || pi_reference) per token from samples of pi_old: rho * k3. Shapes (N,)."""
    log_ratio = (log_probabilities - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return log_ratio.exp() * k3(log_probabilities, reference)


# 5. The losses, per token -----------------------------------------------------------------------


def sft_token_losses(log_probabilities: Tensor) -> Tensor:
    """L_SFT per token: -log pi_theta(y_t | x, y_<t). Shape (N,)."""
    return -log_probabilities


def policy_token_losses(log_probabilities: Tensor, old: Tensor, advantages: Tensor,
                        epsilon_low: float, epsilon_high: float) -> Tensor:
    """The clipped surrogate of L_GRPO per token, with the sign of a loss.

    -min[rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A], rho = pi_theta / pi_old per token.

    Args:
        log_probabilities, old, advantages: (N,); `old` and `advantages` carry no gradient.
    """
    log_ratio = (log_probabilities - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def is_clipped(log_probabilities: Tensor, old: Tensor, advantages: Tensor, epsilon_low: float,
               epsilon_high: float) -> Tensor:
    """(N,) bool: where the clip is active, so that the token has no policy gradient."""
    ratio = (log_probabilities - old).exp()
    return ((ratio < 1 - epsilon_low) & (advantages < 0)) | (
        (ratio > 1 + epsilon_high) & (advantages > 0))


def entropy_terms(log_probabilities: Tensor, entropies: Tensor, estimator: str) -> Tensor:
    """H per token as the entropy term uses it. Shapes (N,).

    `vocabulary`: the entropy of the distribution over the vocabulary. `sampled`: the letter of the
    paper, -pi log pi of the sampled token; differentiated, it pushes the probability of every
    sampled token towards 1/e and is no estimator of the entropy.
    """
    if estimator == "vocabulary":
        return entropies
    if estimator == "sampled":
        return -log_probabilities.exp() * log_probabilities
    raise ValueError(f"unknown entropy estimator {estimator!r}")

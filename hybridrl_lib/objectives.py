"""The paper's equations, one function each. Imports torch and nothing else.

The paper is Denisov and Serdyuk (2025); its formulas have no numbers, so they are cited by name.
The tokens of all completions of an optimizer update lie in one flat dimension N. A loss is a
weighted sum over these tokens,

    L = sum_t weight_t * loss_t,

and everything that papers disagree about in normalization is in the weights (`token_weights`). They
are computed once per update, so the gradient does not depend on how the tokens are later split into
micro-batches.
"""

import torch
from torch import Tensor

# Log-ratios are clamped before exp(), so that one extreme token cannot make the loss infinite.
LARGEST_LOG_RATIO = 20.0


# 1. The losses ------------------------------------------------------------------------------------


def hybrid_loss(sft: Tensor | float, rl: Tensor | float, entropy: Tensor | float, *,
                lambda_sft: float, lambda_rl: float, gamma: float) -> Tensor | float:
    """L = lambda_SFT L_SFT + lambda_RL L_RL - gamma H (the paper, L_total and R).

    Args:
        sft, rl, entropy: scalars, from `sft_loss`, `grpo_loss`, and `entropy_term`; 0.0 for a term
            that an update does not have.
        lambda_sft, lambda_rl: >= 0, and may change at every step. The combined loss has lambda and
            1 - lambda; a stage of SFT or RL has 1 and 0.
        gamma: weight of the entropy regularization, >= 0.
    """
    return lambda_sft * sft + lambda_rl * rl - gamma * entropy


def sft_loss(log_p: Tensor, weights: Tensor) -> Tensor:
    """L_SFT = -sum_t w_t log pi_theta(y_t | x, y_<t) (the paper, L_SFT).

    Args:
        log_p: (N,) log-probabilities of the demonstrations' tokens, EOS included.
        weights: (N,) from `token_weights`; 0 for tokens that are not demonstrations.
    """
    return -(weights * log_p).sum()


def grpo_loss(log_p: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, *,
              epsilon_low: float, epsilon_high: float, beta: float = 0.0,
              kl: Tensor | float = 0.0, no_gradient: Tensor | None = None) -> Tensor:
    """L_GRPO = -sum_t w_t { min[rho A, clip(rho, 1 - eps, 1 + eps) A] - beta D_KL } (the paper).

    With the default weights 1 / (S T_i) the sum is the paper's 1/G sum_i 1/T_i sum_t.

    Args:
        log_p: (N,) log pi_theta of the sampled tokens.
        old: (N,) log pi_old of the same tokens, without gradient.
        advantages: (N,) without gradient.
        weights: (N,) from `token_weights`; 0 for tokens that were not sampled.
        epsilon_low, epsilon_high: the paper has one epsilon for both.
        beta: weight of the divergence.
        kl: (N,) per token, from `kl_to_old` or `kl_to_reference`.
        no_gradient: (N,) bool, tokens whose surrogate is detached (Clip-Cov, 2505.22617).
    """
    surrogate = clipped_surrogate(importance_ratio(log_p, old), advantages, epsilon_low,
                                  epsilon_high)
    if no_gradient is not None:
        surrogate = torch.where(no_gradient, surrogate.detach(), surrogate)
    return -(weights * (surrogate - beta * kl)).sum()


def entropy_term(log_p: Tensor, entropies: Tensor, weights: Tensor,
                 estimator: str = "vocabulary") -> Tensor:
    """H = sum_t w_t H_t (the paper, R = gamma H).

    Args:
        log_p: (N,) log-probabilities of the tokens of the text.
        entropies: (N,) entropies over the vocabulary, in nats.
        weights: (N,) from `token_weights`.
        estimator: `vocabulary` = the entropy over all words. `sampled` = the formula as printed,
            H_t = -pi log pi of the token of the text. Its gradient pushes the probability of every
            such token toward 1/e, so it does not estimate the gradient of the entropy.
    """
    if estimator not in ("vocabulary", "sampled"):
        raise ValueError(f"unknown entropy estimator {estimator!r}")
    terms = entropies if estimator == "vocabulary" else -log_p.exp() * log_p
    return (weights * terms).sum()


# 2. What the losses are made of -------------------------------------------------------------------


def importance_ratio(log_p: Tensor, old: Tensor) -> Tensor:
    """rho_t = pi_theta(y_t | x, y_<t) / pi_old(y_t | x, y_<t) (the paper, L_GRPO). Shapes (N,)."""
    return (log_p - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def clipped_surrogate(ratio: Tensor, advantages: Tensor, epsilon_low: float,
                      epsilon_high: float) -> Tensor:
    """min[rho A, clip(rho, 1 - eps_low, 1 + eps_high) A] per token (the paper, L_GRPO).

    Shapes (N,). A gain: the loss has it with a minus sign.
    """
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def is_clipped(log_p: Tensor, old: Tensor, advantages: Tensor, epsilon_low: float,
               epsilon_high: float) -> Tensor:
    """(N,) bool: where the clip is active, so the token has no policy gradient."""
    ratio = (log_p - old).exp()
    return ((ratio < 1 - epsilon_low) & (advantages < 0)) | (
        (ratio > 1 + epsilon_high) & (advantages > 0))


def group_advantages(rewards: Tensor, scale: str = "group_std", epsilon: float = 1e-4) -> Tensor:
    """A_i: the gain of each answer over the mean reward of its group (the paper, L_GRPO).

    Args:
        rewards: (groups, G).
        scale: `group_std` also divides by the group's standard deviation (GRPO, 2402.03300, with
            Bessel's correction) plus epsilon; `none` keeps the plain gain (the paper's words).

    Returns:
        (groups, G). All zero in a group whose rewards are equal.
    """
    if scale not in ("group_std", "none"):
        raise ValueError(f"unknown advantage scale {scale!r}")
    gains = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "none" or rewards.shape[1] < 2:
        return gains
    return gains / (rewards.std(dim=1, keepdim=True) + epsilon)


def token_weights(lengths: Tensor, normalization: str, longest: int | None = None) -> Tensor:
    """The weight of each token of each completion in a mean over the optimizer update.

    Args:
        lengths: (S,) number of tokens T_i of every completion of the update, EOS included.
        normalization:
            `sequence_mean`  1 / (S * T_i), the paper's 1/G sum_i 1/T_i sum_t in L_GRPO;
            `token_mean`     1 / sum_i T_i, every token counts the same;
            `sequence_sum`   1 / S, the letter of the paper's L_SFT and H;
            `constant`       1 / (S * longest), Dr. GRPO (2503.20783).
        longest: the maximum number of completion tokens, for `constant`.

    Returns:
        (S,) weights; token t of completion i has the weight result[i].
    """
    lengths = lengths.to(torch.float32)
    count = len(lengths)
    if normalization == "sequence_mean":
        return 1.0 / (count * lengths.clamp(min=1))
    if normalization == "token_mean":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    if normalization == "sequence_sum":
        return torch.ones_like(lengths) / count
    if normalization == "constant":
        if not longest:
            raise ValueError("normalization 'constant' needs `longest`, the maximum of tokens")
        return torch.ones_like(lengths) / (count * longest)
    raise ValueError(f"unknown normalization {normalization!r}")


def overlong_penalty(lengths: Tensor, finished: Tensor, longest: int, share: float) -> Tensor:
    """What a long completion loses of its reward: DAPO's soft overlong punishment (2503.14476).

    0 up to (1 - share) * longest tokens, then linearly down to -1 at the maximum; -1 for a
    completion that was truncated there.

    Args:
        lengths: tokens; finished: bool, of the same shape.
        longest: the maximum number of completion tokens.
        share: the fraction of it over which the penalty grows; 0 for no penalty.
    """
    if not share:
        return torch.zeros_like(lengths, dtype=torch.float32)
    soft = ((1 - share) * longest - lengths) / (share * longest)
    return torch.where(finished, soft.clamp(-1, 0), torch.full_like(soft, -1))


# 3. KL divergences --------------------------------------------------------------------------------


def kl_to_old(log_p: Tensor, old: Tensor) -> Tensor:
    """D_KL(pi_theta || pi_old) per token, from samples of pi_old: rho log rho - rho + 1.

    The paper's D_KL. Unbiased under pi_old, never negative, and its gradient is the gradient of the
    divergence. Shapes (N,), nats.
    """
    log_ratio = (log_p - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = log_ratio.exp()
    return ratio * log_ratio - ratio + 1


def k3(log_p: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimate of D_KL(pi_theta || pi_reference) per token, from samples of pi_theta.

    exp(u) - u - 1 with u = log pi_reference - log pi_theta: never negative (GRPO, 2402.03300,
    equation 4). Shapes (N,), nats.
    """
    u = (reference - log_p).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return u.exp() - u - 1


def kl_to_reference(log_p: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """D_KL(pi_theta || pi_reference) per token, from samples of pi_old: rho * k3. Shapes (N,)."""
    return importance_ratio(log_p, old) * k3(log_p, reference)

"""The paper's equations as pure functions, against exact sums or values worked out by hand."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridrl_lib.objectives import (
    LARGEST_LOG_RATIO,
    clipped_surrogate,
    entropy_term,
    group_advantages,
    grpo_loss,
    hybrid_loss,
    importance_ratio,
    is_clipped,
    k3,
    kl_to_old,
    kl_to_reference,
    sft_loss,
    token_weights,
)
from hybridrl_lib.policy.scoring import score_tokens

# A vocabulary of three words: every expectation over a token is a sum of three terms.
OLD = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64).log_softmax(0)
REFERENCE = torch.tensor([-0.3, 0.9, 0.2], dtype=torch.float64).log_softmax(0)


def current() -> torch.Tensor:
    """Logits of a policy that is neither the old one nor the reference."""
    return torch.tensor([0.2, 0.5, -0.6], dtype=torch.float64, requires_grad=True)


def value_and_gradient(function):
    logits = current()
    value = function(logits.log_softmax(0))
    value.backward()
    return value.item(), logits.grad


def exact_kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


# KL and entropy, exactly --------------------------------------------------------------------------


def test_kl_to_old_is_the_divergence_under_samples_of_the_old_policy():
    """The paper's D_KL(pi || pi_old): estimate and gradient have the right expectation."""
    estimate = value_and_gradient(lambda log_p: (OLD.exp() * kl_to_old(log_p, OLD)).sum())
    exact = value_and_gradient(lambda log_p: exact_kl(log_p, OLD))
    assert estimate[0] == pytest.approx(exact[0], abs=1e-12)
    torch.testing.assert_close(estimate[1], exact[1])


def test_kl_to_reference_is_the_divergence_under_samples_of_the_old_policy():
    """rho * k3: samples come from pi_old, not from pi, and the estimate must know it."""
    estimate = value_and_gradient(
        lambda log_p: (OLD.exp() * kl_to_reference(log_p, OLD, REFERENCE)).sum())
    exact = value_and_gradient(lambda log_p: exact_kl(log_p, REFERENCE))
    assert estimate[0] == pytest.approx(exact[0], abs=1e-12)
    torch.testing.assert_close(estimate[1], exact[1])


def test_plain_k3_needs_samples_of_the_policy_itself():
    """k3 without the ratio is right on-policy and wrong off-policy: why the ratio is there."""
    log_p = current().detach().log_softmax(0)
    exact = exact_kl(log_p, REFERENCE)
    assert (log_p.exp() * k3(log_p, REFERENCE)).sum() == pytest.approx(exact.item(), abs=1e-12)
    assert abs((OLD.exp() * k3(log_p, REFERENCE)).sum() - exact) > 0.01


def test_kl_estimates_are_never_negative():
    """A "KL" below zero in a log is a bug that many projects ship."""
    grid = -torch.logspace(-6, 3, 60)
    one, other = grid[:, None].expand(60, 60), grid[None, :].expand(60, 60)
    old = OLD.float()[0].expand(60, 60)
    for values in (kl_to_old(one, other), k3(one, other), kl_to_reference(one, old, other)):
        assert values.isfinite().all() and values.min() >= -1e-6


def test_kl_between_equal_policies_is_zero():
    """pi = pi_old = pi_reference: every estimate is 0, and so is its gradient."""
    for function in (lambda log_p, same: kl_to_old(log_p, same), k3,
                     lambda log_p, same: kl_to_reference(log_p, same, same)):
        logits = current()
        log_p = logits.log_softmax(0)
        values = function(log_p, log_p.detach())
        values.sum().backward()
        assert values.abs().max() == 0
        assert logits.grad.abs().max() < 1e-15


def test_the_clamp_is_far_from_what_training_sees():
    """Each KL keeps its sign and its gradient at ordinary log-ratios."""
    log_p = torch.tensor([-1.0, -1.0], requires_grad=True)
    other = torch.tensor([-1.5, -0.5])
    values = kl_to_old(log_p, other)
    assert values.tolist() == pytest.approx(
        [r * math.log(r) - r + 1 for r in (math.exp(0.5), math.exp(-0.5))], rel=1e-5)
    values.sum().backward()  # rho log rho: toward the old policy from both sides
    assert log_p.grad.tolist() == pytest.approx([0.5 * math.exp(0.5), -0.5 * math.exp(-0.5)])


def test_policy_gradient_is_the_gradient_of_the_expected_advantage():
    """The surrogate, unclipped, under samples of pi_old: -E_pi[A] with its gradient."""
    advantages = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    estimate = value_and_gradient(
        lambda log_p: grpo_loss(log_p, OLD, advantages, OLD.exp(), epsilon_low=0.99,
                                epsilon_high=99))
    exact = value_and_gradient(lambda log_p: -(log_p.exp() * advantages).sum())
    assert estimate[0] == pytest.approx(exact[0], abs=1e-12)
    torch.testing.assert_close(estimate[1], exact[1])


def head_for(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and head whose product is `logits` (N, vocabulary)."""
    return logits, torch.eye(logits.shape[1], dtype=logits.dtype)


def test_entropy_is_over_the_whole_vocabulary():
    """H = -sum p log p over all words, not over the sampled ones, with the right gradient."""
    logits = torch.tensor([[0.2, 0.5, -0.6], [3.0, -2.0, 0.0]], requires_grad=True)
    hidden, head = head_for(logits)
    _, entropies = score_tokens(hidden, head, torch.tensor([0, 2]))
    log_p = logits.double().log_softmax(-1)
    exact = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(entropies.double(), exact, atol=1e-6, rtol=1e-6)
    mine, = torch.autograd.grad(entropies.sum(), logits, retain_graph=True)
    theirs, = torch.autograd.grad(exact.sum(), logits)
    torch.testing.assert_close(mine, theirs.float(), atol=1e-6, rtol=1e-5)


def test_vocabulary_entropy_term_is_that_entropy():
    """`training.entropy=vocabulary` is the weighted sum of exact entropies, divided nowhere."""
    entropies = torch.tensor([0.3, 1.2])
    weights = torch.tensor([0.5, 0.25])
    term = entropy_term(torch.tensor([-1.0, -2.0]), entropies, weights)
    assert term.item() == pytest.approx(0.45)
    with pytest.raises(ValueError, match="printed"):
        entropy_term(entropies, entropies, weights, "printed")


def test_sampled_entropy_term_pushes_toward_one_over_e():
    """The gradient of the printed sum moves pi(y_t) toward 1/e: up below it, down above it."""
    for probability in (0.1, 0.3, 0.5, 0.9):
        log_p = torch.tensor([math.log(probability)], requires_grad=True)
        term = entropy_term(log_p, torch.zeros(1), torch.ones(1), "sampled")
        assert term.item() == pytest.approx(-probability * math.log(probability))
        term.backward()
        assert (log_p.grad.item() > 0) == (probability < 1 / math.e)
    at_rest = torch.tensor([-1.0], requires_grad=True)
    entropy_term(at_rest, torch.zeros(1), torch.ones(1), "sampled").backward()
    assert abs(at_rest.grad.item()) < 1e-7


def test_sampled_entropy_term_does_not_estimate_the_entropy():
    """Neither its expectation nor its expected gradient is that of H."""
    def sampled(log_p):
        return entropy_term(log_p, log_p, log_p.detach().exp(), "sampled")

    estimate = value_and_gradient(sampled)
    exact = value_and_gradient(lambda log_p: -(log_p.exp() * log_p).sum())
    assert abs(estimate[0] - exact[0]) > 0.1
    assert (estimate[1] - exact[1]).norm() > 0.1


# The policy loss ----------------------------------------------------------------------------------


def test_the_ratio_is_per_token():
    """Each token has its own rho; a ratio of whole sequences would give other losses."""
    old = torch.tensor([-1.0, -1.0, -2.0])
    now = torch.tensor([-0.95, -1.1, -2.0])
    torch.testing.assert_close(importance_ratio(now, old), torch.tensor([0.05, -0.1, 0.0]).exp())


def test_the_clip():
    """min[rho A, clip(rho) A], with no gradient exactly where the clip is active."""
    rows = (  # ratio, advantage, loss, clipped
        (1.5, 1.0, -1.2, True),    # a good token that is much likelier already: no more
        (1.1, 1.0, -1.1, False),
        (0.5, 1.0, -0.5, False),   # a good token that became rarer: always pulled back
        (0.5, -1.0, 0.8, True),    # a bad token that is much rarer already: no more
        (0.9, -1.0, 0.9, False),
        (1.5, -1.0, 1.5, False))   # a bad token that became likelier: always pulled back
    found = []
    for ratio, advantage, *_ in rows:
        now = torch.tensor([math.log(ratio) - 2.0], requires_grad=True)
        arguments = (torch.tensor([-2.0]), torch.tensor([advantage]), 0.2, 0.2)
        value = -clipped_surrogate(importance_ratio(now, arguments[0]), *arguments[1:])
        value.sum().backward()
        clipped = is_clipped(now.detach(), *arguments).item()
        assert (now.grad.item() == 0) == clipped
        found.append((ratio, advantage, pytest.approx(value.item()), clipped))
    assert list(rows) == found


def test_the_clip_has_two_bounds():
    """epsilon_low bounds from below and epsilon_high from above, not the other way round."""
    old, now = torch.zeros(2), torch.tensor([0.5, 2.0]).log()
    gains = clipped_surrogate(importance_ratio(now, old), torch.tensor([-1.0, 1.0]), 0.1, 0.3)
    torch.testing.assert_close(gains, torch.tensor([-0.9, 1.3]))


def test_an_extreme_token_leaves_everything_finite():
    """A log-ratio far out is clamped before exp(), in the loss and in both divergences."""
    old = torch.tensor([-1000.0, -0.1])
    now = torch.tensor([-0.1, -1000.0], requires_grad=True)
    kl = kl_to_old(now, old) + kl_to_reference(now, old, old)
    total = grpo_loss(now, old, torch.tensor([-1.0, 1.0]), torch.ones(2), epsilon_low=0.2,
                      epsilon_high=0.2, beta=1.0, kl=kl)
    total.backward()
    assert total.isfinite() and now.grad.isfinite().all()
    assert math.exp(LARGEST_LOG_RATIO) < torch.finfo(torch.float32).max / 1e9


def test_sft_loss_is_the_weighted_negative_log_probability():
    """L_SFT with its sign and weights, by hand."""
    log_p = torch.tensor([-0.5, -2.0], requires_grad=True)
    loss = sft_loss(log_p, torch.tensor([0.5, 0.25]))
    loss.backward()
    assert loss.item() == pytest.approx(0.75)
    assert log_p.grad.tolist() == [-0.5, -0.25]


def test_grpo_loss_is_the_printed_one():
    """1/G sum 1/T_i sum_t of min, clip, and beta KL, on two answers worked out by hand."""
    old = torch.tensor([-1.0, -1.0, -2.0])  # one answer of two tokens, one of one
    now = (old + torch.tensor([1.5, 1.0, 0.5]).log()).requires_grad_()
    advantages, weights = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0.25, 0.25, 0.5])
    kl = kl_to_old(now, old)
    loss = grpo_loss(now, old, advantages, weights, epsilon_low=0.2, epsilon_high=0.2, beta=0.1,
                     kl=kl)
    divergence = [r * math.log(r) - r + 1 for r in (1.5, 1.0, 0.5)]
    gains = [1.2, 1.0, -0.8]
    expected = -sum(w * (g - 0.1 * d) for w, g, d in zip((0.25, 0.25, 0.5), gains, divergence,
                                                         strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()  # clipped tokens only have the gradient of the KL: w beta rho log rho
    assert now.grad.tolist() == pytest.approx(
        [0.25 * 0.1 * 1.5 * math.log(1.5), -0.25, 0.5 * 0.1 * 0.5 * math.log(0.5)], abs=1e-6)


def test_detached_tokens_keep_their_value_and_lose_their_gradient():
    """Clip-Cov: the surrogate of a marked token has no gradient; its KL keeps it."""
    old, now = torch.tensor([-1.0, -1.0]), torch.tensor([-0.9, -0.9], requires_grad=True)
    arguments = (old, torch.ones(2), torch.full((2,), 0.5))
    plain = grpo_loss(now, *arguments, epsilon_low=0.2, epsilon_high=0.2)
    marked = grpo_loss(now, *arguments, epsilon_low=0.2, epsilon_high=0.2,
                       no_gradient=torch.tensor([True, False]))
    assert marked.item() == plain.item()
    marked.backward()
    assert now.grad[0] == 0 and now.grad[1] < 0


def test_hybrid_loss_weights_its_three_terms():
    """L = lambda_SFT L_SFT + lambda_RL L_RL - gamma H: factors and signs, also of the gradient."""
    terms = [torch.tensor(value, requires_grad=True) for value in (2.0, 3.0, 5.0)]
    loss = hybrid_loss(*terms, lambda_sft=0.3, lambda_rl=0.7, gamma=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0.6 + 2.1 - 0.5)
    assert [term.grad.item() for term in terms] == pytest.approx([0.3, 0.7, -0.1])
    assert hybrid_loss(2.0, 0.0, 0.0, lambda_sft=1.0, lambda_rl=0.0, gamma=0.0) == 2.0


# Advantages ---------------------------------------------------------------------------------------


def test_equal_rewards_have_no_advantage():
    """A group without signal: exactly 0, or at most rounding of a deviation of 1e-8."""
    for scale in ("group_std", "none"):
        for reward in (0.0, 1.0, 0.3):
            largest = group_advantages(torch.full((2, 7), reward), scale).abs().max()
            assert largest < 1e-3 and (reward == 0.3 or largest == 0), (scale, reward)


def test_advantages_are_taken_within_each_group():
    """Group mean and Bessel-corrected deviation of its own row; 1 of 8 right gives +2.47, -0.35."""
    rewards = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [1.0, 1, 1, 1, 0, 0, 0, 0]])
    scaled = group_advantages(rewards, "group_std")
    assert scaled[0, :2].tolist() == pytest.approx([2.4749, -0.3536], abs=1e-3)
    plain = group_advantages(rewards, "none")
    assert plain[0, :2].tolist() == pytest.approx([0.875, -0.125])
    assert plain[1].tolist() == pytest.approx([0.5] * 4 + [-0.5] * 4)
    with pytest.raises(ValueError, match="batch"):
        group_advantages(rewards, "batch")


# Normalization ------------------------------------------------------------------------------------


def test_named_normalizations():
    """Each name is one formula over the token losses of the whole optimizer step."""
    lengths, sums = torch.tensor([2, 5, 9]), torch.tensor([1.5, -0.5, 4.0])
    formulas = {"sequence_mean": (sums / lengths).sum() / 3,
                "token_mean": sums.sum() / lengths.sum(),
                "sequence_sum": sums.sum() / 3, "constant": sums.sum() / (3 * 10)}
    found = {name: float((token_weights(lengths, name, longest=10) * sums).sum())
             for name in formulas}
    assert found == pytest.approx({name: float(value) for name, value in formulas.items()})


def test_normalization_refuses_what_it_does_not_know():
    """A misspelled name, or `constant` without its constant, is an error."""
    with pytest.raises(ValueError, match="mean_of_means"):
        token_weights(torch.tensor([1]), "mean_of_means")
    with pytest.raises(ValueError, match="longest"):
        token_weights(torch.tensor([1]), "constant")


# Log-probabilities and entropy in chunks ----------------------------------------------------------


def random_head(tokens=37, width=8, vocabulary=50, bias=True):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    more = torch.randn(vocabulary, generator=generator, requires_grad=True) if bias else None
    return hidden, head, targets, more


def test_chunks_do_not_change_scores_or_gradients():
    """Log-probabilities, entropies, and gradients are those of the plain formula, for any chunk."""
    hidden, head, targets, bias = random_head()
    leaves, weights = (hidden, head, bias), torch.linspace(-1, 1, len(targets))
    for warmth in (0.7, torch.linspace(0.5, 1.5, len(targets))):
        divisor = warmth if isinstance(warmth, float) else warmth[:, None]
        log_p = ((hidden @ head.T + bias) / divisor).log_softmax(-1)
        plain = log_p.gather(-1, targets[:, None]).squeeze(-1)
        plain_entropies = -(log_p.exp() * log_p).sum(-1)
        theirs = torch.autograd.grad((weights * plain + 0.3 * plain_entropies).sum(), leaves)
        for chunk in (1, 8, 36, 37, 1000):
            scores, entropies = score_tokens(hidden, head, targets, bias=bias, temperature=warmth,
                                             chunk_tokens=chunk)
            torch.testing.assert_close(scores, plain, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(entropies, plain_entropies, atol=1e-5, rtol=1e-5)
            mine = torch.autograd.grad((weights * scores + 0.3 * entropies).sum(), leaves)
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_scores_without_entropy_are_the_same():
    """with_entropy=False saves work and changes no log-probability."""
    hidden, head, targets, bias = random_head()
    with torch.no_grad():
        scores, _ = score_tokens(hidden, head, targets, bias=bias)
        alone, nothing = score_tokens(hidden, head, targets, bias=bias, with_entropy=False)
    assert torch.equal(scores, alone) and not nothing.any()


def test_scores_are_fp32_whatever_the_model_computes_in():
    """log-sum-exp over a vocabulary in bf16 is off by percents: it is taken in fp32."""
    hidden, head, targets, _ = random_head(bias=False)
    scores, entropies = score_tokens(hidden.bfloat16(), head.bfloat16(), targets)
    assert scores.dtype == entropies.dtype == torch.float32
    logits = (hidden.bfloat16() @ head.bfloat16().T).double()
    exact = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(scores.double(), exact, atol=1e-5, rtol=1e-5)


def test_entropy_of_a_certain_or_a_masked_word_is_zero_and_finite():
    """Logits of -1e9 or a distribution on one word make no NaN in entropy or gradient."""
    logits = torch.tensor([[0.0, -1e9, -1e9], [0.0, 0.0, -1e9]], requires_grad=True)
    hidden, head = head_for(logits)
    scores, entropies = score_tokens(hidden, head, torch.tensor([0, 1]))
    (scores + entropies).sum().backward()
    assert entropies.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-6)
    assert logits.grad.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_logits_of_all_tokens_never_exist_at_once():
    """Memory grows with chunk x vocabulary, not with tokens x vocabulary: forward and backward.

    Looked at twice: no operation makes a larger tensor, and what the graph keeps for the backward
    pass between the two is smaller than one chunk's logits.
    """
    tokens, vocabulary, chunk = 512, 3000, 32
    hidden, head, targets, _ = random_head(tokens, 4, vocabulary, bias=False)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores, entropies = score_tokens(hidden, head, targets, chunk_tokens=chunk)
            loss = (scores - 0.1 * entropies).sum()
        between = sum(kept.values())
        loss.backward()
    assert largest.elements <= chunk * vocabulary
    assert between < chunk * vocabulary

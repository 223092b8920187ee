"""fp16 with loss scaling, on a CPU: the same code as on a GPU."""

import math

import pytest
import torch
from accelerate import Accelerator, PartialState
from small_training import distance, flat, rows_of, snapshot, watch

from hybridrl_lib.learning.learner import PATIENCE_WITH_SCALING, make_accelerator
from hybridrl_lib.policy.scoring import score_tokens
from hybridrl_lib.system.errors import UserError


@pytest.fixture
def in_precision(make_policy, make_trainer):
    """in_precision(name, setup, ...) -> a trainer whose products are in that precision."""
    def make(precision, setup, *overrides):
        policy = make_policy()
        policy.precision = precision
        return make_trainer(setup, *overrides, policy=policy, folder=precision)

    return make


def test_fp16_scales_the_loss_and_not_the_gradient(in_precision):
    """What is clipped and taken is the gradient of the loss itself, and Adam's moments are fp32."""
    gradients = {}
    for precision in ("fp32", "fp16"):  # in one process, too
        trainer = in_precision(precision, "sft", "training.epochs=2")
        seen = watch(trainer)
        trainer.train()
        gradients[precision] = seen.gradients
        scaler = trainer.learner.accelerator.scaler
        assert (scaler is not None) == (precision == "fp16")
    assert scaler.get_scale() >= 2**16
    for half, exact in zip(gradients["fp16"], gradients["fp32"], strict=True):
        assert 0 < distance(half, exact) < 0.05
    state = trainer.learner.optimizer.optimizer.state
    assert state and all(value.dtype == torch.float32 for entry in state.values()
                         for name, value in entry.items() if name != "step")
    assert all(weight.dtype == torch.float32 for weight in snapshot(trainer).values())


def test_an_overflow_in_fp16_is_skipped_counted_and_halves_the_scale(in_precision):
    """A loss scale of 2^26 overflows: weights and moments stay, and the next one is smaller."""
    trainer = in_precision("fp16", "sft", "training.epochs=16")
    trainer.learner.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    seen = watch(trainer)
    trainer.train()
    rows = rows_of(trainer)
    skipped = [row.get("updates_not_finite", 0) for row in rows]
    count = sum(skipped)
    assert 1 <= count < PATIENCE_WITH_SCALING and skipped == sorted(skipped, reverse=True)
    assert all(torch.equal(seen.weights[0][k], seen.weights[count][k]) for k in seen.weights[0])
    assert any(not torch.equal(seen.weights[0][k], seen.weights[count + 1][k])
               for k in seen.weights[0])
    assert trainer.learner.accelerator.scaler.get_scale() == 2.0**26 / 2**count
    assert trainer.not_finite == count
    assert flat(trainer).isfinite().all()


def test_fp16_that_finds_no_scale_stops(in_precision, monkeypatch):
    """A loss that is not a number at any scale stops the run with its step and its problems."""
    trainer = in_precision("fp16", "sft", "training.epochs=40")
    score = trainer.policy.score

    def poisoned(*arguments, **more):
        scores, entropies = score(*arguments, **more)
        return scores * math.nan if scores.requires_grad else scores, entropies

    monkeypatch.setattr(trainer.policy, "score", poisoned)
    with pytest.raises(UserError, match=rf"{PATIENCE_WITH_SCALING} updates.*step "
                                        rf"{PATIENCE_WITH_SCALING} \(sft\).*tiny"):
        trainer.train()


def test_a_loss_that_is_not_finite_moves_nothing_even_with_a_finite_gradient(in_precision,
                                                                             monkeypatch):
    """A token of probability 0 costs infinitely much, and its gradient is a number."""
    for precision in ("fp32", "fp16"):
        trainer = in_precision(precision, "sft", "training.epochs=4")
        seen, score, calls = watch(trainer), trainer.policy.score, []

        def impossible(*arguments, score=score, calls=calls, **more):
            scores, entropies = score(*arguments, **more)
            calls.append(scores.requires_grad)
            return (scores - math.inf if sum(calls) == 1 else scores), entropies

        monkeypatch.setattr(trainer.policy, "score", impossible)
        trainer.train()
        rows = rows_of(trainer)
        assert [row.get("updates_not_finite", 0) for row in rows] == [1] + [0] * (len(rows) - 1)
        assert all(torch.equal(seen.weights[0][k], seen.weights[1][k]) for k in seen.weights[0])
        assert any(not torch.equal(seen.weights[0][k], seen.weights[2][k])
                   for k in seen.weights[0])


def test_entropy_is_summed_in_fp32_whatever_the_products_are():
    """Autocast would take its sum over the vocabulary in half precision, and its gradient too.

    A word without any probability must not make it NaN either: -1e30 is infinite in fp16.
    """
    for precision in (torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(6, 16, generator=generator)
        head = torch.randn(20_000, 16, generator=generator)
        bias = torch.zeros(20_000)
        bias[3] = -math.inf
        targets = torch.arange(10, 16)
        with torch.autocast("cpu", precision):
            leaf = hidden.clone().requires_grad_()
            scores, entropies = score_tokens(leaf, head, targets, bias=bias)
        (entropies.sum() + scores.sum()).backward()
        logits = torch.nn.functional.linear(hidden.to(precision), head.to(precision)).float() + bias
        exact = torch.distributions.Categorical(logits=logits)
        assert torch.allclose(entropies, exact.entropy(), atol=1e-3)
        assert torch.allclose(scores, exact.log_prob(targets), atol=1e-2)
        assert leaf.grad.isfinite().all()


def test_fp16_has_a_scale_before_any_loss(in_precision):
    """A process without completions takes the others' gradients, and unscales them."""
    trainer = in_precision("fp16", "sft", "training.epochs=2")
    trainer.learner.new_optimizer()
    for parameter in trainer.learner.parameters:
        parameter.grad = torch.ones_like(parameter)
    assert math.isfinite(trainer.learner.step(0.0))


def test_a_run_on_another_device_may_have_been_before(policy):
    """A notebook trains on a GPU and then, at another preset, on the CPU: accelerate alone refuses.
    """
    accelerator = make_accelerator(policy.device)
    for state in (accelerator.state, PartialState()):
        state._shared_state["device"] = torch.device("cuda")
    with pytest.raises(ValueError, match="restart your runtime"):
        Accelerator(cpu=True)
    assert make_accelerator(policy.device).device.type == "cpu"

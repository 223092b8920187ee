"""`chord`: mu over the run, phi over the tokens, and what it is equal to at its ends."""

import math

import pytest
import torch
from small_training import (
    Fixed,
    distance,
    first_progress,
    not_refused,
    rows_of,
    same_ends,
    trained,
    watch,
    watch_rollouts,
)
from textbook import coin_rewards, gradient, plain_mean, plain_rl, plain_scores, problems_of

CONSTANT = ("chord.schedule=constant", "chord.valley=0")


@pytest.mark.parametrize(("setup", "phi"), [("chord", False), ("chord_phi", True)])
def test_a_step_follows_the_formula(make_trainer, monkeypatch, setup, phi):
    """The token's weight p (1 - p) carries no gradient; one update per step."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer(setup, *CONSTANT, "chord.peak=0.3", "rl.beta=0")
    seen = watch(trainer)
    trainer.train()
    trainer.load_weights(seen.weights[0])
    groups = taken[0]
    rewards = coin_rewards(trainer, problems_of(trainer, groups), groups)
    terms, weights = [], []
    for problem in trainer.parts.train:
        scores, _ = plain_scores(trainer.policy.model,
                                 trainer.policy.encode_prompt(problem.question),
                                 trainer.policy.encode_completion(problem.solution))
        p = scores.exp().detach()
        weights.append(p * (1 - p) if phi else torch.ones_like(p))
        terms.append(-weights[-1] * scores)
    loss = 0.3 * plain_mean(terms, "token_mean") + 0.7 * plain_rl(trainer, groups, rewards.tolist())
    assert distance(seen.gradients[0], gradient(trainer, loss)) < 2e-5
    row = rows_of(trainer)[0]
    assert (row["updates"], row["chord/mu"]) == (1, 0.3)
    assert row["loss/sft"] == pytest.approx(plain_mean(terms, "token_mean").item(), rel=1e-4)
    if phi:
        assert row["chord/phi"] == pytest.approx(float(torch.cat(weights).mean()), rel=1e-4)


def test_what_it_equals_bit_for_bit(make_trainer):
    """mu = 0 is GRPO; phi = 1 with a constant mu is the combined loss."""
    for updates in ("rl.updates_per_rollout=1", "rl.updates_per_rollout=2"):
        for chord, other in (
                ("chord.peak=0", ("rl", "training.epochs=2")),
                ("chord.peak=0.3", ("combined", "training.epochs=4", "combined.first=0.3",
                                    "combined.last=0.3"))):
            assert same_ends(make_trainer,
                             ("chord", "training.epochs=4", *CONSTANT, chord, updates),
                             (*other, updates)), (other, updates)


def test_mu_rises_then_falls_along_a_cosine(make_trainer):
    """10 steps: 2 of warm-up, 4 of decay, then the valley."""
    trainer = trained(make_trainer, "chord", "training.epochs=20", "chord.warmup=0.2",
                      "chord.decay=0.4")
    half = 0.85 / 2
    way = [0.05 + half * (1 + math.cos(math.pi * x)) for x in (0, 0.25, 0.5, 0.75)]
    rows = rows_of(trainer)
    assert [row["chord/mu"] for row in rows] == pytest.approx([0, 0.45, *way, *[0.05] * 4])
    assert [row["lambda/rl"] for row in rows] == [1 - row["chord/mu"] for row in rows]
    assert "loss/sft" not in rows[0] and "loss/sft" in rows[1]


def test_without_warm_up_and_decay_it_is_the_valley(make_trainer):
    """No division by zero."""
    trainer = make_trainer("chord", "chord.warmup=0", "chord.decay=0")
    assert trainer.method.mu(first_progress(trainer)) == 0.05


def test_the_adaptive_mu_follows_the_reward_of_the_step_before(make_trainer):
    """Its state is in the checkpoint."""
    rewards = [1, 0, 0, 0] * 8 + [1, 1, 1, 0] * 8 + [0, 0, 0, 0] * 8 + [1, 1, 0, 0] * 8
    trainer = make_trainer("chord_adaptive", "training.epochs=8", verifier=Fixed(rewards))
    trainer.train()
    rows = rows_of(trainer)
    assert [row["chord/mu"] for row in rows] == [0.5, 0.25, 0, 0.5]
    assert trainer.method.state() == {"reward": 0.5}


def test_wrong_settings_name_the_key():
    """At chord.tau=1 and a reward of 0 nothing would ever be sampled."""
    assert not not_refused("chord", {
        f"chord.{name}={value}": f"chord.{name}" for name, value in (
            ("valley", 0.95), ("decay", 0.95), ("phi", "focal"), ("tau", 1))})

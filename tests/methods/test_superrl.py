"""`superrl`: which problem is taught by which loss, and the learned weights of both."""

import math

import pytest
import torch
from small_training import (
    Fixed,
    distance,
    not_refused,
    rows_of,
    take_first_step,
    trained,
    watch,
    watch_rollouts,
)
from textbook import all_scores, gradient, plain_rl, plain_sft, problems_of

UNSOLVED, HALF, SOLVED = [0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]
MIXED = UNSOLVED * 3 + HALF * 4 + SOLVED
ONE_UPDATE = ("rl.updates_per_rollout=1", "rl.beta=0")


def one_step(make_trainer, monkeypatch, setup, rewards, *overrides):
    """(trainer at the first step's weights, its groups, its gradients, its row)."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer(setup, *ONE_UPDATE, *overrides, verifier=Fixed(rewards),
                           folder=f"{setup}-{len(rewards)}-{sum(rewards)}")
    seen = watch(trainer)
    take_first_step(trainer)
    if seen.weights:
        trainer.load_weights(seen.weights[0])
    return trainer, taken[0], seen.gradients, rows_of(trainer)[0]


def test_each_problem_has_one_loss_and_keeps_its_share(make_trainer, monkeypatch):
    """3 of 8 problems are unsolved, one is always solved."""
    for setup, sft, rl in (
            ("superrl", (0, 1, 2), (3, 4, 5, 6, 7)),
            ("superrl_advantage", (0, 1, 2, 7), (3, 4, 5, 6)),  # the solved one goes to SFT too
            ("superrl_code", (), range(8))):  # one right answer opens the gate of the whole update
        trainer, groups, gradients, row = one_step(make_trainer, monkeypatch, setup, MIXED)
        problems, share = problems_of(trainer, groups), len(sft) / 8
        rewards = [MIXED[4 * i:4 * i + 4] for i in range(8)]
        loss = (1 - share) * plain_rl(trainer, [groups[i] for i in rl], [rewards[i] for i in rl])
        if sft:
            loss = loss + share * plain_sft(trainer, [problems[i] for i in sft])
        assert distance(gradients[0], gradient(trainer, loss)) < 2e-5, setup
        assert (row["superrl/closed"], row["superrl/sft_share"]) == (len(sft), share)


@pytest.mark.parametrize(("setup", "rewards", "closed"), [
    ("superrl", MIXED, ((0, 2), (1,))),  # the two updates have different shares of SFT
    ("superrl_advantage", MIXED, ((0, 2), (1, 7))),
    ("superrl_code", (UNSOLVED + HALF) * 4, (range(0, 8, 2), ()))])  # a gate of its own for each
def test_both_updates_of_a_step_follow_the_formula(make_trainer, monkeypatch, setup, rewards,
                                                   closed):
    """Gates and shares are those of an update's own problems; pi_old is the policy that sampled."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer(setup, "rl.beta=0", "rl.learning_rate=0.01", verifier=Fixed(rewards))
    seen = watch(trainer)
    trainer.train()
    trainer.load_weights(seen.weights[0])
    groups, old = taken[0], all_scores(trainer, taken[0])
    problems = problems_of(trainer, groups)
    for i in range(2):
        rest, share = [j for j in range(i, 8, 2) if j not in closed[i]], len(closed[i]) / 4
        trainer.load_weights(seen.weights[i])
        loss = (1 - share) * plain_rl(
            trainer, [groups[j] for j in rest], [rewards[4 * j:4 * j + 4] for j in rest],
            [old[4 * j + k] for j in rest for k in range(4)])
        if closed[i]:
            loss = loss + share * plain_sft(trainer, [problems[j] for j in closed[i]])
        assert distance(seen.gradients[i], gradient(trainer, loss)) < 2e-4
    row = rows_of(trainer)[0]
    assert row["superrl/closed"] == sum(map(len, closed)) and row["clip_ratio"] > 0


def test_groups_of_equal_rewards(make_trainer, monkeypatch):
    """Unsolved ones are learned by SFT; solved ones, or dropped ones, teach nothing."""
    for setup in ("superrl", "superrl_code"):
        trainer, groups, gradients, row = one_step(make_trainer, monkeypatch, setup, UNSOLVED)
        loss = plain_sft(trainer, problems_of(trainer, groups))
        assert distance(gradients[0], gradient(trainer, loss)) < 2e-5, setup
        assert row["superrl/sft_share"] == 1
    for setup, rewards in (("superrl", SOLVED), ("superrl_code", SOLVED),
                           ("superrl_drop", SOLVED + UNSOLVED)):
        _, _, gradients, row = one_step(make_trainer, monkeypatch, setup, rewards)
        assert not gradients and row["updates"] == 0, setup


def test_the_control_leaves_unsolved_problems_out_of_the_mean(make_trainer, monkeypatch):
    """No SFT, and L_GRPO is a mean over the five others: 8/5 of what it would be over all."""
    trainer, groups, gradients, row = one_step(make_trainer, monkeypatch, "superrl_drop", MIXED)
    rewards = [MIXED[4 * i:4 * i + 4] for i in range(8)]
    expected = gradient(trainer, plain_rl(trainer, groups[3:], rewards[3:]))
    assert distance(gradients[0], expected) < 2e-5
    over_all = gradient(trainer, plain_rl(trainer, groups, rewards))
    assert distance(gradients[0], over_all * 8 / 5) < 2e-5
    assert (row["superrl/closed"], row["superrl/sft_share"]) == (3, 0)
    assert "loss/sft" not in row


def test_a_loss_that_is_not_finite_leaves_the_learned_weights(make_trainer):
    """NaN would send s to its floor, and infinity would switch that loss off until the end."""
    trainer = make_trainer("superrl_log_sigma", *ONE_UPDATE, verifier=Fixed(MIXED))
    score, before = trainer.policy.score, dict(trainer.method.sigma)
    for bad in (math.nan, math.inf):
        trainer.policy.score = lambda *given, bad=bad, **more: tuple(
            bad * one for one in score(*given, **more))
        take_first_step(trainer)
        assert trainer.method.sigma == before
    assert rows_of(trainer)[-1]["updates_not_finite"] == 1


def test_learned_weights_follow_their_own_gradient(make_trainer, monkeypatch):
    """The loss is exp(-2 s_rl) L_RL + exp(-2 s_sft) L_SFT on all problems; s takes a step of plain
    gradient descent on that loss plus s_rl + s_sft, and is in the checkpoint."""
    trainer, groups, gradients, row = one_step(
        make_trainer, monkeypatch, "superrl_log_sigma", MIXED, "superrl.sigma_sft=0.3",
        "superrl.sigma_rl=-0.2", "superrl.sigma_learning_rate=0.1", "superrl.sigma_decay=0.9")
    sigma = {"sft": torch.tensor(0.3, requires_grad=True),
             "rl": torch.tensor(-0.2, requires_grad=True)}
    losses = {"sft": plain_sft(trainer, problems_of(trainer, groups)),
              "rl": plain_rl(trainer, groups, [MIXED[4 * i:4 * i + 4] for i in range(8)])}
    whole = sum((-2 * sigma[name]).exp() * losses[name] + sigma[name] for name in sigma)
    assert distance(gradients[0], gradient(trainer, whole)) < 2e-5
    assert row["lambda/sft"] == pytest.approx(math.exp(-0.6))
    assert (row["superrl/sigma_sft"], row["superrl/sigma_rl"]) == (0.3, -0.2)
    for name, value in sigma.items():
        after = 0.9 * float(value.detach() - 0.1 * value.grad)
        assert trainer.method.sigma[name] == pytest.approx(after, abs=1e-5)
    assert trainer.method.state() == {"sigma": trainer.method.sigma}


def test_a_sigma_stops_at_its_floor(make_trainer):
    """Where L_RL is 0 its s falls at every step: without a floor exp(-2 s) would grow forever."""
    trainer = trained(make_trainer, "superrl_log_sigma", *ONE_UPDATE, "training.epochs=8",
                      "superrl.sigma_learning_rate=0.9", verifier=Fixed(SOLVED))
    rows = rows_of(trainer)
    assert [row["superrl/sigma_rl"] for row in rows] == pytest.approx([0, -0.891, -1.77309, -2])
    assert trainer.method.sigma["rl"] == -2


def test_wrong_settings_name_the_key():
    """An unknown gate; a weight below its floor; log_sigma together with a gate."""
    assert not not_refused("superrl", {
        "superrl.gate=random": "superrl.gate", "superrl.sigma_rl=-3": "superrl.sigma_rl",
        ("superrl.mixing=log_sigma", "superrl.unsolved=drop"): "superrl.mixing"})

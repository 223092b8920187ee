"""`combined`: the weights of both losses and their schedule."""

import pytest
import torch
from small_training import (
    distance,
    not_refused,
    rows_of,
    take_first_step,
    trained,
    watch,
    watch_rollouts,
)
from textbook import coin_rewards, gradient, plain_rl, plain_sft, problems_of


def test_a_step_follows_the_formula(make_trainer, monkeypatch):
    """lambda L_SFT + (1 - lambda) L_RL, each with its own mean; at 0 it is RL, at 1 SFT."""
    wrong = []
    for share in (0.0, 0.3, 1.0):
        taken = watch_rollouts(monkeypatch)
        trainer = make_trainer("combined", f"combined.first={share}", f"combined.last={share}",
                               "rl.updates_per_rollout=1", folder=str(share))
        seen = watch(trainer)
        take_first_step(trainer)
        trainer.load_weights(seen.weights[0])
        loss = torch.zeros(())
        if share > 0:
            loss = loss + share * plain_sft(trainer, trainer.parts.train)
        if share < 1:
            rewards = coin_rewards(trainer, problems_of(trainer, taken[0]), taken[0])
            loss = loss + (1 - share) * plain_rl(trainer, taken[0], rewards.tolist())
        apart, row = distance(seen.gradients[0], gradient(trainer, loss)), rows_of(trainer)[0]
        if apart >= 2e-5 or ("loss/sft" in row, "loss/rl" in row) != (share > 0, share < 1):
            wrong.append((share, apart, row))
    assert not wrong


def test_the_schedule_goes_from_first_to_last(make_trainer):
    """Linearly or along half a cosine, and the two weights always sum to 1."""
    for schedule, shares in (("linear", [1, 0.75, 0.5, 0.25, 0]),
                             ("cosine", [1, 0.853553, 0.5, 0.146447, 0])):
        trainer = trained(make_trainer, "combined", "training.epochs=10", "combined.first=1",
                          "combined.last=0", f"combined.schedule={schedule}", folder=schedule)
        rows = rows_of(trainer)
        assert [row["lambda/sft"] for row in rows] == pytest.approx(shares, abs=1e-6)
        assert [row["lambda/rl"] for row in rows] == pytest.approx([1 - s for s in shares],
                                                                   abs=1e-6)


def test_wrong_settings_name_the_key():
    """A weight outside of [0, 1]; a constant weight that is to change."""
    assert not not_refused("combined", {
        "combined.first=1.5": "combined.first", "combined.first=-0.1": "combined.first",
        "combined.last=0.1": "combined.last"})

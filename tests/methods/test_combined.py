"""`combined`: the weights of both losses and their schedule."""

import pytest
import torch
from small_training import distance, watch, watch_rollouts
from textbook import (
    all_scores,
    coin_rewards,
    gradient,
    plain_grpo,
    plain_mean,
    plain_scores,
    problems_of,
)

from hybridrl_lib.system.errors import UsageError


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_step_follows_the_formula(make_trainer, monkeypatch, share):
    """lambda L_SFT + (1 - lambda) L_RL, each with its own mean; at 0 it is RL, at 1 SFT."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("combined", f"combined.first={share}", f"combined.last={share}",
                           "rl.updates_per_rollout=1")
    seen = watch(trainer)
    trainer.train()
    trainer.load_weights(seen.weights[0])
    loss = torch.zeros(())
    if share > 0:
        loss = loss + share * plain_mean(
            [-plain_scores(trainer.policy.model, trainer.policy.encode_prompt(p.question),
                           trainer.policy.encode_completion(p.solution))[0]
             for p in trainer.parts.train], "token_mean")
    if share < 1:
        groups = taken[0]
        rewards = coin_rewards(trainer, problems_of(trainer, groups), groups)
        old = all_scores(trainer, groups)
        loss = loss + (1 - share) * plain_grpo(trainer.policy, groups, rewards, old, old,
                                               trainer.settings)
    assert distance(seen.gradients[0], gradient(trainer, loss)) < 2e-5
    row = trainer.folder.lines("metrics.jsonl")[0]
    assert ("loss/sft" in row, "loss/rl" in row) == (share > 0, share < 1)


@pytest.mark.parametrize(("schedule", "shares"), [
    ("linear", [1, 0.75, 0.5, 0.25, 0]), ("cosine", [1, 0.853553, 0.5, 0.146447, 0])])
def test_the_schedule_goes_from_first_to_last(make_trainer, schedule, shares):
    trainer = make_trainer("combined", "training.epochs=10", "combined.first=1", "combined.last=0",
                           f"combined.schedule={schedule}")
    trainer.train()
    rows = trainer.folder.lines("metrics.jsonl")
    assert [row["lambda/sft"] for row in rows] == pytest.approx(shares, abs=1e-6)
    assert [row["lambda/rl"] for row in rows] == pytest.approx([1 - s for s in shares], abs=1e-6)


@pytest.mark.parametrize(("override", "words"), [
    ("combined.first=1.5", "at most 1"), ("combined.first=-0.1", "at least 0"),
    ("combined.last=0.1", "constant lambda stays")])
def test_wrong_settings_are_one_sentence(make_trainer, override, words):
    with pytest.raises(UsageError, match=words):
        make_trainer("combined", override)

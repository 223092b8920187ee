"""`raft`: which answers are learned from, and that the loss is SFT's."""

from types import SimpleNamespace

import pytest
import torch
from small_training import (
    Fixed,
    distance,
    flat,
    not_refused,
    rows_of,
    take_first_step,
    watch,
    watch_rollouts,
)
from textbook import coin_rewards, gradient, plain_mean, plain_scores, problems_of

from hybridrl_lib.methods.raft import kept
from hybridrl_lib.policy.packing import PromptCompletion


def test_the_gradient_is_that_of_sft_on_the_right_answers(make_trainer, monkeypatch):
    """Equal answers to a problem count once."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("raft", "rl.updates_per_rollout=1", "rl.learning_rate=0.003")
    seen = watch(trainer)
    trainer.train()
    rows = rows_of(trainer)
    for index, row in enumerate(rows):
        groups = taken[index]
        rewards = coin_rewards(trainer, problems_of(trainer, groups), groups)
        trainer.load_weights(seen.weights[index])
        right = {(tuple(group.prompt_ids), tuple(completion.token_ids))
                 for group, mine in zip(groups, rewards, strict=True)
                 for completion, reward in zip(group.completions, mine, strict=True) if reward}
        losses = [-plain_scores(trainer.policy.model, *map(list, pair))[0] for pair in right]
        loss = plain_mean(losses, "token_mean")
        assert distance(seen.gradients[index], gradient(trainer, loss)) < 2e-5
        assert row["loss/sft"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["raft/kept"] == len(right) > 3 and row["raft/right"] == rewards.sum()
    assert trainer.tokens["demonstrations"] == 0  # no reference solution was learned from


def test_the_temperature_of_sampling_is_that_of_training(make_trainer, monkeypatch):
    """The answers are the policy's own: their log-probabilities are those of the sampler."""
    trainer = make_trainer("raft", "rl.updates_per_rollout=1", "rl.temperature=2")
    taken, seen = watch_rollouts(monkeypatch), watch(trainer)
    trainer.train()
    groups = taken[0]
    rewards = coin_rewards(trainer, problems_of(trainer, groups), groups)
    trainer.load_weights(seen.weights[0])
    right = {(tuple(group.prompt_ids), tuple(completion.token_ids))
             for group, mine in zip(groups, rewards, strict=True)
             for completion, reward in zip(group.completions, mine, strict=True) if reward}
    losses = {temperature: plain_mean([-plain_scores(
        trainer.policy.model, *map(list, pair), temperature)[0] for pair in right], "token_mean")
        for temperature in (1.0, 2.0)}
    assert distance(seen.gradients[0], gradient(trainer, losses[2.0])) < 2e-5
    assert distance(seen.gradients[0], gradient(trainer, losses[1.0])) > 0.1


def test_it_is_rl_with_the_reward_for_the_advantage(make_trainer):
    """The gradient of RL at ratio 1 with A = 1 for a right answer and 0 for a wrong one."""
    found = []
    for setup in ("raft", "rl"):
        trainer = make_trainer(setup, "rl.beta=0", "rl.updates_per_rollout=1", folder=setup)
        seen = watch(trainer)
        if setup == "rl":
            compose = trainer.method.compose

            def with_rewards(step, compose=compose):
                for rollout in step.rollouts:
                    texts = [tuple(c.token_ids) for c in rollout.group.completions]
                    first = torch.tensor([texts.index(t) == i for i, t in enumerate(texts)])
                    rollout.advantages = rollout.rewards * first
                updates = compose(step)
                right = updates[0].advantages > 0
                tokens = sum(len(s.completion) for s, one in zip(
                    updates[0].sequences, right, strict=True) if one)
                updates[0].rl = torch.full_like(updates[0].rl, 1 / tokens)
                return updates

            trainer.method.compose = with_rewards
        take_first_step(trainer)
        found.append(seen.gradients[0])
    assert distance(*found) < 1e-5


def test_equal_answers_are_learned_once():
    """In the order of sampling; wrong ones are left out."""
    answers = [PromptCompletion([9], [number]) for number in (1, 2, 3, 1, 4)]
    rollout = SimpleNamespace(sequences=answers, rewards=torch.tensor([1.0, 1, 0, 1, 1]))
    assert [answer.completion[0] for answer in kept(rollout)] == [1, 2, 4]


def test_without_a_right_answer_nothing_moves(make_trainer):
    """No update is taken."""
    trainer = make_trainer("raft", verifier=Fixed([0]))
    before = flat(trainer)
    trainer.train()
    assert torch.equal(flat(trainer), before)
    row = rows_of(trainer)[0]
    assert (row["updates"], row["raft/right"], row["raft/kept"]) == (0, 0, 0)


def test_wrong_settings_name_the_key():
    """It has neither a KL nor advantages, and it reads every group."""
    assert not not_refused("raft", {
        override: override.partition("=")[0] for override in
        ("rl.beta=0.1", "rl.overlong_share=0.2", "rl.dynamic_sampling_rounds=2")})

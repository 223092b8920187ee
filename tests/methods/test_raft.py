"""`raft`: which answers are learned from, and that the loss is SFT's."""

from types import SimpleNamespace

import pytest
import torch
from small_training import Fixed, distance, watch, watch_rollouts
from textbook import coin_rewards, gradient, plain_mean, plain_scores, problems_of

from hybridrl_lib.policy.packing import PromptCompletion
from hybridrl_lib.system.errors import UsageError


def test_the_gradient_is_that_of_sft_on_the_right_answers(make_trainer, monkeypatch):
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("raft", "rl.updates_per_rollout=1", "rl.learning_rate=0.003")
    seen = watch(trainer)
    trainer.train()
    rows = trainer.folder.lines("metrics.jsonl")
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


def test_it_is_rl_with_the_reward_for_the_advantage(make_trainer, monkeypatch):
    """The gradient of RL at ratio 1 with A = 1 for a right answer and 0 for a wrong one."""
    found = []
    for setup in ("raft", "rl"):
        own = ["raft.deduplicate=false"] if setup == "raft" else []
        trainer = make_trainer(setup, "rl.beta=0", "rl.updates_per_rollout=1", *own, folder=setup)
        seen = watch(trainer)
        if setup == "rl":
            compose = trainer.method.compose

            def with_rewards(step, compose=compose):
                for rollout in step.rollouts:
                    rollout.advantages = rollout.rewards
                updates = compose(step)
                right = updates[0].advantages > 0
                tokens = sum(len(s.completion) for s, one in zip(
                    updates[0].sequences, right, strict=True) if one)
                updates[0].rl = torch.full_like(updates[0].rl, 1 / tokens)
                return updates

            trainer.method.compose = with_rewards
        trainer._one_step(_first(trainer))
        found.append(seen.gradients[0])
    assert distance(*found) < 1e-5


def _first(trainer):
    trainer._begin_stage()
    return trainer._progress()


@pytest.mark.parametrize(("overrides", "kept"), [
    ((), [1, 2, 4]), (("raft.deduplicate=false",), [1, 2, 1, 4]),
    (("raft.most=2",), [1, 2]), (("raft.most=3", "raft.deduplicate=false"), [1, 2, 1])])
def test_copies_and_the_cap(make_trainer, overrides, kept):
    method = make_trainer("raft", *overrides).method
    answers = [PromptCompletion([9], [number]) for number in (1, 2, 3, 1, 4)]
    group = SimpleNamespace(sequences=answers, rewards=torch.tensor([1.0, 1, 0, 1, 1]))
    assert [answer.completion[0] for answer in method.kept(group)] == kept


def test_without_a_right_answer_nothing_moves(make_trainer):
    trainer = make_trainer("raft", verifier=Fixed([0]))
    before = {name: weight.detach().clone() for name, weight in trainer.weights().items()}
    trainer.train()
    assert all(torch.equal(before[name], w) for name, w in trainer.weights().items())
    row = trainer.folder.lines("metrics.jsonl")[0]
    assert (row["updates"], row["raft/right"], row["raft/kept"]) == (0, 0, 0)


@pytest.mark.parametrize(("override", "words"), [
    ("rl.beta=0.1", "rl.beta cannot be '0.1': the method raft has no KL"),
    ("rl.overlong_share=0.2", "the method raft has no advantages that a punishment"),
    ("raft.most=0", "at least 1"), ("rl.dynamic_sampling_rounds=2", "without signal too")])
def test_wrong_settings_are_one_sentence(make_trainer, override, words):
    with pytest.raises(UsageError, match=words):
        make_trainer("raft", override)

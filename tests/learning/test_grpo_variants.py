"""GRPO by settings: the stage's own anchor, plain k3, overlong penalty, dynamic sampling."""

import pytest
import torch
from small_training import (
    Fixed,
    distance,
    flat,
    not_refused,
    rows_of,
    same_ends,
    watch,
    watch_rollouts,
)
from textbook import all_scores, coin_rewards, gradient, plain_grpo, problems_of

from hybridrl_lib.objectives import k3, overlong_penalty

FAST = ("sft.learning_rate=0.01", "rl.learning_rate=0.01")


def test_the_anchor_is_the_policy_that_the_stage_began_with(make_trainer, make_policy):
    """DeepSeekMath's reference is the SFT model, not the base model or the current policy; a
    resumed run keeps it."""
    for adapter in ("none", "lora"):
        def trainer(adapter=adapter):
            return make_trainer("deepseekmath", "training.epochs=4", "training.checkpoint_every=3",
                                *FAST, policy=make_policy(adapter=adapter), folder=adapter)

        first = trainer()
        seen = watch(first)
        first.train()
        assert [row["stage"] for row in rows_of(first)] == ["sft"] * 2 + ["rl"] * 2
        anchor = flat(first.anchor_weights)
        assert torch.equal(anchor, flat(seen.weights[2]))  # before the first RL update
        assert not torch.equal(anchor, flat(seen.weights[0]))
        assert not torch.equal(anchor, flat(first))
        first.checkpoints.found()[0][1].rename(first.checkpoints.root / "later")  # leaves step 3
        second = trainer()
        second._resume()
        assert second.step == 3 and second.stage.name == "rl"
        resumed = {name: second.anchor_weights[name] for name in first.anchor_weights}
        assert torch.equal(flat(resumed), anchor)
        assert not torch.equal(flat(second), anchor)


def test_the_kl_to_the_anchor_is_in_the_loss(make_trainer, monkeypatch):
    """At the anchor it has no gradient; a step away it is the textbook's. kl/anchor is recorded."""
    for estimator in ("k3", "ratio_k3"):
        taken = watch_rollouts(monkeypatch)
        trainer = make_trainer("rl", "rl.kl_anchor=stage", f"rl.kl_estimator={estimator}",
                               "rl.beta=5", "rl.updates_per_rollout=1", "rl.learning_rate=0.001",
                               folder=estimator)
        seen = watch(trainer)
        trainer.train()
        for step, beta in ((0, 0.0), (1, 5.0)):
            trainer.load_weights(trainer.anchor_weights)
            anchor = all_scores(trainer, taken[step])
            trainer.load_weights(seen.weights[step])
            old = all_scores(trainer, taken[step])
            apart = torch.cat(anchor) - torch.cat(old)
            assert rows_of(trainer)[step]["kl/anchor"] == pytest.approx(
                float((apart.exp() - apart - 1).mean()), rel=1e-3, abs=1e-7)
            rewards = coin_rewards(trainer, problems_of(trainer, taken[step]), taken[step])
            settings = trainer.settings
            object.__setattr__(settings.rl, "beta", beta)
            loss = plain_grpo(trainer.policy, taken[step], rewards, old, anchor, settings)
            assert distance(seen.gradients[step], gradient(trainer, loss)) < 1e-4, estimator


def test_the_kl_to_the_anchor_is_one_mean_over_mini_batches(make_trainer, monkeypatch):
    """Measured before the first of them moves the weights, over the tokens of all."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("rl", "rl.kl_anchor=stage", "rl.beta=5", "rl.updates_per_rollout=2",
                           "rl.learning_rate=0.001")
    seen = watch(trainer)
    trainer.train()
    rows = trainer.folder.lines("metrics.jsonl")
    assert rows[0]["updates"] == 2
    trainer.load_weights(trainer.anchor_weights)
    anchor = torch.cat(all_scores(trainer, taken[1]))
    trainer.load_weights(seen.weights[2])
    apart = anchor - torch.cat(all_scores(trainer, taken[1]))
    assert rows[1]["kl/anchor"] == pytest.approx(float((apart.exp() - apart - 1).mean()), rel=1e-3)
    assert rows[1]["kl/anchor"] > 1e-5


def test_k3_at_the_anchor_is_zero():
    """Value and gradient, exactly."""
    scores = torch.randn(50).requires_grad_()
    value = k3(scores, scores.detach()).sum()
    value.backward()
    assert value == 0 and not scores.grad.any()


def test_the_overlong_penalty_is_dapos():
    """16384 + 4096 tokens: 0 up to 16384, then linear, -1 for what was truncated."""
    lengths = torch.tensor([10, 16384, 18432, 20480, 20480, 5])
    finished = torch.tensor([True, True, True, True, False, True])
    assert overlong_penalty(lengths, finished, 20480, 0.2).tolist() == pytest.approx(
        [0, 0, -0.5, -1, -1, 0], abs=1e-6)
    assert not overlong_penalty(lengths, finished, 20480, 0.0).any()


def test_the_penalty_moves_advantages_and_no_reward(make_trainer, monkeypatch):
    """All answers are wrong, some are truncated: the short ones get the advantage."""
    taken, kept = watch_rollouts(monkeypatch), []
    trainer = make_trainer("rl", "rl.overlong_share=1", "rl.advantage_scale=none",
                           verifier=Fixed([0]))
    compose = trainer.method.compose
    trainer.method.compose = lambda step: kept.extend(step.rollouts) or compose(step)
    trainer.train()
    row = trainer.folder.lines("metrics.jsonl")[0]
    assert row["reward"] == 0 and -1 <= row["reward/overlong"] < 0
    for rollout, group in zip(kept, taken[0], strict=False):
        cost = torch.tensor([-1.0 if not c.finished else -len(c.token_ids) / 12
                             for c in group.completions])
        assert rollout.advantages.tolist() == pytest.approx((cost - cost.mean()).tolist(), abs=1e-5)
        assert not rollout.rewards.any()


@pytest.mark.parametrize("setup", ["luffy", "prefix_rft"])
def test_the_penalty_holds_in_joint_groups(make_trainer, setup):
    """All is wrong, so only lengths decide: of the answers, and of what joins them."""
    trainer = make_trainer(setup, "rl.overlong_share=1", "rl.advantage_scale=none",
                           "rl.max_new_tokens=40", verifier=Fixed([0]))
    kept, hybrids, compose = [], [], trainer.method.compose
    trainer.method.compose = lambda step: kept.extend(step.rollouts) or compose(step)
    if setup == "prefix_rft":
        sample = trainer.method._sample
        trainer.method._sample = lambda step: hybrids.extend(sample(step)) or hybrids[-8:]
    trainer.train()
    assert any(rollout.advantages.any() for rollout in kept)
    stop = trainer.policy.stop_ids
    for index, rollout in enumerate(kept):
        texts = [(c.token_ids, c.finished) for c in rollout.group.completions]
        if hybrids:
            ids = hybrids[index].sequence.completion
            texts.append((ids, ids[-1] in stop))
        else:
            texts.append((trainer.policy.encode_completion(rollout.problem.solution), True))
        cost = torch.tensor([-min(1.0, len(ids) / 40) if finished else -1.0
                             for ids, finished in texts])
        assert rollout.advantages.tolist() == pytest.approx(
            (cost - cost.mean())[:-1].tolist(), abs=1e-5)
        if hybrids:
            assert hybrids[index].advantage == pytest.approx(
                float(cost[-1] - cost.mean()), abs=1e-5)


def test_dynamic_sampling_fills_up_with_groups_with_signal(make_trainer):
    """More problems are sampled until the batch is full, or nothing is left to sample."""
    rows = (
        ([1, 0, 0, 0] * 4, 10, 4, 4),  # every group has a signal: nothing more is sampled
        ([1, 0, 0, 0] * 1 + [0] * 4, 10, 8, 4),  # every other one has: a second round
        ([0] * 4, 10, 8, 0),  # none has: until the training problems are used up
        ([1, 0, 0, 0] + [1] * 12, 2, 8, 2))  # until the last round, then with what there is
    for number, (pattern, rounds, sampled, left) in enumerate(rows):
        trainer = make_trainer(
            "rl", "rl.prompts_per_step=4", f"rl.dynamic_sampling_rounds={rounds}", "rl.beta=0",
            verifier=Fixed(pattern), folder=str(number))
        seen, composed = watch(trainer), []
        compose = trainer.method.compose
        trainer.method.compose = lambda step, c=composed, compose=compose: (
            c.append(step.rollouts) or compose(step))
        trainer.train()
        rows = rows_of(trainer)
        assert [(row["groups/sampled"], row["groups/kept"]) for row in rows] == [
            (sampled, left)] * 4
        assert all(0 < rollout.solved < 1 for step in composed for rollout in step)
        assert all(len({r.problem.id for r in step}) == left for step in composed)
        assert bool(seen.gradients) == bool(left)
        assert sum(rows[0]["verdicts"].values()) == 4 * sampled


def test_dynamic_sampling_without_a_group_to_replace_changes_nothing(make_trainer):
    """Where every group has a signal, the setting changes no bit."""
    assert same_ends(make_trainer, *(("rl", f"rl.dynamic_sampling_rounds={rounds}", "rl.beta=0")
                                     for rounds in (1, 3)), verifier=Fixed([1, 0, 0, 1]))


def test_wrong_settings_name_the_key():
    """Plain k3 to the old policy; dropping groups that a method learns from."""
    assert not not_refused("rl", {"rl.kl_estimator=k3": "rl.kl_estimator"})
    for setup in ("relift", "hpt", "luffy", "prl", "raft"):
        assert not not_refused(setup, {
            "rl.dynamic_sampling_rounds=2": "rl.dynamic_sampling_rounds"})

"""`prl`: the advantage of every token, v1's steps and v2's tokens."""

import pytest
import torch
from small_training import (
    Fixed,
    distance,
    flat,
    not_refused,
    rows_of,
    same_ends,
    snapshot,
    trained,
    watch,
    watch_rollouts,
)
from textbook import all_scores, coin_rewards, gradient, plain_mean, plain_scores, problems_of

DELTA = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
TOKENS = [5, 6, 7, 8, 9, 7, 8]


def test_what_each_token_answers_for(make_trainer):
    """The sums of v1's steps, v2's tokens, and the released code."""
    rows = {
        # v2: the rest of the answer, from the token itself on
        ("token", "inclusive"): [127, 126, 124, 120, 112, 96, 64],
        ("token", "exclusive"): [126, 124, 120, 112, 96, 64, 0],
        # v1: what follows the step; the last step has nothing after it
        ("fixed", "exclusive"): [120, 120, 120, 64, 64, 64, 0],
        ("newline", "exclusive"): [120, 120, 120, 64, 64, 64, 0],
        # the released code: with the step's last token
        ("fixed", "inclusive"): [124, 124, 124, 96, 96, 96, 64]}
    found = {}
    for steps, suffix in rows:
        trainer = make_trainer("frpo", "prl.step_tokens=3", f"prl.steps={steps}",
                               f"prl.suffix={suffix}")
        trainer.method.ends_line = {7: True}.get
        found[steps, suffix] = trainer.method.suffix_sums(DELTA, TOKENS).tolist()
    assert found == rows


def test_a_line_end_is_found_in_any_token(make_trainer, monkeypatch):
    """Also in one that holds more than it, which the released code misses."""
    trainer = make_trainer("prl_newline")
    texts = {1: "a", 2: ".\n", 3: "\n\n"}
    monkeypatch.setattr(trainer.policy, "decode", lambda tokens: texts[tokens[0]])
    assert [trainer.method.ends_line(token) for token in (1, 2, 3)] == [False, True, True]


def plain_corrections(setup, overrides, scores, reference, beta):
    """beta sum delta of every token of an answer, as the paper writes it."""
    delta, sums = (scores - reference).tolist(), []
    for t in range(len(delta)):
        end = t if setup == "frpo" else min(len(delta) - 1, t // 4 * 4 + 3)
        inclusive = setup == "frpo" or "inclusive" in str(overrides)
        sums.append(beta * sum(delta[end if inclusive else end + 1:]))
    return torch.tensor(sums)


KINDS = pytest.mark.parametrize(("setup", "overrides"), [
    ("frpo", ()), ("prl", ("prl.step_tokens=4",)),
    ("prl", ("prl.step_tokens=4", "prl.suffix=inclusive"))])


def second_step(make_trainer, monkeypatch, setup, beta, *overrides):
    """(trainer after its run, what `watch` saw, the second step's groups, their scores under the
    reference, which is one step behind)."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer(setup, f"prl.beta={beta}", "training.epochs=4", "rl.learning_rate=0.01",
                           *overrides)
    seen = watch(trainer)
    base = snapshot(trainer)
    trainer.train()
    trainer.load_weights(base)
    return trainer, seen, taken[1], all_scores(trainer, taken[1])


@KINDS
def test_the_gradient_is_the_formulas(make_trainer, monkeypatch, setup, overrides):
    """A step away from the reference, token by token as the paper writes it."""
    beta = 0.7
    trainer, seen, groups, reference = second_step(make_trainer, monkeypatch, setup, beta,
                                                   "rl.updates_per_rollout=1", *overrides)
    trainer.load_weights(seen.weights[1])
    rewards = coin_rewards(trainer, problems_of(trainer, groups), groups)
    losses, sizes = [], []
    for group, reward in zip(groups, rewards, strict=True):
        for completion, gain in zip(group.completions, (reward - reward.mean())
                                    / (reward.std() + 1e-4), strict=True):
            now = plain_scores(trainer.policy.model, group.prompt_ids, completion.token_ids)[0]
            rest = plain_corrections(setup, overrides, now.detach(), reference[len(losses)], beta)
            sizes += rest.abs().tolist()
            losses.append(-(now - now.detach()).exp() * (gain - rest))
    loss = plain_mean(losses, "sequence_mean")
    assert distance(seen.gradients[1], gradient(trainer, loss)) < 1e-4
    row = rows_of(trainer)[1]
    assert row["prl/correction"] == pytest.approx(sum(sizes) / len(sizes), rel=1e-3)
    assert row["prl/correction_ratio"] > 0


@KINDS
def test_both_updates_of_a_step_follow_the_formula(make_trainer, monkeypatch, setup, overrides):
    """The corrections of both come from the policy that sampled, even after it has moved."""
    beta = 0.7
    trainer, seen, groups, reference = second_step(make_trainer, monkeypatch, setup, beta,
                                                   *overrides)
    trainer.load_weights(seen.weights[2])
    old = all_scores(trainer, groups)
    rewards, rl = coin_rewards(trainer, problems_of(trainer, groups), groups), trainer.settings.rl
    for i in range(2):
        trainer.load_weights(seen.weights[2 + i])
        losses = []
        for j in range(i, 8, 2):
            gains = (rewards[j] - rewards[j].mean()) / (rewards[j].std() + 1e-4)
            for k, completion in enumerate(groups[j].completions):
                place = 4 * j + k
                now = plain_scores(trainer.policy.model, groups[j].prompt_ids,
                                   completion.token_ids)[0]
                gain = gains[k] - plain_corrections(setup, overrides, old[place], reference[place],
                                                    beta)
                rho = (now - old[place]).exp()
                losses.append(-torch.min(
                    rho * gain, rho.clamp(1 - rl.epsilon_low, 1 + rl.epsilon_high) * gain))
        expected = gradient(trainer, plain_mean(losses, "sequence_mean"))
        assert distance(seen.gradients[2 + i], expected) < 2e-4
    assert rows_of(trainer)[1]["clip_ratio"] > 0


def test_without_beta_it_is_grpo_bit_for_bit(make_trainer):
    """Half of the epochs are taken."""
    assert same_ends(make_trainer,
                     ("frpo", "prl.beta=0", "training.epochs=8", "rl.learning_rate=0.01"),
                     ("rl", "rl.beta=0", "training.epochs=4", "rl.learning_rate=0.01"))


def test_at_the_reference_the_correction_is_exactly_zero(make_trainer, make_policy):
    """Otherwise rounding would be the only signal of equal groups, and Adam would make a full step
    of it."""
    for adapter in ("none", "lora"):
        trainer = make_trainer("frpo", "training.epochs=4", verifier=Fixed([0]),
                               policy=make_policy(adapter=adapter), folder=adapter)
        before = flat(trainer)
        trainer.train()
        assert [row["prl/correction"] for row in rows_of(trainer)] == [0, 0]
        assert torch.equal(flat(trainer), before)


def test_groups_of_equal_reward_learn_once_the_policy_has_left_the_reference(make_trainer):
    """Their advantage is -beta S: they are pulled back and must not be skipped."""
    rows = rows_of(trained(make_trainer, "frpo", "training.epochs=6", "rl.learning_rate=0.01",
                           verifier=Fixed([1, 0, 0, 1] * 8 + [0] * 1000)))
    assert [row["updates"] for row in rows] == [2, 2, 2]
    assert rows[1]["frac_reward_zero_std"] == 1 and rows[1]["grad_norm"] > 0
    assert "prl/correction_ratio" not in rows[1]  # there is no outcome to compare it with


def test_wrong_settings_name_the_key():
    """The KL would be counted twice; the whole answer would be one step."""
    assert not not_refused("prl", {
        ("prl.step_tokens=4", override): override.partition("=")[0] for override in
        ("rl.beta=0.1", "rl.dynamic_sampling_rounds=2", "prl.beta=-1")})
    assert not not_refused("prl", {"prl.step_tokens=12": "prl.step_tokens"})

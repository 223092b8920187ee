"""`hpt`: SuperRL's rule with a threshold, the released code's loss, and the largest norm."""

import pytest
import torch
from small_training import Fixed, distance, watch, watch_rollouts
from textbook import gradient, plain_rl, plain_sft, problems_of

from hybridrl_lib.system.errors import UsageError

PLAIN = ("rl.updates_per_rollout=1", "rl.gamma=0")
UNSOLVED, ONCE, HALF, SOLVED = [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]


@pytest.mark.parametrize(("gamma", "sft"), [(0, (0, 1)), (0.25, (0, 1, 2, 3)), (0.5, range(6)),
                                            (1, range(8)), (-0.1, ())])
def test_the_gate_is_a_threshold(make_trainer, monkeypatch, gamma, sft):
    """At most gamma right: SFT. Below 0 all is RL, at 1 all is SFT. L_RL is Dr. GRPO's."""
    rewards = [UNSOLVED, UNSOLVED, ONCE, ONCE, HALF, HALF, SOLVED, SOLVED]
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("hpt", *PLAIN, f"hpt.gamma={gamma}", "hpt.sft_coefficient=0.3",
                           verifier=Fixed(sum(rewards, [])))
    settings = trainer.settings.rl
    assert (settings.clip, settings.advantage_scale, settings.loss_normalization,
            settings.beta) == (False, "none", "constant", 0)
    seen = watch(trainer)
    trainer.train()
    trainer.load_weights(seen.weights[0])
    groups, rest, share = taken[0], [i for i in range(8) if i not in sft], len(sft) / 8
    problems = problems_of(trainer, groups)
    loss = (1 - share) * plain_rl(trainer, [groups[i] for i in rest], [rewards[i] for i in rest])
    if sft:
        loss = loss + 0.3 * share * plain_sft(trainer, [problems[i] for i in sft])
    assert distance(seen.gradients[0], gradient(trainer, loss)) < 2e-5
    row = trainer.folder.lines("metrics.jsonl")[0]
    assert (row["hpt/closed"], row["hpt/sft_share"], row["hpt/left_out"]) == (len(sft), share, 0)


def test_a_share_that_is_the_threshold_is_not_above_it(make_trainer):
    """1 of 5 as a mean in fp32 is above 0.2, and would be taught by RL."""
    trainer = make_trainer("hpt", *PLAIN, "hpt.gamma=0.2", "rl.group_size=5",
                           verifier=Fixed([0, 0, 1, 0, 0]))
    trainer.train()
    assert trainer.folder.lines("metrics.jsonl")[0]["hpt/closed"] == 8


def flat(trainer):
    return torch.cat([w.flatten() for w in trainer.weights().values()])


def test_below_zero_it_is_rl_bit_for_bit(make_trainer):
    ends = []
    for setup, epochs, more in (("hpt", 8, ("hpt.gamma=-1", "rl.gamma=0")),
                                ("rl", 4, ("rl.clip=false", "rl.advantage_scale=none",
                                           "rl.loss_normalization=constant", "rl.beta=0"))):
        trainer = make_trainer(setup, f"training.epochs={epochs}", *more, folder=setup)
        trainer.train()
        ends.append(flat(trainer))
    assert torch.equal(*ends)


def test_an_update_with_too_large_a_gradient_is_left_out(make_trainer):
    """Neither gradient nor Adam's momentum moves the weights; the next smaller one does."""
    trainer = make_trainer("hpt", *PLAIN, "training.epochs=8", verifier=Fixed(UNSOLVED))
    weights, learn = [flat(trainer).clone()], trainer.method.learn

    def noted(step, updates, totals):
        for update in updates:
            update.largest_norm = 1e-3 if step.progress.step in (1, 2) else 80
        norms = learn(step, updates, totals)
        weights.append(flat(trainer).clone())
        return norms

    trainer.method.learn = noted
    trainer.train()
    moved = [not torch.equal(*pair) for pair in zip(weights, weights[1:], strict=False)]
    assert moved == [True, False, False, True]


def test_what_is_left_out_is_counted(make_trainer):
    trainer = make_trainer("hpt", *PLAIN, "hpt.largest_norm=1e-6", verifier=Fixed(UNSOLVED))
    before = flat(trainer).clone()
    trainer.train()
    row = trainer.folder.lines("metrics.jsonl")[0]
    assert (row["hpt/left_out"], row["updates"]) == (1, 0), "the budget counts what moved something"
    assert torch.equal(flat(trainer), before)


@pytest.mark.parametrize(("override", "words"), [
    ("hpt.gamma=1.5", "at most 1"), ("hpt.largest_norm=0", "above 0")])
def test_wrong_settings_are_one_sentence(make_trainer, override, words):
    with pytest.raises(UsageError, match=words):
        make_trainer("hpt", override)

"""`hpt`: SuperRL's rule with a threshold, the released code's loss, and the largest norm."""

import torch
from small_training import (
    Fixed,
    distance,
    flat,
    not_refused,
    rows_of,
    same_ends,
    take_first_step,
    trained,
    watch,
    watch_rollouts,
)
from textbook import gradient, plain_rl, plain_sft, problems_of

PLAIN = ("rl.updates_per_rollout=1", "rl.gamma=0")
UNSOLVED, ONCE, HALF, SOLVED = [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]


def test_the_gate_is_a_threshold(make_trainer, monkeypatch):
    """At most gamma right: SFT. Below 0 all is RL, at 1 all is SFT. L_RL is Dr. GRPO's."""
    rewards = [UNSOLVED, UNSOLVED, ONCE, ONCE, HALF, HALF, SOLVED, SOLVED]
    for gamma, sft in ((0, (0, 1)), (0.25, (0, 1, 2, 3)), (0.5, range(6)), (1, range(8)),
                       (-0.1, ())):
        taken = watch_rollouts(monkeypatch)
        trainer = make_trainer("hpt", *PLAIN, f"hpt.gamma={gamma}", "hpt.sft_coefficient=0.3",
                               verifier=Fixed(sum(rewards, [])), folder=str(gamma))
        settings = trainer.settings.rl
        assert (settings.clip, settings.advantage_scale, settings.loss_normalization,
                settings.beta) == (False, "none", "constant", 0)
        seen = watch(trainer)
        take_first_step(trainer)
        trainer.load_weights(seen.weights[0])
        groups, rest, share = taken[0], [i for i in range(8) if i not in sft], len(sft) / 8
        problems = problems_of(trainer, groups)
        loss = (1 - share) * plain_rl(trainer, [groups[i] for i in rest],
                                      [rewards[i] for i in rest])
        if sft:
            loss = loss + 0.3 * share * plain_sft(trainer, [problems[i] for i in sft])
        assert distance(seen.gradients[0], gradient(trainer, loss)) < 2e-5, gamma
        row = rows_of(trainer)[0]
        assert (row["hpt/closed"], row["hpt/sft_share"], row["hpt/left_out"]) == (
            len(sft), share, 0)


def test_a_share_that_is_the_threshold_is_not_above_it(make_trainer):
    """1 of 5 as a mean in fp32 is above 0.2, so it would be learned by RL."""
    trainer = trained(make_trainer, "hpt", *PLAIN, "hpt.gamma=0.2", "rl.group_size=5",
                      verifier=Fixed([0, 0, 1, 0, 0]))
    assert rows_of(trainer)[0]["hpt/closed"] == 8


def test_below_zero_it_is_rl_bit_for_bit(make_trainer):
    """Then no problem is learned by SFT."""
    assert same_ends(
        make_trainer, ("hpt", "training.epochs=4", "hpt.gamma=-1", "rl.gamma=0"),
        ("rl", "training.epochs=2", "rl.clip=false", "rl.advantage_scale=none",
         "rl.loss_normalization=constant", "rl.beta=0"))


def test_an_update_with_too_large_a_gradient_is_left_out(make_trainer):
    """Neither gradient nor Adam's momentum moves the weights; the next smaller one does."""
    trainer = make_trainer("hpt", *PLAIN, "training.epochs=8", verifier=Fixed(UNSOLVED))
    weights, learn = [flat(trainer)], trainer.method.learn

    def noted(step, updates, totals):
        for update in updates:
            update.largest_norm = 1e-3 if step.progress.step in (1, 2) else 80
        norms = learn(step, updates, totals)
        weights.append(flat(trainer))
        return norms

    trainer.method.learn = noted
    trainer.train()
    moved = [not torch.equal(*pair) for pair in zip(weights, weights[1:], strict=False)]
    assert moved == [True, False, False, True]


def test_what_is_left_out_is_counted(make_trainer):
    """The number of updates is of those that moved something."""
    trainer = make_trainer("hpt", *PLAIN, "hpt.largest_norm=1e-6", verifier=Fixed(UNSOLVED))
    before = flat(trainer)
    trainer.train()
    row = rows_of(trainer)[0]
    assert (row["hpt/left_out"], row["updates"]) == (1, 0)
    assert torch.equal(flat(trainer), before)


def test_wrong_settings_name_the_key():
    """Bounds of the threshold and of the norm."""
    assert not not_refused("hpt", {"hpt.gamma=1.5": "hpt.gamma",
                                   "hpt.largest_norm=0": "hpt.largest_norm"})

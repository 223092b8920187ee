"""`relift`: which problems are buffered, when they are taught, and by which optimizer."""

import pytest
import torch
from small_training import (
    Fixed,
    distance,
    first_batch,
    first_progress,
    not_refused,
    rows_of,
    same_ends,
    trained,
    watch,
)
from textbook import gradient, plain_sft

from hybridrl_lib.learning.step import Rollout, Step
from hybridrl_lib.policy.completions import Completion, Group

UNSOLVED = [0, 0, 0, 0]
HALF = [1, 0, 0, 1]


def test_the_unsolved_problems_are_taught(make_trainer):
    """3 of 8 problems are unsolved at every step; with M = 2, one SFT update per step follows RL's.

    Its gradient is that of the token mean of -log pi, less gamma times the mean entropy.
    """
    trainer = make_trainer("relift", "relift.batch_size=2", "sft.gamma=0.3", "rl.beta=0",
                           "rl.updates_per_rollout=1", verifier=Fixed(UNSOLVED * 3 + HALF * 5))
    seen, order = watch(trainer), first_batch(trainer)
    trainer.train()
    row = rows_of(trainer)[0]
    assert (row["updates"], row["relift/taught"], row["relift/buffer"]) == (2, 2, 1)
    trainer.load_weights(seen.weights[1])
    loss = plain_sft(trainer, order[:2], gamma=0.3)
    assert distance(seen.gradients[1], gradient(trainer, loss)) < 2e-5


def test_rl_and_sft_have_their_own_moments(make_trainer):
    """With a shared Adam, SFT's gradients would scale RL's steps."""
    trainer = trained(make_trainer, "relift", "relift.batch_size=2", "training.epochs=8",
                      verifier=Fixed(UNSOLVED * 3 + HALF * 5))
    steps = {name: {int(state["step"]) for state in optimizer.state_dict()["state"].values()}
             for name, optimizer in trainer.learner.optimizers.items()}
    assert steps == {"main": {8}, "sft": {4}}  # two updates per step, and one


def test_no_unsolved_problem_is_rl_alone(make_trainer):
    """Where every problem is sometimes solved, ReLIFT is RL to the bit."""
    assert same_ends(make_trainer, ("relift", "training.epochs=4"), ("rl", "training.epochs=2"),
                     verifier=Fixed(HALF))


def test_who_is_taught_first(make_trainer):
    """The paper's queue and the released code's stack, when more is buffered than taught."""
    for newest, taught in ((False, [0, 1]), (True, [4, 5])):
        trainer = make_trainer("relift", "relift.batch_size=2", f"relift.newest_first={newest}",
                               "relift.every=2")
        method = trainer.method
        method.steps_since_sft = 1  # so the first step teaches nothing
        method.compose(fake_step(trainer, [0, 1, 2, 3]))
        update = method.compose(fake_step(trainer, [4, 5, 6, 7]))[-1]
        asked = [tuple(s.prompt) for s in update.sequences]
        assert asked == [tuple(trainer.policy.encode_prompt(trainer.parts.train[i].question))
                         for i in taught]
        assert len(method.buffer) == 6


def fake_step(trainer, problems):
    """A step whose groups are unsolved, without sampling."""
    progress, zeros = first_progress(trainer), torch.zeros(4)
    rollouts = [Rollout(trainer.parts.train[i], Group([1, 2], [
        Completion([3], [0.0], [0.0], True, "")] * 4), zeros, zeros, zeros) for i in problems]
    return Step(progress, trainer.settings, trainer.learner, trainer.method.weights(progress), 0.0,
                {"sft": 0.1, "rl": 0.1}, {}, rollouts=rollouts)


def test_sft_updates_are_rare_enough(make_trainer):
    """relift.every: a weak model fills the buffer at every step; SFT at every step is what ruined
    the paper's ablation."""
    trainer = make_trainer("relift", "relift.batch_size=2", "relift.every=3", "training.epochs=12",
                           verifier=Fixed(UNSOLVED))
    trainer.train()
    rows = rows_of(trainer)
    assert [row["relift/taught"] for row in rows] == [2, 0, 0, 2, 0, 0]
    # one SFT update with the two of RL, then two steps of RL alone, and so on
    assert [row["relift/sft_share"] for row in rows] == pytest.approx(
        [1 / 3, 1 / 5, 1 / 7, 2 / 10, 2 / 12, 2 / 14])


def test_wrong_settings_name_the_key():
    """Nothing would ever be taught."""
    assert not not_refused("relift", {"relift.batch_size=0": "relift.batch_size",
                                      "relift.every=0": "relift.every"})


def test_the_released_code_has_the_entropy_in_both_losses(make_trainer):
    """`relift_code`: 0.001 per update, of a mean over tokens; ten times the paper's in SFT."""
    trainer = make_trainer("relift_code", "relift.batch_size=2", "rl.updates_per_rollout=1",
                           verifier=Fixed(UNSOLVED))
    taken, compose = [], trainer.method.compose
    trainer.method.compose = lambda step: taken.extend(compose(step)) or taken
    trainer.train()
    assert [update.optimizer for update in taken] == ["main", "sft"]
    for update in taken:
        tokens = sum(len(sequence.completion) for sequence in update.sequences)
        assert update.entropy.tolist() == pytest.approx([1 / tokens] * len(update.sequences))
        assert update.gamma == 0.001
    assert rows_of(trainer)[0]["gamma"] == 0.001

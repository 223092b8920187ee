"""`mifo`: which tokens SFT learns, what RL marks as important, and that SFT leaves it alone."""

import math

import pytest
import torch
from small_training import (
    Fixed,
    distance,
    first_batch,
    flat,
    not_refused,
    rows_of,
    same_ends,
    trained,
    watch,
)
from textbook import gradient, plain_scores

UNSOLVED, ONCE, HALF = [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]
MIXED = UNSOLVED * 3 + HALF * 5
RUN = ("mifo.batch_size=2", "rl.updates_per_rollout=1", "rl.beta=0")


class Eye:
    """Every update's weights before and after, in order, with the optimizer that took it."""

    def __init__(self, trainer):
        self.updates, step, learner = [], trainer.learner.step, trainer.learner

        def noted(learning_rate, optimizer="main", *more):
            before = flat(trainer)
            norm = step(learning_rate, optimizer, *more)
            self.updates.append((optimizer, before, flat(trainer)))
            return norm

        learner.step = noted


def test_sft_learns_the_uncertain_tokens_of_unsolved_problems(make_trainer):
    """The top 30 % of each demonstration by entropy, rounded up; the mean is over those only, and
    the gradient of frozen weights is 0."""
    trainer = make_trainer("mifo", *RUN, "mifo.token_share=0.3", "mifo.frozen=0.2",
                           verifier=Fixed(MIXED))
    order = first_batch(trainer)
    seen = watch(trainer)
    trainer.train()
    row = rows_of(trainer)[0]
    assert (row["updates"], row["mifo/taught"], row["mifo/buffer"]) == (2, 2, 1)
    moved = (flat(seen.weights[1]) - flat(seen.weights[0])).abs()
    frozen = flat(trainer.method.frozen_weights())
    assert frozen.sum() == round(0.2 * len(moved))
    assert moved[frozen].min() >= moved[~frozen].max()
    trainer.load_weights(seen.weights[1])
    total, count, tokens = torch.zeros(()), 0, 0
    for problem in order[:2]:
        scores, entropies = plain_scores(trainer.policy.model,
                                         trainer.policy.encode_prompt(problem.question),
                                         trainer.policy.encode_completion(problem.solution))
        most = sorted(range(len(scores)), key=lambda t: -float(entropies[t].detach()))
        most = most[:math.ceil(0.3 * len(scores))]
        total, count, tokens = total - scores[most].sum(), count + len(most), tokens + len(scores)
    expected = gradient(trainer, total / count)
    assert float(expected[frozen].norm()) > 0
    assert distance(seen.gradients[1], expected * ~frozen) < 2e-5
    assert row["mifo/token_share"] == count / tokens
    assert row["mifo/frozen"] == float(frozen.sum()) / len(frozen)


def test_the_importance_adds_up_what_rl_moved(make_trainer):
    """With alpha = 0 only the last step counts; what SFT moves never does."""
    for decay in (0.5, 0.0):
        trainer = make_trainer("mifo", *RUN, "training.epochs=6", f"mifo.decay={decay}",
                               verifier=Fixed(MIXED), folder=str(decay))
        eye = Eye(trainer)
        trainer.train()
        expected = 0.0
        for optimizer, before, after in eye.updates:
            if optimizer == "main":
                expected = decay * expected + (after - before).abs()
        assert [optimizer for optimizer, _, _ in eye.updates] == ["main", "sft"] * 3
        assert torch.allclose(flat(trainer.method.importance), expected, atol=1e-9)
        assert set(trainer.method.tensors()) == set(trainer.policy.trained_weights())


def test_adam_does_not_move_what_is_frozen(make_trainer):
    """Nor do momentum, of a weight that was free before, and weight decay."""
    trainer = make_trainer("mifo", *RUN, "training.epochs=8", "training.weight_decay=0.5",
                           "mifo.decay=0", "mifo.frozen=0.3", "sft.learning_rate=0.01",
                           verifier=Fixed(MIXED))
    eye, masks, frozen_weights = Eye(trainer), [], trainer.method.frozen_weights
    learn, ends = trainer.method.learn, []

    def noted_frozen():
        masks.append(frozen_weights())
        return masks[-1]

    def noted_learn(*arguments):
        norms = learn(*arguments)
        ends.append(flat(trainer))
        return norms

    trainer.method.frozen_weights, trainer.method.learn = noted_frozen, noted_learn
    trainer.train()
    sft = [(before, after) for optimizer, before, after in eye.updates if optimizer == "sft"]
    assert len(sft) == len(masks) == 4
    for (before, after), mask, end in zip(sft, masks, ends, strict=True):
        frozen = flat(mask)
        # without being put back, momentum and weight decay would have moved nearly all of them
        assert (after != before)[frozen].float().mean() > 0.9
        assert torch.equal(end[frozen], before[frozen])
        assert torch.equal(end[~frozen], after[~frozen])
        assert (end != before)[~frozen].float().mean() > 0.9
        assert frozen.float().mean() == pytest.approx(0.3, abs=1e-3)
    assert not torch.equal(flat(masks[0]), flat(masks[1]))


def test_what_it_equals_bit_for_bit(make_trainer):
    """With every token and nothing frozen it is ReLIFT; without a hard problem it is RL."""
    assert same_ends(
        make_trainer, ("mifo", "mifo.token_share=1", "mifo.frozen=0", "mifo.batch_size=2",
                       "training.epochs=6"),
        ("relift", "sft.gamma=0", "relift.batch_size=2", "training.epochs=6"),
        verifier=Fixed(MIXED))
    assert same_ends(make_trainer, ("mifo", "training.epochs=8"), ("rl", "training.epochs=4"),
                     verifier=Fixed(HALF), seed=1)


def test_the_buffer_takes_problems_up_to_an_accuracy(make_trainer):
    """At most a fraction p of the answers is correct."""
    for accuracy, hard in ((0, 2), (0.25, 4), (0.5, 8)):
        trainer = trained(make_trainer, "mifo", "mifo.batch_size=9", f"mifo.accuracy={accuracy}",
                          verifier=Fixed(UNSOLVED * 2 + ONCE * 2 + HALF * 4), folder=str(hard))
        assert rows_of(trainer)[0]["mifo/buffer"] == hard
        assert len(trainer.method.state()["buffer"]) == hard


def test_before_rl_has_moved_anything_nothing_is_frozen(make_trainer):
    """Every answer is wrong, so RL never moves: SFT continues, and C stays empty."""
    trainer = make_trainer("mifo", *RUN, verifier=Fixed(UNSOLVED))
    trainer.train()
    row = rows_of(trainer)[0]
    assert (row["updates"], row["mifo/frozen"]) == (1, 0) and not trainer.method.importance


def test_wrong_settings_name_the_key():
    """Bounds of the fractions and of the batch."""
    assert not not_refused("mifo", {
        "mifo.token_share=0": "mifo.token_share", "mifo.frozen=1.1": "mifo.frozen",
        "mifo.batch_size=0": "mifo.batch_size"})


def test_updates_that_moved_nothing_forget_nothing(make_trainer):
    """A step whose RL updates were all skipped leaves C as it was."""
    trainer = make_trainer("mifo", *RUN, "training.epochs=8", verifier=Fixed(MIXED))
    learner, importances = trainer.learner, []
    step, learn = learner.step, trainer.method.learn

    def skipped(learning_rate, optimizer="main", *more):
        if optimizer == "main" and trainer.step == 2:
            learner.loss_is_finite = False
        return step(learning_rate, optimizer, *more)

    def noted(*arguments):
        norms = learn(*arguments)
        importances.append(flat(trainer.method.importance))
        return norms

    learner.step, trainer.method.learn = skipped, noted
    trainer.train()
    assert torch.equal(importances[1], importances[2])
    assert not torch.equal(importances[2], importances[3])

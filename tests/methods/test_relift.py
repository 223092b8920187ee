"""`relift`: which problems are buffered, when they are taught, and by which optimizer."""

import pytest
import torch
from small_training import Fixed, distance, watch
from textbook import gradient, plain_mean, plain_scores

from hybridrl_lib.system.errors import UsageError

UNSOLVED = [0, 0, 0, 0]
HALF = [1, 0, 0, 1]


def test_the_unsolved_problems_are_taught(make_trainer):
    """3 of 8 problems are unsolved at every step; with M = 2 one SFT update a step follows RL's.

    Its gradient is that of the token mean of -log pi, less gamma times the mean entropy.
    """
    trainer = make_trainer("relift", "relift.batch_size=2", "relift.gamma=0.3", "rl.beta=0",
                           "rl.updates_per_rollout=1", verifier=Fixed(UNSOLVED * 3 + HALF * 5))
    seen = watch(trainer)
    order = trainer._batch(trainer.method.stages[0], 0, "prompts", 8)
    trainer.train()
    row = trainer.folder.lines("metrics.jsonl")[0]
    assert (row["updates"], row["relift/taught"], row["relift/buffer"]) == (2, 2, 1)
    trainer.load_weights(seen.weights[1])
    losses, entropies = [], []
    for problem in order[:2]:
        scores, entropy = plain_scores(trainer.policy.model,
                                       trainer.policy.encode_prompt(problem.question),
                                       trainer.policy.encode_completion(problem.solution))
        losses.append(-scores)
        entropies.append(entropy)
    loss = plain_mean(losses, "token_mean") - 0.3 * plain_mean(entropies, "token_mean")
    assert distance(seen.gradients[1], gradient(trainer, loss)) < 2e-5


def test_rl_and_sft_have_moments_of_their_own(make_trainer):
    """With a shared Adam, SFT's gradients would scale RL's steps."""
    trainer = make_trainer("relift", "relift.batch_size=2", "training.epochs=8",
                           verifier=Fixed(UNSOLVED * 3 + HALF * 5))
    trainer.train()
    steps = {name: {int(state["step"]) for state in optimizer.state_dict()["state"].values()}
             for name, optimizer in trainer.learner.optimizers.items()}
    assert steps == {"main": {8}, "sft": {4}}  # two updates a step, and one


def test_no_unsolved_problem_is_rl_alone(make_trainer):
    """Where every problem is solved at times, ReLIFT is RL to the bit."""
    weights = []
    for setup in ("relift", "rl"):
        epochs = {"relift": 4, "rl": 2}[setup]
        trainer = make_trainer(setup, f"training.epochs={epochs}", verifier=Fixed(HALF),
                               folder=setup)
        trainer.train()
        weights.append(torch.cat([w.flatten() for w in trainer.weights().values()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(("newest", "taught"), [(False, [0, 1]), (True, [4, 5])])
def test_who_is_taught_first(make_trainer, newest, taught):
    """Paper's queue and the released code's stack, when more is buffered than taught."""
    trainer = make_trainer("relift", "relift.batch_size=2", f"relift.newest_first={newest}",
                           "relift.every=2")
    method = trainer.method
    method.steps_since_sft = 1  # so that the first step teaches nothing
    method.compose(fake_step(trainer, [0, 1, 2, 3]))
    update = method.compose(fake_step(trainer, [4, 5, 6, 7]))[-1]
    asked = [tuple(s.prompt) for s in update.sequences]
    assert asked == [tuple(trainer.policy.encode_prompt(trainer.parts.train[i].question))
                     for i in taught]
    assert len(method.buffer) == 6


def fake_step(trainer, problems):
    """A step whose groups are unsolved, without sampling."""
    from hybridrl_lib.learning.step import Rollout, Step
    from hybridrl_lib.policy.completions import Completion, Group

    progress = trainer._progress()
    zeros = torch.zeros(4)
    rollouts = [Rollout(trainer.parts.train[i], Group([1, 2], [
        Completion([3], [0.0], [0.0], True, "")] * 4), zeros, zeros, zeros) for i in problems]
    return Step(progress, trainer.settings, trainer.learner, trainer.method.weights(progress), 0.0,
                {"sft": 0.1, "rl": 0.1}, {}, rollouts=rollouts)


def test_the_cap_on_sft_updates(make_trainer):
    """A weak model fills the buffer at every step; SFT at every step is what ruined the paper's
    ablation."""
    trainer = make_trainer("relift", "relift.batch_size=2", "relift.every=3", "training.epochs=12",
                           verifier=Fixed(UNSOLVED))
    trainer.train()
    rows = trainer.folder.lines("metrics.jsonl")
    assert [row["relift/taught"] for row in rows] == [2, 0, 0, 2, 0, 0]
    # one SFT update beside the two of RL, then two steps of RL alone, and so on
    assert [row["relift/sft_share"] for row in rows] == pytest.approx(
        [1 / 3, 1 / 5, 1 / 7, 2 / 10, 2 / 12, 2 / 14])


def test_a_buffer_smaller_than_a_batch_is_refused(make_trainer):
    with pytest.raises(UsageError, match="relift.capacity cannot be '3': the buffer could never"):
        make_trainer("relift", "relift.batch_size=4", "relift.capacity=3")


def test_the_released_code_has_the_entropy_in_both_losses(make_trainer):
    trainer = make_trainer("relift_code", "relift.batch_size=2", "rl.updates_per_rollout=1",
                           verifier=Fixed(UNSOLVED))
    taken, compose = [], trainer.method.compose
    trainer.method.compose = lambda step: taken.extend(compose(step)) or taken
    trainer.train()
    assert [update.optimizer for update in taken] == ["main", "sft"]
    for update in taken:  # the weights of a mean over tokens, times that of the term
        tokens = sum(len(sequence.completion) for sequence in update.sequences)
        assert update.entropy.tolist() == pytest.approx([0.001 / tokens] * len(update.sequences))
    assert trainer.folder.lines("metrics.jsonl")[0]["gamma"] == 0.001

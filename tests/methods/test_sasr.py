"""`sasr`: what is measured, the probability made of it, and the draws."""

import pytest
import torch
from small_training import Fixed, distance, watch
from textbook import gradient, plain_mean, plain_scores

from hybridrl_lib.learning.progress import Progress
from hybridrl_lib.system.errors import UsageError

HALF = Fixed([1, 0, 0, 1])
# 8 problems: the warm-up is 2 steps of 4 demonstrations, then 20 steps with 8 prompts each.
RUN = ("sft.batch_size=4", "training.epochs=40", "training.gradient_clip=0.01")


def flat(trainer):
    return torch.cat([w.flatten() for w in trainer.weights().values()])


def rows_of(trainer):
    trainer.train()
    rows = trainer.folder.lines("metrics.jsonl")
    return rows[:2], rows[2:]


def test_every_step_is_drawn_with_the_probability_of_its_norm(make_trainer):
    """p from the norms in the record, u from the seed and the step: together they are what was
    done. SFT and GRPO both happen, and never both in one step."""
    trainer = make_trainer("sasr", *RUN, "sasr.gamma=0.7", verifier=HALF, seed=3)
    warm, rows = rows_of(trainer)
    assert [row["stage"] for row in warm] == ["sft", "sft"]
    first = norm = warm[-1]["grad_norm"]
    done = []
    for number, row in enumerate(rows):
        probability = norm / (norm + 0.7 * first)
        assert row["sasr/p"] == pytest.approx(probability)
        stage = trainer.method.stages[1]
        draw = Progress(stage, number, 20, taken=2 + number, seed=3).random("sasr").random()
        sft = draw < probability
        assert (row["lambda/sft"], row["lambda/rl"]) == (float(sft), float(not sft))
        assert ("loss/sft" in row, "reward" in row) == (sft, not sft)
        done.append(sft)
        if sft:
            norm = row["grad_norm"]
        assert row["sasr/gradient_norm"] == pytest.approx(norm)
        assert row["sasr/sft_share"] == sum(done) / len(done)
    assert rows[0]["sasr/p"] == pytest.approx(1 / 1.7) and 4 < sum(done) < 16
    assert all("kl/reference" in row and "kl/anchor" in row for row in rows if "reward" in row)


def test_the_norm_is_of_equal_batches_before_clipping(make_trainer):
    """In every SFT step: of 4 demonstrations, as in the warm-up, and not of 8 or of the clip."""
    trainer = make_trainer("sasr", *RUN, "sasr.gamma=1e-9", verifier=HALF)
    seen, taught = watch(trainer), []
    compose = trainer.method.compose

    def noted(step):
        updates = compose(step)
        taught.append(updates[0].sequences)
        return updates

    trainer.method.compose = noted
    warm, rows = rows_of(trainer)
    assert all(len(sequences) == 4 for sequences in taught)
    for place in (0, 1, 2, 5):
        trainer.load_weights(seen.weights[place])
        loss = plain_mean([-plain_scores(trainer.policy.model, s.prompt, s.completion)[0]
                           for s in taught[place]], "token_mean")
        expected = gradient(trainer, loss)
        assert distance(seen.gradients[place], expected) < 2e-5
        assert [*warm, *rows][place]["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)
    assert rows[3]["sasr/gradient_norm"] == rows[3]["grad_norm"] > 0.01


def test_its_batches_take_every_demonstration_in_turn(make_trainer):
    """8 problems in batches of 3: full ones always, each problem three times in eight batches."""
    trainer = make_trainer("sasr", "sft.batch_size=3", verifier=HALF)
    batches = [trainer.method._next_batch() for _ in range(8)]
    assert all(len(batch) == 3 for batch in batches)
    order = [problem.id for batch in batches for problem in batch]
    assert all(sorted(order[i:i + 8]) == sorted(p.id for p in trainer.parts.train)
               for i in (0, 8, 16))
    assert order[:8] != order[8:16]


@pytest.mark.parametrize(("gamma", "sft"), [(1e-9, True), (1e9, False)])
def test_the_balance_at_its_ends(make_trainer, gamma, sft):
    _, rows = rows_of(make_trainer("sasr", *RUN, f"sasr.gamma={gamma}", verifier=HALF))
    assert all((row["lambda/sft"] == 1) == sft for row in rows)


def test_measuring_anew_moves_nothing(make_trainer):
    """A norm is taken every third step of GRPO; the weights end bit for bit where they would."""
    ends, norms = [], []
    for more in ((), ("sasr.measure_every=3",)):
        trainer = make_trainer("sasr", *RUN, "sasr.gamma=1e9", *more, verifier=HALF,
                               folder=f"run{len(more)}")
        _, rows = rows_of(trainer)
        ends.append(flat(trainer))
        norms.append([row["sasr/gradient_norm"] for row in rows])
    assert torch.equal(*ends)
    assert len(set(norms[0])) == 1
    changes = [i for i in range(1, 20) if norms[1][i] != norms[1][i - 1]]
    assert changes == [2, 5, 8, 11, 14, 17]


def test_the_measured_norm_is_that_of_the_next_batch(make_trainer):
    """Of the policy as GRPO has left it, and on as many demonstrations as an SFT step has."""
    trainer = make_trainer("sasr", *RUN, "training.epochs=4", "sasr.gamma=1e9",
                           "sasr.measure_every=1", verifier=HALF)
    measure, kept = trainer.learner.gradient_norm, []

    def noted(update):
        kept.append((update.sequences, {k: v.detach().clone()
                                        for k, v in trainer.weights().items()}))
        return measure(update)

    trainer.learner.gradient_norm = noted
    _, rows = rows_of(trainer)
    assert len(rows) == len(kept) == 2
    for row, (sequences, weights) in zip(rows, kept, strict=True):
        assert len(sequences) == 4
        trainer.load_weights(weights)
        loss = plain_mean([-plain_scores(trainer.policy.model, s.prompt, s.completion)[0]
                           for s in sequences], "token_mean")
        assert row["sasr/gradient_norm"] == pytest.approx(float(gradient(trainer, loss).norm()),
                                                          rel=1e-4)


def test_smoothing_is_a_moving_average(make_trainer):
    trainer = make_trainer("sasr", *RUN, "sasr.gamma=1e-9", "sasr.smoothing=0.9", verifier=HALF)
    warm, rows = rows_of(trainer)
    norm = warm[-1]["grad_norm"]
    for row in rows:
        norm = 0.9 * norm + 0.1 * row["grad_norm"]
        assert row["sasr/gradient_norm"] == pytest.approx(norm)


def test_batches_cut_short_are_no_measure_of_the_warm_up(make_trainer):
    """8 problems in batches of 5: the second batch of an epoch has 3 and does not count."""
    trainer = make_trainer("sasr", "sft.batch_size=5", "sasr.warmup_epochs=3",
                           "sasr.warm_norm=mean", verifier=HALF)
    trainer.train()
    norms = [row["grad_norm"] for row in trainer.folder.lines("metrics.jsonl")[:6]]
    assert trainer.method.warm == pytest.approx(norms[::2])
    assert trainer.method.warm_norm == pytest.approx(sum(norms[::2]) / 3)


@pytest.mark.parametrize(("override", "words"), [
    ("sasr.gamma=0", "above 0"), ("sasr.warmup_epochs=0", "at least 1"),
    ("sasr.smoothing=1", "below 1")])
def test_wrong_settings_are_one_sentence(make_trainer, override, words):
    with pytest.raises(UsageError, match=words):
        make_trainer("sasr", override)


@pytest.mark.parametrize("overrides", [("rl.beta=0",), ("rl.kl_anchor=reference",)])
def test_the_warmed_up_policy_is_watched_only_where_its_scores_are_there(make_trainer, overrides):
    """The divergence from another model would stand in the same column."""
    trainer = make_trainer("sasr", *RUN, *overrides, verifier=HALF, seed=3)
    _, rows = rows_of(trainer)
    assert any("kl/reference" in row for row in rows)
    assert not any("kl/anchor" in row for row in rows)


def test_the_place_of_a_step_names_what_it_teaches(make_trainer):
    """An error says with which problems it came about; a drawn SFT step has a batch of its own."""
    trainer = make_trainer("sasr", *RUN, "sasr.gamma=1e-9", verifier=HALF)
    places, taught = [], []
    learn = trainer.method.learn

    def noted(step, updates, totals):
        places.append(trainer.learner.place)
        taught.append([p.id for p in trainer.parts.train for s in updates[0].sequences
                       if trainer.policy.encode_prompt(p.question) == s.prompt])
        return learn(step, updates, totals)

    trainer.method.learn = noted
    trainer.train()
    assert len(places) == 22
    for place, names in zip(places, taught, strict=True):
        assert set(place.split("problems ")[1].split(" and ")[0].split(", ")) <= set(names)

"""`sasr`: what is measured, the probability made of it, and the draws."""

import pytest
from small_training import Fixed, distance, not_refused, rows_of, trained, watch
from textbook import gradient, plain_mean, plain_scores

from hybridrl_lib.learning.progress import Progress

HALF = Fixed([1, 0, 0, 1])
# 8 problems: the warm-up is 2 steps of 4 demonstrations, then 20 steps with 8 prompts each.
RUN = ("sft.batch_size=4", "training.epochs=40", "training.gradient_clip=0.01")


def parts_of(trainer):
    """The lines of the warm-up, and those of the drawn steps."""
    rows = rows_of(trainer)
    return rows[:2], rows[2:]


def test_every_step_is_drawn_with_the_probability_of_its_norm(make_trainer):
    """p from the norms in the record, u from the seed and the step: together they are what was
    done. SFT and GRPO both happen, and never both in one step."""
    trainer = trained(make_trainer, "sasr", *RUN, "sasr.gamma=0.7", verifier=HALF, seed=3)
    warm, rows = parts_of(trainer)
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
    trainer.train()
    warm, rows = parts_of(trainer)
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
    """8 problems in batches of 3: always full, each problem three times in eight batches."""
    trainer = make_trainer("sasr", "sft.batch_size=3", verifier=HALF)
    batches = [trainer.method._next_batch() for _ in range(8)]
    assert all(len(batch) == 3 for batch in batches)
    order = [problem.id for batch in batches for problem in batch]
    assert all(sorted(order[i:i + 8]) == sorted(p.id for p in trainer.parts.train)
               for i in (0, 8, 16))
    assert order[:8] != order[8:16]


def test_the_balance_at_its_ends(make_trainer):
    """A tiny gamma draws only SFT; a huge one only GRPO, which leaves the norm as it was."""
    for gamma, sft in ((1e-9, True), (1e9, False)):
        trainer = trained(make_trainer, "sasr", *RUN[:1], "training.epochs=16",
                          f"sasr.gamma={gamma}", verifier=HALF, folder=str(sft))
        warm, rows = parts_of(trainer)
        assert len(rows) == 8 and all((row["lambda/sft"] == 1) == sft for row in rows)
        if not sft:
            assert {row["sasr/gradient_norm"] for row in rows} == {warm[-1]["grad_norm"]}


def test_short_batches_do_not_count_for_the_warm_up(make_trainer):
    """8 problems in batches of 5: the second batch of an epoch has 3, and g_warm is the norm of
    the last full one."""
    trainer = trained(make_trainer, "sasr", "sft.batch_size=5", "sasr.warmup_epochs=3",
                      verifier=HALF)
    norms = [row["grad_norm"] for row in rows_of(trainer)[:6]]
    assert trainer.method.warm_norm == pytest.approx(norms[4]) != pytest.approx(norms[5])
    assert trainer.method.state()["warm_norm"] == trainer.method.warm_norm


def test_wrong_settings_name_the_key():
    """Without a positive gamma, or without a warm-up, there is no probability."""
    assert not not_refused("sasr", {"sasr.gamma=0": "sasr.gamma",
                                    "sasr.warmup_epochs=0": "sasr.warmup_epochs"})


def test_the_divergence_from_the_warmed_up_policy_is_measured_only_where_it_is_in_the_loss(
        make_trainer):
    """Otherwise the divergence from another model would be in the same column."""
    for override in ("rl.beta=0", "rl.kl_anchor=reference"):
        trainer = trained(make_trainer, "sasr", "training.epochs=12", override, verifier=HALF,
                          seed=3, folder=override)
        rows = rows_of(trainer)
        assert any("kl/reference" in row for row in rows)
        assert not any("kl/anchor" in row for row in rows)


def test_the_place_of_a_step_names_what_it_teaches(make_trainer):
    """An error names the problems it occurred with; a drawn SFT step has its own batch."""
    trainer = make_trainer("sasr", *RUN[:1], "training.epochs=16", "sasr.gamma=1e-9",
                           verifier=HALF)
    found, learn = [], trainer.method.learn

    def noted(step, updates, totals):
        taught = {p.id for p in trainer.parts.train for s in updates[0].sequences
                  if trainer.policy.encode_prompt(p.question) == s.prompt}
        named = {p.id for p in trainer.parts.train if p.id in trainer.learner.place}
        found.append(bool(named) and named <= taught)
        return learn(step, updates, totals)

    trainer.method.learn = noted
    trainer.train()
    assert found == [True] * 10

"""The training loop: gradients of whole steps against textbook formulas, and what is recorded."""

import gc
import math
import weakref

import pytest
import torch
from small_training import (
    Fixed,
    distance,
    flat,
    parts_of,
    rows_of,
    small_settings,
    snapshot,
    take_first_step,
    trained,
    watch,
    watch_rollouts,
)
from textbook import (
    all_scores,
    coin_rewards,
    gradient,
    plain_grpo,
    plain_mean,
    plain_scores,
    plain_sft,
    problems_of,
)

from hybridrl_lib.learning.progress import Progress, Weights
from hybridrl_lib.methods.method import Method
from hybridrl_lib.problems.problem import Problem
from hybridrl_lib.system.errors import UserError
from hybridrl_lib.training import measuring

NORMALIZATIONS = ("sequence_mean", "token_mean", "constant", "sequence_sum")


# Whole RL steps against it ------------------------------------------------------------------------


RL_STEPS = (
    *[("rl", (f"rl.loss_normalization={name}",)) for name in NORMALIZATIONS],
    ("rl", ("rl.kl_anchor=reference", "rl.beta=0.5")),
    ("rl", ("rl.kl_anchor=old", "rl.beta=0.5", "rl.temperature=0.7")),
    ("rl", ("rl.advantage_scale=none", "rl.beta=0")),
    ("rl_entropy", ("rl.gamma=0.3",)),
    ("rl_entropy", ("rl.gamma=0.3", "training.entropy=sampled")),
    ("rl_entropy", ("rl.gamma=0.3", "rl.loss_normalization=constant", "rl.temperature=0.7")),
    ("rl_entropy", ("rl.gamma=0.3", "sft.loss_normalization=sequence_sum")),
)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_both_mini_batches_of_a_step_follow_the_formula(make_trainer, make_policy, monkeypatch,
                                                        adapter):
    """Algorithm 1's RL step: pi_old is the policy that sampled, in both updates.

    Protects the ratio per token, the named normalizations, the group's advantages, both KL
    anchors, the entropy's mean, the temperature, and the order of prompts and groups at once. The
    learning rate is so high that the second update is well off-policy and clips.
    """
    rate, wrong = {"none": 0.004, "lora": 0.02}[adapter], []
    for number, (setup, overrides) in enumerate(RL_STEPS):
        taken = watch_rollouts(monkeypatch)
        trainer = make_trainer(setup, f"rl.learning_rate={rate}", *overrides, folder=str(number),
                               policy=make_policy(adapter=adapter))
        seen = watch(trainer)
        settings = trainer.settings
        take_first_step(trainer)
        groups = taken[0]
        assert len(groups) == 8 and len(seen.gradients) == 2
        rewards = coin_rewards(trainer, problems_of(trainer, groups), groups)
        trainer.load_weights(seen.weights[0])
        old = all_scores(trainer, groups)  # at the start the policy is both old and reference
        size = settings.rl.group_size
        for index in range(2):
            trainer.load_weights(seen.weights[index])
            mine = list(range(len(groups)))[index::2]
            scores = [old[i * size + j] for i in mine for j in range(size)]
            loss = plain_grpo(trainer.policy, [groups[i] for i in mine], rewards[mine], scores,
                              scores, settings,
                              settings.rl.gamma if setup == "rl_entropy" else 0.0,
                              settings.training.entropy)
            apart = distance(seen.gradients[index], gradient(trainer, loss))
            if apart >= 2e-5:
                wrong.append((setup, overrides, index, apart))
        assert rows_of(trainer)[0]["clip_ratio"] > 0.01, "the second update must be off-policy"
    assert not wrong


def test_the_ratio_is_one_in_the_first_mini_batch_and_not_in_the_second(make_trainer):
    """Ratio, clip, and KL to old act from the second update on; with a single update, never.

    This is why "loss is 0" at the first update is normal.
    """
    for count, moved in ((1, False), (2, True)):
        trainer = make_trainer("rl", f"rl.updates_per_rollout={count}", "rl.learning_rate=0.02",
                               folder=f"run-{count}")
        take_first_step(trainer)
        row = rows_of(trainer)[0]
        assert row["updates"] == count
        assert (row["kl/old"] > 1e-4, row["clip_ratio"] > 0) == (moved, moved)
        if not moved:
            assert row["kl/old"] == row["clip_ratio"] == 0 and abs(row["loss/rl"]) < 1e-6


def test_the_mini_batches_of_a_step_are_all_its_groups_once(make_trainer, monkeypatch):
    """A batch of rollouts is consumed once: no group is split, left out, or learned from twice."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("rl", "rl.updates_per_rollout=4")
    learned, apply = [], trainer.learner.accumulate
    monkeypatch.setattr(trainer.learner, "accumulate",
                        lambda update, *rest: (learned.append(update), apply(update, *rest))[1])
    trainer.train()
    mine = [(tuple(s.prompt), tuple(s.completion)) for update in learned[:4]
            for s in update.sequences]
    theirs = [(tuple(g.prompt_ids), tuple(c.token_ids)) for g in taken[0] for c in g.completions]
    assert sorted(mine) == sorted(theirs)
    assert all(len({tuple(s.prompt) for s in update.sequences}) == 2 for update in learned[:4])


# Whole SFT steps ----------------------------------------------------------------------------------


def test_an_sft_step_follows_the_formula(make_trainer):
    """L_SFT = sum of token losses over all micro-batches / supervised tokens, EOS included."""
    wrong = []
    for tokens in (60, 4096):
        for setup, *overrides in (("sft", "sft.loss_normalization=token_mean"),
                                  ("sft", "sft.loss_normalization=sequence_mean"),
                                  ("sft", "sft.loss_normalization=sequence_sum"),
                                  ("sft_entropy", "sft.gamma=0.3"),
                                  ("sft_entropy", "sft.gamma=0.3", "training.entropy=sampled")):
            trainer = make_trainer(setup, f"training.micro_batch_tokens={tokens}", *overrides,
                                   folder=f"{tokens}-{overrides}")
            seen, settings = watch(trainer), trainer.settings
            take_first_step(trainer)
            assert (seen.micro_batches[0] > 1) == (tokens == 60)
            trainer.load_weights(seen.weights[0])
            losses, entropies = [], []
            for problem in trainer.parts.train:
                completion = trainer.policy.encode_completion(problem.solution)
                assert completion[-1] == trainer.policy.eos_id
                scores, all_words = plain_scores(
                    trainer.policy.model, trainer.policy.encode_prompt(problem.question),
                    completion)
                losses.append(-scores)
                entropies.append(all_words if settings.training.entropy == "vocabulary"
                                 else -scores.exp() * scores)
            loss = plain_mean(losses, settings.sft.loss_normalization)
            row = rows_of(trainer)[0]
            assert row["loss/sft"] == pytest.approx(loss.item(), rel=1e-5)
            assert row["tokens"] == sum(map(len, losses))
            gamma = settings.sft.gamma if setup == "sft_entropy" else 0.0
            loss = loss - gamma * plain_mean(entropies, settings.sft.loss_normalization)
            apart = distance(seen.gradients[0], gradient(trainer, loss))
            if apart >= 1e-5:
                wrong.append((setup, overrides, tokens, apart))
    assert not wrong


def test_the_recorded_entropy_is_a_mean_over_tokens(make_trainer):
    """Nats per token, divided once: not again by completions or by micro-batches."""
    rows = []
    for tokens in (60, 4096):
        trainer = make_trainer("sft", f"training.micro_batch_tokens={tokens}",
                               folder=f"run-{tokens}")
        seen = watch(trainer)
        take_first_step(trainer)
        rows.append(rows_of(trainer)[0]["entropy"])
    trainer.load_weights(seen.weights[0])
    with torch.no_grad():
        exact = torch.cat([plain_scores(trainer.policy.model,
                                        trainer.policy.encode_prompt(p.question),
                                        trainer.policy.encode_completion(p.solution))[1]
                           for p in trainer.parts.train]).mean()
    assert rows == pytest.approx([exact.item()] * 2, rel=1e-5)


# Micro-batches ------------------------------------------------------------------------------------


BUDGETS = {}  # setup -> training.micro_batch_tokens that give 1, 2, 4 micro-batches


def micro_batch_gradients(make_trainer, setup, overrides, wanted=(1, 2, 4)):
    """First gradients of the same step in 1, 2, and 4 micro-batches."""
    found, budgets = {}, {}
    for tokens in BUDGETS.get(setup, (100_000, 600, 500, *range(420, 100, -20))):
        trainer = make_trainer(setup, f"training.micro_batch_tokens={tokens}", *overrides,
                               folder=f"{setup}-{tokens}-{overrides}")
        seen = watch(trainer)
        take_first_step(trainer)
        found[seen.micro_batches[0]] = seen.gradients[0]
        budgets[seen.micro_batches[0]] = tokens
        if set(wanted) <= set(found):
            break
    assert set(wanted) <= set(found), f"found only {sorted(found)} micro-batches"
    BUDGETS[setup] = [budgets[count] for count in wanted]
    return [found[count] for count in wanted]


def test_one_two_or_four_micro_batches_give_the_same_gradient(make_trainer):
    """The normalizer is taken over the whole optimizer step, before accumulation.

    A mean of means of micro-batches is the bug that made the field's SFT baselines too weak.
    """
    wrong = []
    for setup, *overrides in (
            *[("rl", f"rl.loss_normalization={name}") for name in NORMALIZATIONS],
            ("rl_entropy",), ("rl_entropy", "rl.kl_anchor=reference"),
            ("sft",), ("sft", "sft.loss_normalization=sequence_mean"), ("sft_entropy",)):
        one, two, four = micro_batch_gradients(
            make_trainer, setup, ("rl.updates_per_rollout=1", *overrides))
        if distance(two, one) >= 1e-5 or distance(four, one) >= 1e-5:
            wrong.append((setup, overrides))
    assert not wrong


def test_logit_chunks_do_not_change_the_gradient(make_trainer):
    """training.logit_chunk_tokens changes memory and nothing else."""
    for setup in ("sft_entropy", "rl_entropy"):
        gradients = []
        for chunk in (7, 4096):
            trainer = make_trainer(setup, f"training.logit_chunk_tokens={chunk}",
                                   folder=f"{setup}-{chunk}")
            seen = watch(trainer)
            take_first_step(trainer)
            gradients.append(seen.gradients[0])
        assert distance(*gradients) < 1e-5, setup


# No signal, no gradient ---------------------------------------------------------------------------


def test_equal_rewards_give_no_policy_gradient(make_trainer):
    """All right or all wrong: with beta 0 and gamma 0 nothing moves, exactly."""
    for reward in (0, 1):
        for scale in ("group_std", "none"):
            trainer = make_trainer("rl", "rl.beta=0", f"rl.advantage_scale={scale}",
                                   verifier=Fixed([reward]), folder=f"{reward}-{scale}")
            before = flat(trainer)
            trainer.train()
            assert torch.equal(before, flat(trainer))
            row = rows_of(trainer)[0]
            assert row["frac_reward_zero_std"] == 1 and row["grad_norm"] == 0 == row["loss/rl"]
            assert row["reward"] == reward


def test_skipping_groups_without_signal_changes_no_gradient(make_trainer, monkeypatch):
    """Three of eight groups have no signal; skipped or computed, both updates are the same.

    What is skipped still counts in every normalizer.
    """
    rewards = [0, 0, 0, 0] + [1, 0, 0, 1] * 2 + [1, 1, 1, 1] + [0, 1, 0, 0] * 3 + [0, 0, 0, 0]
    for overrides in (("rl.beta=0",), ("rl.beta=0.5",), ("rl.beta=0.5", "rl.kl_anchor=reference"),
                      ("rl.beta=0", "rl.loss_normalization=token_mean"),
                      ("rl.beta=0", "rl.loss_normalization=constant")):
        runs = []
        for skip in (True, False):
            trainer = make_trainer("rl", *overrides, verifier=Fixed(rewards),
                                   folder=f"{skip}-{overrides}")
            seen = watch(trainer)
            if not skip:
                monkeypatch.setattr(trainer.learner, "has_gradient", lambda update: torch.ones(
                    len(update.sequences), dtype=torch.bool))
            take_first_step(trainer)
            runs.append((seen, rows_of(trainer)[0]))
        (one, one_row), (two, two_row) = runs
        for mine, theirs in zip(one.gradients, two.gradients, strict=True):
            assert distance(mine, theirs) < 1e-4, overrides
        assert one_row["loss/rl"] == pytest.approx(two_row["loss/rl"], abs=1e-6)
        assert one_row["clip_ratio"] == pytest.approx(two_row["clip_ratio"], abs=1e-6)


def test_a_policy_at_its_reference_has_no_kl(make_trainer):
    """pi = pi_reference = pi_old and equal rewards: the KL of either anchor is 0, gradient 0."""
    for anchor in ("old", "reference"):
        trainer = make_trainer("rl", "rl.beta=100", f"rl.kl_anchor={anchor}",
                               "rl.updates_per_rollout=1", verifier=Fixed([1]),
                               folder=f"run-{anchor}")
        seen = watch(trainer)
        take_first_step(trainer)
        row = rows_of(trainer)[0]
        assert row["kl/reference"] == pytest.approx(0, abs=1e-9) and row["grad_norm"] < 1e-4
        assert all(gradient.abs().max() < 1e-4 for gradient in seen.gradients)


def test_the_reference_is_the_base_model_in_every_stage(make_trainer, make_policy, monkeypatch):
    """Also after SFT: with an adapter, the model without it; otherwise a copy from the start."""
    for adapter in ("none", "lora"):
        taken = watch_rollouts(monkeypatch)
        trainer = make_trainer("sft_then_rl", "sft.learning_rate=0.01", "rl.kl_anchor=reference",
                               policy=make_policy(adapter=adapter), folder=adapter)
        seen = watch(trainer)
        trainer.train()
        row = rows_of(trainer)[1]
        trainer.load_weights(seen.weights[1])
        now = torch.cat(all_scores(trainer, taken[0]))
        trainer.load_weights(seen.weights[0])
        away = torch.cat(all_scores(trainer, taken[0])) - now
        assert row["stage"] == "rl" and row["kl/reference"] > 0.001
        assert row["kl/reference"] == pytest.approx((away.exp() - away - 1).mean().item(),
                                                    rel=1e-3)


def test_the_entropy_term_acts_where_there_is_no_signal(make_trainer):
    """A group without signal is not skipped when the loss has an entropy term."""
    trainer = make_trainer("rl_entropy", "rl.gamma=0.3", verifier=Fixed([0]))
    take_first_step(trainer)
    assert rows_of(trainer)[0]["grad_norm"] > 0.01


def test_the_entropy_term_raises_the_entropy(make_trainer):
    """-gamma H in the loss, not +: with nothing but the term, the entropy rises."""
    for setup in ("sft_entropy", "rl_entropy"):
        rows = rows_of(trained(
            make_trainer, setup, "rl.gamma=1", "sft.gamma=1000", "rl.learning_rate=0.01",
            "sft.learning_rate=0.01", "training.epochs=6", verifier=Fixed([0]), folder=setup))
        assert rows[-1]["entropy"] > rows[0]["entropy"] + 0.1, setup


# What is recorded ---------------------------------------------------------------------------------


def test_metrics_of_rollouts_are_what_was_sampled(make_trainer, monkeypatch):
    """Reward, deviation, groups by right answers, lengths, truncated share, and tokens."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("rl")
    trainer.train()
    row, groups = rows_of(trainer)[0], taken[0]
    rewards = coin_rewards(trainer, problems_of(trainer, groups), groups)
    completions = [c for g in groups for c in g.completions]
    lengths = [len(c.token_ids) for c in completions]
    entropies = [h for c in completions for h in c.entropies]
    right = rewards.sum(1).int().tolist()
    assert row["reward"] == pytest.approx(rewards.mean().item())
    assert row["reward_std"] == pytest.approx(rewards.std(dim=1).mean().item())
    assert row["frac_reward_zero_std"] == sum(n in (0, 4) for n in right) / 8
    assert row["groups/correct_counts"] == [right.count(n) for n in range(5)]
    assert row["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert row["completions/clipped_ratio"] == sum(not c.finished for c in completions) / 32
    assert row["entropy"] == pytest.approx(sum(entropies) / len(entropies))
    assert row["tokens"] == sum(lengths)


def test_recorded_divergences_are_means_over_tokens(make_trainer, monkeypatch):
    """kl/old over both mini-batches (0 in the first), kl/reference from the policy's samples."""
    for beta in (0.0, 0.02):
        taken = watch_rollouts(monkeypatch)
        trainer = make_trainer("rl", f"rl.beta={beta}", "rl.learning_rate=0.02",
                               folder=f"run-{beta}")
        seen = watch(trainer)
        trainer.train()
        rows = rows_of(trainer)
        groups = taken[0]
        rewards = coin_rewards(trainer, problems_of(trainer, groups), groups)
        scores = []
        for index in (0, 1, 2):
            trainer.load_weights(seen.weights[index])
            scores.append([torch.cat(all_scores(trainer, [group])) for group in groups])
        log_rho = [scores[1][i] - scores[0][i] for i in range(8)]
        per_group = [(r.exp() * r - r.exp() + 1) * (i % 2) for i, r in enumerate(log_rho)]
        # Without beta the second mini-batch skips groups without signal.
        counted = [i for i in range(8) if i % 2 == 0 or beta or 0 < rewards[i].sum() < 4]
        assert beta or len(counted) < 8, "one group of the second mini-batch has no signal"
        assert rows[0]["kl/old"] == pytest.approx(
            torch.cat([per_group[i] for i in counted]).mean().item(), rel=1e-3)
        assert rows[0]["kl/reference"] == pytest.approx(0, abs=1e-6)
        trainer.load_weights(seen.weights[2])
        now = torch.cat(all_scores(trainer, taken[1]))
        trainer.load_weights(seen.weights[0])
        away = torch.cat(all_scores(trainer, taken[1])) - now
        assert rows[1]["kl/reference"] == pytest.approx((away.exp() - away - 1).mean().item(),
                                                        rel=1e-3)


def test_two_stages_keep_one_log(make_trainer):
    """sft_then_rl: half of the epochs each, fresh optimizer, new warm-up, epochs that add up."""
    trainer = make_trainer("sft_then_rl", "training.epochs=4", "training.warmup_steps=2",
                           "sft.learning_rate=0.001", "rl.learning_rate=0.0005",
                           "training.final_learning_rate_fraction=0.1")
    optimizers, new = [], trainer.learner.new_optimizer
    trainer.learner.new_optimizer = lambda: (new(), optimizers.append(trainer.learner.optimizer))
    trainer.train()
    rows = rows_of(trainer)
    assert [row["stage"] for row in rows] == ["sft", "sft", "rl", "rl"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [(row["lambda/sft"], row["lambda/rl"]) for row in rows] == [(1, 0)] * 2 + [(0, 1)] * 2
    assert [row["learning_rate"] for row in rows] == pytest.approx(
        [0.001 / 2, 0.001 * 0.55, 0.0005 / 2, 0.0005 * 0.55])
    assert len(optimizers) == 2 and optimizers[0] is not optimizers[1]
    tokens = [row["tokens"] for row in rows]
    assert tokens == sorted(tokens) and tokens[1] == 2 * tokens[0]


def test_every_problem_is_seen_once_per_epoch_in_its_own_order(make_trainer, monkeypatch):
    """10 epochs are 10 passes: a smaller last batch is taken, and orders differ."""
    trainer = make_trainer("sft", "sft.batch_size=3", "training.epochs=2")
    seen = []
    monkeypatch.setattr(trainer.policy, "encode_completion", lambda text, encode=(
        trainer.policy.encode_completion): (seen.append(text), encode(text))[1])
    trainer.train()
    solutions = [p.solution for p in trainer.parts.train]
    assert len(rows_of(trainer)) == 6
    assert sorted(seen[:8]) == sorted(seen[8:]) == sorted(solutions)
    assert seen[:8] != seen[8:]


def test_a_last_batch_smaller_than_its_mini_batches(make_trainer):
    """Nine problems in batches of eight: the ninth makes one update, not an error."""
    limits = ("data.train_limits=[5,4]",)
    trainer = make_trainer("rl", *limits, "rl.updates_per_rollout=4")
    trainer.train()
    rows = rows_of(trainer)
    assert len(trainer.parts.train) == 9 and [len(rows), rows[1]["updates"] <= 1] == [4, True]


def test_probe_and_validation_are_measured_when_they_should(make_trainer, policy):
    """The probe before training, every few steps and at the end; validation every epoch."""
    validation = parts_of(small_settings().data).validation
    trainer = make_trainer("sft_then_rl", "training.epochs=4", "probe.every=3", policy=policy,
                           validation=validation)
    trainer.train()
    probe = trainer.folder.lines("probe.jsonl")
    assert [row["step"] for row in probe] == [0, 3, 4]
    assert probe[0]["kl/base"] == pytest.approx(0, abs=1e-9) and probe[-1]["kl/base"] > 0
    assert all(len(row["groups/correct_counts"]) == 3 for row in probe)
    rows = trainer.folder.lines("validation.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    with torch.no_grad():
        exact = torch.cat([plain_scores(policy.model, policy.encode_prompt(p.question),
                                        policy.encode_completion(p.solution))[0]
                           for p in validation]).mean()
    assert rows[-1]["loss"] == pytest.approx(-exact.item(), rel=1e-5)


def test_the_best_weights_are_those_of_the_best_validation(make_trainer, monkeypatch):
    """The first best wins; the last weights can be restored."""
    scores = iter([0.25, 0.5, 0.5, 0.25])
    monkeypatch.setattr(measuring, "accuracy", lambda rows: next(scores))
    trainer = make_trainer("sft", "training.epochs=4",
                           validation=parts_of(small_settings().data).validation)
    seen = watch(trainer)
    trainer.train()
    assert trainer.best == {"strict": 0.5, "step": 2}
    last = snapshot(trainer)
    assert trainer.use_best_weights()
    assert torch.equal(flat(trainer), flat(seen.weights[2]))
    trainer.load_weights(last)
    assert torch.equal(flat(trainer), flat(last))


def test_random_numbers_of_a_step_come_from_seed_purpose_and_step(make_trainer):
    """Draws, dynamic sampling, and prefixes: equal in a repeated run and in every process, and
    different for another seed, another purpose, and another step."""
    stage = make_trainer("rl").method.stages[0]

    def draw(seed, purpose, taken):
        return Progress(stage, 0, 10, taken=taken, seed=seed).random(purpose).random()

    cases = [(seed, purpose, taken) for seed in (0, 1) for purpose in ("one", "other")
             for taken in (0, 1)]
    assert [draw(*case) for case in cases] == [draw(*case) for case in cases]
    assert len({draw(*case) for case in cases}) == len(cases)


def test_every_step_and_every_seed_has_its_own_samples(make_trainer, monkeypatch):
    """Of the same policy and problems: nothing is learned here, since all answers are wrong."""
    taken = watch_rollouts(monkeypatch)
    for seed in (0, 0, 1):
        trained(make_trainer, "rl", "rl.beta=0", verifier=Fixed([0]), seed=seed,
                folder=f"run-{len(taken)}")
    one, two, again, _, other, _ = (
        {tuple(g.prompt_ids): [c.token_ids for c in g.completions] for g in groups}
        for groups in taken)
    assert set(one) == set(two) == set(other)
    assert one == again
    assert all(one[prompt] != two[prompt] != other[prompt] != one[prompt] for prompt in one)


# Both weights at once -----------------------------------------------------------------------------


class Mixed(Method):
    """A method that gives both losses a weight at every step."""

    def weights(self, progress):
        return Weights(0.25, 0.5)


def test_a_method_may_weigh_both_losses_in_one_step(make_trainer, monkeypatch):
    """L = lambda_SFT L_SFT + lambda_RL L_RL: each with its own normalizer and temperature."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("rl", "rl.updates_per_rollout=1", "rl.temperature=0.7")
    trainer.method = Mixed(trainer.method.setup, trainer.settings)
    seen = watch(trainer)
    take_first_step(trainer)
    trainer.load_weights(seen.weights[0])
    groups, settings = taken[0], trainer.settings
    rewards = coin_rewards(trainer, problems_of(trainer, groups), groups)
    old = all_scores(trainer, groups)
    loss = (0.25 * plain_sft(trainer, trainer.parts.train)
            + 0.5 * plain_grpo(trainer.policy, groups, rewards, old, old, settings))
    assert distance(seen.gradients[0], gradient(trainer, loss)) < 1e-5


# Clipping and gradients that are not finite -------------------------------------------------------


def test_the_gradient_is_clipped_to_its_norm(make_trainer):
    """training.gradient_clip bounds what the optimizer sees; the record shows the norm before."""
    trainer = make_trainer("sft", "training.gradient_clip=0.01")
    step, seen = torch.optim.AdamW.step, []

    def noted(optimizer, *arguments, **more):
        seen.append(math.sqrt(sum(float(p.grad.norm()) ** 2 for p in trainer.learner.parameters)))
        return step(optimizer, *arguments, **more)

    torch.optim.AdamW.step = noted
    try:
        trainer.train()
    finally:
        torch.optim.AdamW.step = step
    assert seen == pytest.approx([0.01] * len(seen), rel=1e-3)
    assert rows_of(trainer)[0]["grad_norm"] > 0.1


def poison(trainer, updates, whole_loss):
    """Makes the gradient of chosen updates infinite, or the loss itself NaN."""
    count, apply, score = [0], trainer.learner.accumulate, trainer.policy.score

    def poisoned(*arguments, **more):
        scores, entropies = score(*arguments, **more)
        if count[0] in updates and scores.requires_grad:
            if whole_loss:
                return scores * float("nan"), entropies * float("nan")
            scores.register_hook(lambda gradient: gradient * float("inf"))
        return scores, entropies

    def counted(*arguments):
        count[0] += 1
        return apply(*arguments)

    trainer.learner.accumulate, trainer.policy.score = counted, poisoned


def test_a_gradient_that_is_not_finite_skips_the_update(make_trainer):
    """One bad update leaves the weights and Adam's moments as they were, and the run continues."""
    for setup in ("sft", "rl"):
        for whole_loss in (False, True):
            trainer = make_trainer(setup, "training.epochs=4", "rl.updates_per_rollout=1",
                                   folder=f"{setup}-{whole_loss}")
            poison(trainer, {2}, whole_loss)
            seen = watch(trainer)
            trainer.train()
            weights = [flat(one) for one in seen.weights]
            assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3])
            assert flat(trainer).isfinite().all()
            rows = rows_of(trainer)
            assert [row["updates"] for row in rows] == [1, 0, 1, 1]
            assert [row.get("updates_not_finite") for row in rows] == [None, 1, None, None]
            assert [row.get("grad_norm", 0) > 0 for row in rows] == [True, False, True, True]


def test_gradients_that_stay_non_finite_stop_the_run(make_trainer):
    """After five in a row, with the step and its problems; the count restarts after a good one."""
    for whole_loss in (False, True):
        trainer = make_trainer("sft", "training.epochs=10", folder=str(whole_loss))
        poison(trainer, set(range(3, 20)), whole_loss)
        with pytest.raises(UserError, match="step 7 .*sft.*tiny") as caught:
            trainer.train()
        assert "\n" not in str(caught.value)
        assert len(rows_of(trainer)) == 6, "two good steps, four skipped, the end"
    trainer = make_trainer("sft", "training.epochs=12", folder="four")
    poison(trainer, {2, 3, 4, 5, 7, 8, 9, 10}, whole_loss=False)
    trainer.train()
    assert len(rows_of(trainer)) == 12


def test_non_finite_updates_are_counted_per_optimizer(make_trainer):
    """Good updates of RL must not hide that every SFT update is skipped."""
    trainer = make_trainer("relift", "relift.batch_size=2", "training.epochs=40",
                           verifier=Fixed([0, 0, 0, 0, 1, 0, 0, 1]))
    score, apply = trainer.policy.score, trainer.learner.accumulate

    def only_sft(update, *more):
        trainer.policy.score = (lambda *a, **b: tuple(
            one * float("nan") for one in score(*a, **b))) if update.optimizer == "sft" else score
        try:
            return apply(update, *more)
        finally:
            trainer.policy.score = score

    trainer.learner.accumulate = only_sft
    with pytest.raises(UserError, match="5 updates"):
        trainer.train()
    assert len(rows_of(trainer)) == 4


def test_a_problem_the_model_always_or_never_solves_is_kept(make_trainer):
    """Problems may have the same question; rollouts are matched by position, not by text."""
    twins = tuple(Problem(id=f"twin/{i}", question="How many?", solution=r"\boxed{3}.", answer="3",
                          benchmark="tiny_word") for i in range(8))
    trainer = make_trainer("rl", train=twins)
    trainer.train()
    assert all(row["updates"] == 2 for row in rows_of(trainer))


def test_the_moments_of_a_stage_that_is_over_are_freed(make_trainer):
    """They take twice the weights' memory: SFT's AdamW is gone when RL has its own."""
    learner = make_trainer("sft_then_rl").learner
    learner.new_optimizer()
    before = weakref.ref(learner.optimizer.optimizer)
    learner.optimizers.clear()  # as at the end of a stage
    learner.new_optimizer()
    gc.collect()
    assert before() is None


def test_a_demonstration_that_is_left_out_counts_as_no_answer(make_trainer):
    """LUFFY skips one whose group is all right; the clip ratio is over answers only."""
    trainer = make_trainer("luffy", "rl.beta=0", "rl.updates_per_rollout=1",
                           verifier=Fixed([1] * 4 + [1, 0, 0, 1]))
    counts, answers, learner = [], [], trainer.learner
    accumulate = learner.accumulate

    def noted(update, totals):
        found = accumulate(update, totals)
        counts.append(totals.counts["clip_ratio"])
        answers.append(sum(len(s.completion) for s, rl in zip(
            update.sequences, update.rl.tolist(), strict=True) if rl))
        return found

    learner.accumulate = noted
    trainer.train()
    assert counts and counts == answers


def test_the_entropy_of_answers_stays_where_none_is_learned_from(make_trainer):
    """Dynamic sampling may leave no group: the step's entropy is still that of what was sampled."""
    trainer = make_trainer("combined", "rl.dynamic_sampling_rounds=2", verifier=Fixed([0]))
    learn, sampled = trainer.method.learn, []
    trainer.method.learn = lambda step, *rest: sampled.append(step.row["entropy"]) or learn(
        step, *rest)
    trainer.train()
    rows = rows_of(trainer)
    assert rows and all("loss/sft" in row and "loss/rl" not in row for row in rows)
    assert [row["entropy"] for row in rows] == sampled

"""`uft`: answers continue hints; how long these are, who sees them, what their tokens cost."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_training import (
    Coin,
    Fixed,
    distance,
    first_batch,
    first_progress,
    give_verifier,
    not_refused,
    rows_of,
    same_ends,
    trained,
    watch,
    watch_rollouts,
)
from textbook import all_scores, gradient, plain_mean, plain_rl, plain_scores

from hybridrl_lib.learning.judging import with_hint
from hybridrl_lib.learning.progress import Progress
from hybridrl_lib.policy.completions import Completion, Group
from hybridrl_lib.rewards.verifier import Verifier
from hybridrl_lib.training import judge

REWARDS = [0, 0, 0, 0] * 2 + [1, 0, 0, 1] * 6
ONE_UPDATE = ("rl.updates_per_rollout=1", "rl.beta=0")
ALWAYS = ("uft.high=1", "uft.low=1", "uft.hinted=1")  # the whole demonstration


class Ear(Coin):
    """A coin that remembers the texts it was asked about."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def verify(self, golds, texts, finished):
        self.texts.append(list(texts))
        return super().verify(golds, texts, finished)


def solution_ids(trainer, problem):
    return trainer.policy.encode_completion(problem.solution)[:-1]


def test_answers_continue_the_hint_and_are_judged_with_it(make_trainer, monkeypatch):
    """The hint's tokens are not part of the answer; the verifier reads both as one text."""
    taken, ear = watch_rollouts(monkeypatch), Ear()
    trainer = make_trainer("uft", *ONE_UPDATE, "uft.high=0.5", "training.samples_every=1",
                           verifier=ear)
    trainer.train()
    policy, fractions, place = trainer.policy, [], 0
    for group, problem in zip(taken[0], first_batch(trainer), strict=True):
        prompt = policy.encode_prompt(problem.question)
        hint = group.prompt_ids[len(prompt):]
        assert group.prompt_ids == prompt + solution_ids(trainer, problem)[:len(hint)]
        fractions.append(len(hint) / len(solution_ids(trainer, problem)))
        for completion in group.completions:
            assert ear.texts[0][place] == policy.decode(hint + completion.token_ids)
            assert ear.texts[0][place].startswith(policy.decode(hint))
            assert len(completion.token_ids) <= 12
            place += 1
    assert min(fractions) < 0.3 < 0.5 < max(fractions)  # not all alike
    row = rows_of(trainer)[0]
    sampled = sum(len(c.token_ids) for g in taken[0] for c in g.completions)
    assert trainer.tokens["rollouts"] == sampled and row["uft/p"] == 0.5
    assert trainer.folder.lines("samples.jsonl")[0]["completion"] == ear.texts[0][0]


def test_a_character_may_begin_in_the_hint_and_end_in_the_answer():
    """As with tokens that are bytes: decoded apart, each half would be a replacement character."""
    policy = SimpleNamespace(decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    ids = list("So \\boxed{é}".encode())
    rest = Completion(ids[-2:], [], [], True, policy.decode(ids[-2:]))
    judged = with_hint(policy, Group([1], [rest]), ids[:-2])
    assert judged.completions == [replace(rest, text="So \\boxed{é}")]
    assert policy.decode(ids[:-2]) + rest.text != "So \\boxed{é}"


def test_the_verifier_reads_hint_and_answer_as_one(make_trainer, monkeypatch):
    """The hint is the solution without its last token, the answer is that token: the real verdict
    is right, and for the answer alone it would be wrong."""
    trainer = make_trainer("uft", *ONE_UPDATE, *ALWAYS)
    method, policy = trainer.method, trainer.policy
    whole = method.hints
    method.hints = lambda problems, progress: [h[:-1] for h in whole(problems, progress)]

    def ends(policy, prompts, **_):
        rest = [[solution_ids(trainer, p)[-1], policy.eos_id] for p in first_batch(trainer)]
        return [Group(list(prompt), [Completion(ids, [0.0] * 2, [0.0] * 2, True,
                                                policy.decode(ids))] * 4)
                for prompt, ids in zip(prompts, rest, strict=True)]

    monkeypatch.setattr(judge, "sample", ends)
    row = {}
    with Verifier() as verifier:
        give_verifier(trainer, verifier)
        rollouts = trainer.judge.roll_out(first_batch(trainer), first_progress(trainer), row)
        alone = verifier.verify([p.answer for p in first_batch(trainer)],
                                [r.group.completions[0].text for r in rollouts], [True] * 8)
    assert row["reward"] == 1 and not any(verdict.strict for verdict in alone)
    assert all(rollout.solved == 1 for rollout in rollouts)
    assert rollouts[0].sequences[0].completion == [solution_ids(trainer, first_batch(trainer)[0])
                                                   [-1], policy.eos_id]


def test_a_step_follows_the_formula(make_trainer, monkeypatch):
    """L_GRPO of answers, given prompt and hint, and a little NLL of hints, given the prompt."""
    for coefficient in (0.001, 0.5):
        taken = watch_rollouts(monkeypatch)
        trainer = make_trainer(
            "uft", *ONE_UPDATE, "uft.high=0.5", f"uft.sft_coefficient={coefficient}",
            verifier=Fixed(REWARDS), folder=str(coefficient))
        seen = watch(trainer)
        trainer.train()
        trainer.load_weights(seen.weights[0])
        groups, policy, terms = taken[0], trainer.policy, []
        for group, problem in zip(groups, first_batch(trainer), strict=True):
            prompt = policy.encode_prompt(problem.question)
            hint = group.prompt_ids[len(prompt):]
            if hint:
                terms.append(-plain_scores(policy.model, prompt, hint)[0])
        loss = (plain_rl(trainer, groups, [REWARDS[4 * i:4 * i + 4] for i in range(8)])
                + coefficient * plain_mean(terms, "token_mean"))
        assert distance(seen.gradients[0], gradient(trainer, loss)) < 2e-5, coefficient
        row = rows_of(trainer)[0]
        assert row["loss/sft"] == pytest.approx(plain_mean(terms, "token_mean").item(), rel=1e-4)
        assert row["uft/hint_length"] == sum(map(len, terms)) / 8
        assert row["uft/hinted"] == len(terms) / 8


def test_both_updates_of_a_step_follow_the_formula(make_trainer, monkeypatch):
    """Each update has the hints of its own problems; in the second the policy has moved."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("uft", "rl.beta=0", "uft.high=0.5", "uft.sft_coefficient=0.5",
                           "rl.learning_rate=0.01", verifier=Fixed(REWARDS))
    seen = watch(trainer)
    trainer.train()
    groups, policy, batch = taken[0], trainer.policy, first_batch(trainer)
    trainer.load_weights(seen.weights[0])
    old = all_scores(trainer, groups)
    for i in range(2):
        mine, terms = range(i, 8, 2), []
        trainer.load_weights(seen.weights[i])
        for j in mine:
            prompt = policy.encode_prompt(batch[j].question)
            hint = groups[j].prompt_ids[len(prompt):]
            if hint:
                terms.append(-plain_scores(policy.model, prompt, hint)[0])
        assert len({len(term) for term in terms}) > 1  # a wrong hint would show
        loss = plain_rl(trainer, [groups[j] for j in mine],
                        [REWARDS[4 * j:4 * j + 4] for j in mine],
                        [old[4 * j + k] for j in mine for k in range(4)])
        loss = loss + 0.5 * plain_mean(terms, "token_mean")
        assert distance(seen.gradients[i], gradient(trainer, loss)) < 2e-4
    assert rows_of(trainer)[0]["clip_ratio"] > 0


def test_hints_fade_along_a_cosine(make_trainer):
    """20 steps, 12 of them with hints: from 0.95 toward 0.05, then none."""
    rows = rows_of(trained(make_trainer, "uft", "training.epochs=40", verifier=Coin()))
    expected = [0.05 + 0.45 * (1 + math.cos(math.pi * t / 12)) for t in range(12)] + [0] * 8
    assert [row["uft/p"] for row in rows] == pytest.approx(expected)
    assert rows[0]["uft/hint_length"] > 20 > 5 > rows[11]["uft/hint_length"]
    assert all(row["uft/hint_length"] == 0 for row in rows[12:])


def test_the_length_is_binomial(make_trainer):
    """Share of chunks shown, over 800 draws; its deviation is that of n = 5."""
    for p in (0.2, 0.7):
        trainer = make_trainer("uft", f"uft.high={p}", f"uft.low={p}", "uft.hinted=1")
        method, shares = trainer.method, []
        for step in range(100):
            progress = Progress(method.stages[0], 0, 10, taken=step, seed=0)
            hints = method.hints(list(trainer.parts.train), progress)
            shares += [len(hint) / len(solution_ids(trainer, problem))
                       for hint, problem in zip(hints, trainer.parts.train, strict=True)]
        shares = torch.tensor(shares)
        assert float(shares.mean()) == pytest.approx(p, abs=0.03)
        assert float(shares.std()) == pytest.approx((p * (1 - p) / 5) ** 0.5, abs=0.02)
        assert len({round(float(share) * 5) for share in shares}) == 6
        again = method.hints(list(trainer.parts.train), progress)
        assert again == hints  # of a step, the same in every process


def test_prompt_and_hint_stay_within_the_cap(make_trainer):
    """data.max_prompt_tokens holds for both together."""
    trainer = make_trainer("uft", *ALWAYS)
    method, policy, problems = trainer.method, trainer.policy, list(trainer.parts.train)
    longest = max(len(policy.encode_prompt(p.question)) for p in problems)
    cap = longest + 2
    method.settings = replace(method.settings, data=replace(method.settings.data,
                                                            max_prompt_tokens=cap))
    hints = method.hints(problems, first_progress(trainer))
    for problem, hint in zip(problems, hints, strict=True):
        room = cap - len(policy.encode_prompt(problem.question))
        assert hint == solution_ids(trainer, problem)[:room] and len(hint) >= 2


def test_without_hints_it_is_rl_bit_for_bit(make_trainer):
    """uft.hinted=0."""
    assert same_ends(make_trainer, ("uft", "training.epochs=4", "uft.hinted=0"),
                     ("rl", "training.epochs=2", "rl.kl_anchor=reference"))


def test_wrong_settings_name_the_key():
    """p rises nowhere; there is at least one chunk."""
    assert not not_refused("uft", {f"uft.{name}={value}": f"uft.{name}" for name, value in (
        ("low", 0.96), ("chunks", 0), ("hinted", 2))})

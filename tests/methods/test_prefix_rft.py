"""`prefix_rft`: the hybrid answer, its place in the group, and which of its tokens learn."""

import math

import pytest
import torch
from small_training import (
    Coin,
    Fixed,
    distance,
    first_batch,
    not_refused,
    rows_of,
    watch,
    watch_rollouts,
)
from textbook import gradient, plain_scores

from hybridrl_lib.methods import prefix_rft

MIXED = [0, 0, 0, 0] * 3 + [1, 0, 0, 1] * 4 + [1, 1, 1, 1]
HYBRIDS = [1, 1, 0, 0, 1, 1, 0, 1]
LONG = ("rl.max_new_tokens=40",)


def watch_hybrids(trainer):
    """A list that collects the hybrids of every step."""
    taken, sample = [], trainer.method._sample

    def noted(step):
        taken.append(sample(step))
        return taken[-1]

    trainer.method._sample = noted
    return taken


def plain_prefix_rft(trainer, groups, hybrids, rewards, old=None, share=0.2):
    """The loss one completion at a time. `old`: log pi_old of each completion, hybrids first."""
    rl, model, losses, place = trainer.settings.rl, trainer.policy.model, [], 0

    def surrogate(now, before, advantage):
        ratio = (now - before).exp()
        return -torch.min(ratio * advantage,
                          ratio.clamp(1 - rl.epsilon_low, 1 + rl.epsilon_high) * advantage)

    gains = []
    for hybrid, reward in zip(hybrids, rewards, strict=True):
        joint = torch.tensor([*map(float, reward), hybrid.reward])
        gains.append((joint - joint.mean()) / (joint.std() + 1e-4))
    for hybrid, gain in zip(hybrids, gains, strict=True):
        now, entropies = plain_scores(model, hybrid.sequence.prompt, hybrid.sequence.completion)
        before = now.detach() if old is None else old[place]
        most = sorted(range(hybrid.prefix), key=lambda t: -float(entropies[t].detach()))
        learned = set(most[:math.ceil(share * hybrid.prefix)]) | set(range(hybrid.prefix, len(now)))
        loss = surrogate(now, before, gain[-1])
        losses.append(torch.stack([loss[t] for t in sorted(learned)]).sum() / len(loss))
        place += 1
    for group, gain in zip(groups, gains, strict=True):
        for completion, advantage in zip(group.completions, gain, strict=False):
            now = plain_scores(model, group.prompt_ids, completion.token_ids)[0]
            before = now.detach() if old is None else old[place]
            losses.append(surrogate(now, before, advantage).mean())
            place += 1
    return sum(losses) / len(losses)


def test_both_updates_of_a_step_follow_the_formula(make_trainer, monkeypatch):
    """In the second the policy has moved: the ratio of prefix and answer is to the one before."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("prefix_rft", *LONG, "rl.learning_rate=0.01",
                           verifier=Fixed(MIXED + HYBRIDS))
    hybrids, seen = watch_hybrids(trainer), watch(trainer)
    trainer.train()
    groups, hybrids = taken[0], hybrids[0]
    rewards = [MIXED[4 * i:4 * i + 4] for i in range(8)]
    assert [hybrid.reward for hybrid in hybrids] == HYBRIDS
    trainer.load_weights(seen.weights[0])
    loss = plain_prefix_rft(trainer, groups[::2], hybrids[::2], rewards[::2])
    assert distance(seen.gradients[0], gradient(trainer, loss)) < 2e-5
    with torch.no_grad():
        model = trainer.policy.model
        old = [plain_scores(model, h.sequence.prompt, h.sequence.completion)[0]
               for h in hybrids[1::2]]
        old += [plain_scores(model, g.prompt_ids, c.token_ids)[0]
                for g in groups[1::2] for c in g.completions]
    trainer.load_weights(seen.weights[1])
    loss = plain_prefix_rft(trainer, groups[1::2], hybrids[1::2], rewards[1::2], old)
    assert distance(seen.gradients[1], gradient(trainer, loss)) < 2e-4
    row = rows_of(trainer)[0]
    assert row["prefix_rft/hybrid_reward"] == sum(HYBRIDS) / 8
    assert row["prefix_rft/prefix_length"] == sum(h.prefix for h in hybrids) / 8


def test_a_frozen_prefix_and_a_whole_one(make_trainer, monkeypatch):
    """prefix_rft.token_share at its ends."""
    for share in (0, 1):
        taken = watch_rollouts(monkeypatch)
        trainer = make_trainer(
            "prefix_rft", *LONG, "rl.updates_per_rollout=1", f"prefix_rft.token_share={share}",
            verifier=Fixed(MIXED + HYBRIDS), folder=str(share))
        hybrids, seen = watch_hybrids(trainer), watch(trainer)
        trainer.train()
        trainer.load_weights(seen.weights[0])
        loss = plain_prefix_rft(trainer, taken[0], hybrids[0],
                                [MIXED[4 * i:4 * i + 4] for i in range(8)], share=share)
        assert distance(seen.gradients[0], gradient(trainer, loss)) < 2e-5, share


class Ear(Coin):
    """A coin that remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def verify(self, golds, texts, finished):
        self.asked.append((list(texts), list(finished)))
        return super().verify(golds, texts, finished)


def test_a_hybrid_begins_as_the_demonstration_and_keeps_to_the_cap(make_trainer):
    """A cap of 20 tokens truncates prefixes and answers, which are then not finished."""
    ear = Ear()
    trainer = make_trainer("prefix_rft", "rl.max_new_tokens=20", "training.epochs=12",
                           verifier=ear)
    taken, policy = watch_hybrids(trainer), trainer.policy
    trainer.train()
    order = first_batch(trainer)
    for hybrid, problem in zip(taken[0], order, strict=True):
        solution = policy.encode_completion(problem.solution)
        assert hybrid.sequence.prompt == policy.encode_prompt(problem.question)
        assert hybrid.sequence.completion[:hybrid.prefix] == solution[:hybrid.prefix]
        # at the first step the smallest share is the largest one
        assert hybrid.prefix == min(19, math.floor(0.95 * (len(solution) - 1)))
    for step, hybrids in enumerate(taken):
        texts, finished = ear.asked[2 * step + 1]
        for hybrid, text, ended in zip(hybrids, texts, finished, strict=True):
            ids = hybrid.sequence.completion
            assert hybrid.prefix < len(ids) <= 20 and text == policy.decode(ids)
            assert ended == (ids[-1] in policy.stop_ids)
    rows = rows_of(trainer)
    assert [row["prefix_rft/shortest"] for row in rows] == pytest.approx(
        [0.475 * (1 + math.cos(math.pi * t / 6)) for t in range(6)])
    assert trainer.tokens["demonstrations"] == sum(h.prefix for step in taken for h in step)


def test_every_step_and_every_seed_has_its_own_hybrids(make_trainer, monkeypatch):
    """Prefixes and their samples: equal in a repeated run, different elsewhere."""
    seeds, plain = [], prefix_rft.sample
    monkeypatch.setattr(prefix_rft, "sample", lambda *arguments, seed, **more: (
        seeds.append(seed) or plain(*arguments, seed=seed, **more)))
    found = []
    for number, seed in enumerate((0, 0, 1)):
        trainer = make_trainer("prefix_rft", "training.epochs=4", verifier=Fixed([0]), seed=seed,
                               folder=str(number))
        taken = watch_hybrids(trainer)
        trainer.train()
        found.append([[h.sequence.completion for h in step] for step in taken])
    assert len(set(seeds)) == 4 and seeds[:2] == seeds[2:4]  # two steps of two seeds
    assert found[0] == found[1] and found[0][0] != found[0][1] and found[0] != found[2]


def test_wrong_settings_name_the_key():
    """Bounds of both fractions."""
    assert not not_refused("prefix_rft", {
        "prefix_rft.longest=1": "prefix_rft.longest",
        "prefix_rft.token_share=2": "prefix_rft.token_share"})

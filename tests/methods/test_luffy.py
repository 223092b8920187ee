"""`luffy`: the joint advantage, the shaped ratio of the demonstration, one normalizer for all."""

from dataclasses import replace

import pytest
import torch
from small_training import (
    Fixed,
    distance,
    first_batch,
    give_verifier,
    not_refused,
    rows_of,
    watch,
    watch_rollouts,
)
from textbook import CAP, all_scores, gradient, plain_mean, plain_scores, problems_of

from hybridrl_lib.rewards.verifier import Verifier

UNSOLVED, HALF, SOLVED = [0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]
MIXED = UNSOLVED * 3 + HALF * 4 + SOLVED
ONE_UPDATE = ("rl.updates_per_rollout=1",)


class Judge(Fixed):
    """Fixed verdicts of the answers; a demonstration is right unless its problem is in `wrong`."""

    def __init__(self, rewards, problems, wrong=()):
        super().__init__(rewards)
        self.right = {p.solution: p.id not in wrong for p in problems}

    def verify(self, golds, texts, finished):
        if all(text in self.right for text in texts):
            assert all(finished)
            return Fixed([self.right[text] for text in texts]).verify(golds, texts, finished)
        return super().verify(golds, texts, finished)


def plain_luffy(trainer, groups, rewards, demonstrated, gamma=0.1, old=None):
    """The objective as the paper writes it, one completion at a time. `old`: log pi_old of every
    answer; without it rho is 1. The entropy term of `luffy_code` is over all tokens."""
    rl, policy, losses, spread, place = trainer.settings.rl, trainer.policy, [], [], 0
    bonus = rl.gamma if trainer.with_entropy else 0.0
    for group, problem, reward, shown in zip(groups, problems_of(trainer, groups), rewards,
                                             demonstrated, strict=True):
        joint = torch.tensor([*map(float, reward), float(shown)])
        gains = joint - joint.mean()
        if rl.advantage_scale == "group_std":
            gains = gains / (joint.std() + 1e-4)
        prompt = policy.encode_prompt(problem.question)
        scores, entropies = plain_scores(policy.model, prompt,
                                         policy.encode_completion(problem.solution))
        p = scores.exp()
        spread.append(entropies)
        losses.append(-p / (p + gamma) * gains[-1])
        for completion, gain in zip(group.completions, gains, strict=False):
            now, entropies = plain_scores(policy.model, group.prompt_ids, completion.token_ids)
            spread.append(entropies)
            rho = (now - (now.detach() if old is None else old[place])).exp()
            bounded = rho.clamp(1 - rl.epsilon_low, 1 + rl.epsilon_high) if rl.clip else rho
            losses.append(-torch.min(rho * gain, bounded * gain))
            place += 1
    bonus = bonus * plain_mean(spread, "token_mean")
    if rl.loss_normalization == "constant":
        return sum(loss.sum() for loss in losses) / (len(losses) * CAP) - bonus
    return sum(loss.mean() for loss in losses) / len(losses) - bonus


def mixed_run(make_trainer, setup, *overrides):
    """(trainer after its run and with its first weights, what `watch` saw, which of the first
    step's demonstrations are right): two are wrong, so that each kind of group is there."""
    trainer = make_trainer(setup, *overrides)
    order = first_batch(trainer)
    wrong = {order[1].id, order[4].id}
    give_verifier(trainer, Judge(MIXED, trainer.parts.train, wrong))
    seen = watch(trainer)
    trainer.train()
    trainer.load_weights(seen.weights[0])
    return trainer, seen, [problem.id not in wrong for problem in order]


@pytest.mark.parametrize("setup", ["luffy", "luffy_code"])
def test_a_step_follows_the_formula(make_trainer, monkeypatch, setup):
    """Two of the demonstrations are wrong, so that each kind of group is there."""
    taken = watch_rollouts(monkeypatch)
    trainer, seen, shown = mixed_run(make_trainer, setup, *ONE_UPDATE)
    loss = plain_luffy(trainer, taken[0], [MIXED[4 * i:4 * i + 4] for i in range(8)], shown)
    assert distance(seen.gradients[0], gradient(trainer, loss)) < 2e-5
    row = rows_of(trainer)[0]
    # no advantage: the problem with nothing right at all, and the one with everything right
    assert (row["luffy/demonstration_reward"], row["luffy/demonstrations"]) == (6 / 8, 6)
    assert trainer.settings.rl.clip == (setup == "luffy") and trainer.settings.rl.beta == 0


@pytest.mark.parametrize("setup", ["luffy", "luffy_code"])
def test_both_updates_of_a_step_follow_the_formula(make_trainer, monkeypatch, setup):
    """Each problem's demonstration keeps its own advantage where the batch is cut in two."""
    taken = watch_rollouts(monkeypatch)
    trainer, seen, shown = mixed_run(make_trainer, setup, "rl.learning_rate=0.01")
    old = all_scores(trainer, taken[0])
    for i in range(2):
        mine = range(i, 8, 2)
        trainer.load_weights(seen.weights[i])
        loss = plain_luffy(trainer, [taken[0][j] for j in mine],
                           [MIXED[4 * j:4 * j + 4] for j in mine],
                           [shown[j] for j in mine],
                           old=[old[4 * j + k] for j in mine for k in range(4)])
        assert distance(seen.gradients[i], gradient(trainer, loss)) < 2e-4
    row = rows_of(trainer)[0]
    assert row["kl/old"] > 1e-3 and (row["clip_ratio"] > 0) == (setup == "luffy")


def test_the_advantage_of_the_only_right_one_of_eight(make_trainer):
    """7 answers are wrong and the demonstration is right: the paper's group."""
    for scale, advantage in (("group_std", 2.4742), ("none", 0.875)):
        trainer = make_trainer("luffy", *ONE_UPDATE, "rl.group_size=7",
                               f"rl.advantage_scale={scale}", folder=scale)
        give_verifier(trainer, Judge([0], trainer.parts.train))
        trainer.train()
        assert rows_of(trainer)[0]["luffy/demonstration_advantage"] == pytest.approx(
            advantage, abs=1e-3)


def test_a_token_learns_most_where_its_probability_is_gamma(make_trainer):
    """The gradient with respect to log pi is A gamma pi / (pi + gamma)^2."""
    for gamma in (0.1, 0.3):
        trainer = make_trainer("luffy", f"luffy.gamma={gamma}", *ONE_UPDATE, folder=str(gamma))
        give_verifier(trainer, Judge([0], trainer.parts.train))
        kept, compose = [], trainer.method.compose
        trainer.method.compose = lambda step, kept=kept, compose=compose: (
            kept.extend(compose(step)) or kept)
        trainer.train()
        p = torch.linspace(0.001, 0.999, 999)
        scores = p.log().requires_grad_()
        kept[0].demonstration_loss(0, scores, torch.zeros_like(p)).sum().backward()
        gain = 4 / 5 / (torch.tensor([0, 0, 0, 0, 1.0]).std() + 1e-4)
        expected = -gain * gamma * p / (p + gamma) ** 2
        assert torch.allclose(scores.grad, expected, rtol=1e-4)
        assert float(p[scores.grad.abs().argmax()]) == pytest.approx(gamma, abs=0.002)


def test_groups_that_are_all_right_or_all_wrong_teach_nothing(make_trainer):
    """Demonstrations included: a wrong one must not be imitated for being a demonstration."""
    for right in (1, 0):
        trainer = make_trainer("luffy", *ONE_UPDATE, folder=str(right))
        problems = trainer.parts.train
        give_verifier(trainer, Judge([right], problems,
                                     () if right else {p.id for p in problems}))
        trainer.train()
        row = rows_of(trainer)[0]
        assert (row["updates"], row["luffy/demonstrations"]) == (0, 0), right


def test_a_demonstration_is_judged_by_the_verifier_once(make_trainer):
    """By the real one: a wrong solution, and one without a box, earn nothing."""
    trainer = make_trainer("luffy")
    problems = list(trainer.parts.train)
    problems[0] = replace(problems[0], solution=problems[1].solution)
    problems[2] = replace(problems[2], solution=problems[2].answer)
    with Verifier() as verifier:
        give_verifier(trainer, verifier)
        trainer.method._judge(problems)
        trainer.method._judge(problems)
        assert list(trainer.method.verdicts.values()) == [0, 1, 0, 1, 1, 1, 1, 1]
        assert sum(verifier.counts.values()) == 8
    assert trainer.method.state() == {"verdicts": trainer.method.verdicts}


def test_wrong_settings_name_the_key():
    """f(x) = x / (x + gamma) needs a positive gamma."""
    assert not not_refused("luffy", {"luffy.gamma=0": "luffy.gamma"})

"""`entropy_control`: the adaptive weight, Clip-Cov, and KL-Cov, against literal references."""

import pytest
import torch
from small_training import (
    Fixed,
    distance,
    flat,
    not_refused,
    rows_of,
    small_settings,
    take_first_step,
    trained,
    watch,
    watch_rollouts,
)
from textbook import all_scores, coin_rewards, gradient, plain_grpo, plain_scores, problems_of

from hybridrl_lib.config.methods import METHODS
from hybridrl_lib.config.presets import get_setup
from hybridrl_lib.learning.entropy_control import covariances
from hybridrl_lib.setups import SETUPS

ONE = ("rl.updates_per_rollout=1", "rl.beta=0")


def tokens_of(trainer, groups):
    """log pi with gradient, and advantages, of every token of a step's answers, flat (N,)."""
    rewards = coin_rewards(trainer, problems_of(trainer, groups), groups)
    scores, advantages, weights = [], [], []
    for group, reward in zip(groups, rewards, strict=True):
        gains = (reward - reward.mean()) / (reward.std() + 1e-4)
        for completion, gain in zip(group.completions, gains, strict=True):
            scores.append(plain_scores(trainer.policy.model, group.prompt_ids,
                                       completion.token_ids)[0])
            advantages.append(gain.expand(len(scores[-1])))
            weights.append(torch.full((len(scores[-1]),), 1 / len(scores[-1])))
    return scores, advantages, torch.cat(weights) / len(scores)


def test_the_adaptive_weight_is_not_in_sft(make_trainer):
    """An SFT stage samples nothing, so there is no entropy of RL to keep up."""
    found = [flat(trained(make_trainer, "sft", f"entropy_control.kind={kind}",
                          "entropy_control.target=100", folder=kind))
             for kind in ("none", "adaptive")]
    assert torch.equal(*found)


def test_the_adaptive_weight_is_that_of_the_papers_term(make_trainer):
    """A step with weight c has the gradient of rl.gamma = c, bit for bit."""
    found = []
    for setup, *overrides in (("rl_entropy", "rl.gamma=0.3"),
                              ("rl", "entropy_control.kind=adaptive", "entropy_control.target=100",
                               "entropy_control.largest=0.3")):
        trainer = make_trainer(setup, *overrides, folder=setup)
        trainer.entropy_control.coefficient = 0.3
        seen = watch(trainer)
        take_first_step(trainer)
        assert rows_of(trainer)[0]["gamma"] == 0.3
        found.append(seen.gradients[0])
    assert torch.equal(*found)


def test_the_adaptive_weight_seeks_its_target(make_trainer):
    """c rises by `change` below the target and falls above it, within 0 and `largest`; it is in the
    loss only below the target."""
    trainer = make_trainer("rl", "entropy_control.kind=adaptive", "entropy_control.target=0.5",
                           "entropy_control.change=0.1", "entropy_control.largest=0.25")
    control, used, held = trainer.entropy_control, [], []
    for step, entropy in enumerate([0.4, 0.4, 0.4, 0.4, 0.6, 0.4, 0.6, 0.6, 0.6, 0.6]):
        used.append(control.begin_step(step, entropy))
        held.append(control.coefficient)
    assert used == pytest.approx([0, 0.1, 0.2, 0.25, 0, 0.15, 0, 0, 0, 0])
    assert held == pytest.approx([0.1, 0.2, 0.25, 0.25, 0.15, 0.25, 0.15, 0.05, 0, 0])


def test_the_adaptive_weight_is_recorded_and_resumed(make_trainer):
    """It is in the checkpoint, and every step records the weight that its loss had."""
    def trainer():
        return make_trainer("rl", "entropy_control.kind=adaptive", "entropy_control.target=100",
                            "training.epochs=4", "training.checkpoint_every=2",
                            "entropy_control.change=0.001")

    first = trainer()
    first.train()
    rows = rows_of(first)
    assert [row["entropy_control/coefficient"] for row in rows] == pytest.approx(
        [0, 0.001, 0.002, 0.003])
    assert [row["gamma"] for row in rows] == [row["entropy_control/coefficient"] for row in rows]
    first.checkpoints.found()[0][1].rename(first.checkpoints.root / "later")
    second = trainer()
    second._resume()
    assert (second.step, second.entropy_control.coefficient) == (2, pytest.approx(0.002))


def test_the_covariance_is_over_all_tokens(make_trainer, monkeypatch):
    """Its means are over the whole update, groups without signal included."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("rl_clip_cov", *ONE)
    seen = watch(trainer)
    trainer.train()
    trainer.load_weights(seen.weights[0])
    scores, advantages, _ = tokens_of(trainer, taken[0])
    x, a = torch.cat(scores).detach().double(), torch.cat(advantages).double()
    expected = sum((float(x[t]) - float(x.mean())) * (float(a[t]) - float(a.mean()))
                   for t in range(len(x))) / len(x)
    row = trainer.folder.lines("metrics.jsonl")[0]
    assert row["entropy_control/covariance"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert covariances(x, a).mean() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_clip_cov_detaches_what_it_marks(make_trainer, monkeypatch):
    """With a share of 1, every token within the bounds is detached: the literal loss."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("rl_clip_cov", *ONE, "entropy_control.clip_share=1",
                           "entropy_control.clip_low=0.05", "entropy_control.clip_high=0.6")
    seen = watch(trainer)
    trainer.train()
    trainer.load_weights(seen.weights[0])
    scores, advantages, weights = tokens_of(trainer, taken[0])
    x, a = torch.cat(scores), torch.cat(advantages)
    covariance = covariances(x.detach(), a)
    inside = (covariance >= 0.05) & (covariance <= 0.6)
    loss = (-(x - x.detach()).exp() * a * weights)[~inside].sum()
    assert 0.05 < inside.float().mean() < 0.95
    assert distance(seen.gradients[0], gradient(trainer, loss)) < 1e-4
    row = trainer.folder.lines("metrics.jsonl")[0]
    assert row["entropy_control/share"] == pytest.approx(inside.float().mean().item(), abs=0.01)


def test_kl_cov_charges_the_tokens_of_largest_covariance(make_trainer, monkeypatch):
    """In the second update; the first has no log-ratio, so it is that of GRPO."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("rl_kl_cov", "rl.beta=0", "rl.learning_rate=0.003",
                           "entropy_control.kl_share=0.2", "entropy_control.kl_weight=3",
                           "rl.clip=false")
    seen = watch(trainer)
    trainer.train()
    trainer.load_weights(seen.weights[0])
    old = torch.cat(all_scores(trainer, taken[0][1::2]))
    trainer.load_weights(seen.weights[1])
    scores, advantages, weights = tokens_of(trainer, taken[0][1::2])
    x, a = torch.cat(scores), torch.cat(advantages)
    covariance = covariances(x.detach(), a)
    largest = covariance.argsort(descending=True)[:int(0.2 * len(x))]
    cost = torch.zeros(len(x)).index_put((largest,), torch.tensor(3.0))
    loss = ((-(x - old).exp() * a + cost * (x - old).abs()) * weights).sum()
    assert distance(seen.gradients[1], gradient(trainer, loss)) < 1e-4


def test_kl_cov_charges_answers_without_an_advantage_too(make_trainer):
    """Without beta a group of equal rewards is skipped, unless some of its tokens are marked."""
    trainer = make_trainer("rl_kl_cov", "rl.beta=0", "entropy_control.kl_share=1",
                           verifier=Fixed([1, 0, 0, 1] * 2 + [0] * 8))
    kept, learner = [], trainer.learner
    accumulate = learner.accumulate

    def noted(update, totals):
        found = accumulate(update, totals)
        kept.append((update.old is not None, bool(learner.has_gradient(update).all())))
        return found

    learner.accumulate = noted
    trainer.train()
    assert set(kept) == {(False, False), (True, True)}


def test_the_first_update_of_kl_cov_is_grpos(make_trainer, monkeypatch):
    """|log pi - log pi_old| has no gradient yet, so nothing is marked."""
    taken = watch_rollouts(monkeypatch)
    trainer = make_trainer("rl_kl_cov", "rl.beta=0")
    seen = watch(trainer)
    trainer.train()
    trainer.load_weights(seen.weights[0])
    groups = taken[0][0::2]
    rewards = coin_rewards(trainer, problems_of(trainer, groups), groups)
    old = all_scores(trainer, groups)
    loss = plain_grpo(trainer.policy, groups, rewards, old, old, trainer.settings)
    assert distance(seen.gradients[0], gradient(trainer, loss)) < 2e-5


def test_micro_batches_change_nothing(make_trainer):
    """The covariance is that of the update; the released code's depends on the micro-batch."""
    wrong = {}
    for kind in ("clip_cov", "kl_cov"):
        found = []
        for tokens in (4096, 60):
            trainer = make_trainer(
                "rl", f"entropy_control.kind={kind}", f"training.micro_batch_tokens={tokens}",
                "entropy_control.clip_share=0.1", "entropy_control.kl_share=0.1",
                "entropy_control.clip_low=0.1", folder=f"{kind}-{tokens}")
            found.append(watch(trainer))
            take_first_step(trainer)
        assert found[0].micro_batches[0] < found[1].micro_batches[0]
        apart = [distance(*pair) for pair in zip(found[0].gradients, found[1].gradients,
                                                 strict=True)]
        if len(apart) != 2 or max(apart) >= 1e-4:
            wrong[kind] = apart
    assert not wrong


def test_the_choice_follows_from_the_runs_seed(make_trainer):
    """The same run chooses the same tokens; another seed, step, or update chooses others."""
    control = make_trainer("rl_clip_cov", "entropy_control.clip_share=0.1").entropy_control
    covariance = torch.full((1000,), 2.0)

    def choice(seed, step, update):
        control.seed, control.step, control.updates = seed, step, update
        return control._choose(covariance)

    first = choice(0, 0, 0)
    assert first.sum() == 100 and torch.equal(first, choice(0, 0, 0))
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(first, choice(*other))
    # at least one token, as in the released code; none where none lies between the bounds
    assert control._choose(torch.tensor([0.0, 2.0, 9.0])).tolist() == [False, True, False]
    assert not control._choose(torch.tensor([0.0, 0.5, 9.0])).any()


def test_groups_without_signal_alone_teach_nothing(make_trainer):
    """No token has an advantage, so nothing moves."""
    trainer = make_trainer("rl_clip_cov", "rl.beta=0", verifier=Fixed([1]))
    before = flat(trainer)
    trainer.train()
    assert torch.equal(flat(trainer), before)


KINDS = ("adaptive", "clip_cov", "kl_cov")
SAMPLING = [setup for setup in SETUPS.values() if "rl" in setup.stages]
FIRST = ({setup.method: setup.name for setup in reversed(SAMPLING)}
         | {"switching": "switching_rl_first"})
# RL with its own entropy term switched off, and updates in which kl_cov can act.
OPEN = ("rl.gamma=0", "rl.updates_per_rollout=2")


def test_every_setup_that_samples_takes_every_kind():
    """Only RAFT refuses two of them, since it has no advantages."""
    wrong = []
    for setup in SAMPLING:
        for kind in KINDS:
            given = (*OPEN, "rl.max_new_tokens=56", f"entropy_control.kind={kind}")
            if setup.method == "raft" and kind != "adaptive":
                wrong += not_refused(setup.name, {given: "entropy_control.kind"})
            elif small_settings(*given, setup=setup.name).entropy_control.kind != kind:
                wrong.append((setup.name, kind))
    assert not wrong and len(SAMPLING) > 30


def test_it_works_with_every_method(make_trainer, make_policy):
    """Also with demonstrations in the update, token advantages, and a second optimizer."""
    for method, setup in FIRST.items():
        adapter = METHODS[method].adapters[0]
        for kind in ("adaptive", "kl_cov") if setup != "raft" else ("adaptive",):
            trainer = trained(
                make_trainer, setup, *OPEN, f"entropy_control.kind={kind}",
                "entropy_control.target=100", f"model.adapter={adapter}",
                f"training.epochs={6 if method == 'sasr' else 2}", "pear.samples=1"
                if method == "pear" else "rl.gamma=0", policy=make_policy(adapter=adapter),
                folder=f"{setup}-{kind}")
            rows = [row for row in rows_of(trainer) if "reward" in row]
            column = "coefficient" if kind == "adaptive" else "covariance"
            assert rows and all(f"entropy_control/{column}" in row for row in rows), (setup, kind)
    assert set(FIRST) == set(METHODS)


def test_a_separate_sft_update_has_no_entropy_term_of_rl(make_trainer):
    """In mifo, relift, and sasr an SFT update is not RL, whose entropy the control keeps up."""
    for setup in ("mifo", "relift", "sasr"):
        own = "sasr.gamma=1" if setup == "sasr" else f"{setup}.batch_size=2"
        more = ("sft.gamma=0", "rl.gamma=0") if setup == "relift" else ()
        trainer = make_trainer(setup, own, *more, "entropy_control.kind=adaptive",
                               "entropy_control.target=100", "training.epochs=10",
                               verifier=Fixed([0]), folder=setup)
        updates, accumulate = [], trainer.learner.accumulate
        trainer.learner.accumulate = lambda update, totals, a=accumulate, u=updates: (
            u.append(update) or a(update, totals))
        trainer.train()
        taught = [update for update in updates if update.demonstrations]
        assert taught and not any(update.entropy.any() for update in taught), setup
        assert any(update.entropy.any() for update in updates), setup


def test_wrong_settings_name_the_key():
    """Combinations that cannot work are refused before anything is loaded."""
    for setup, overrides in (
            ("rl_kl_cov", "rl.updates_per_rollout=1"), ("raft", "entropy_control.kind=clip_cov"),
            ("rl_entropy", "entropy_control.kind=adaptive"),
            ("rl", "entropy_control.kind=covariance")):
        assert not not_refused(setup, {overrides: "entropy_control.kind"})
    assert not not_refused("rl_clip_cov", {
        "entropy_control.clip_low=5": "entropy_control.clip_low"})
    assert get_setup("rl_entropy").entropy  # rl.gamma=0 makes room for the adaptive weight
    small_settings("entropy_control.kind=adaptive", "rl.gamma=0", setup="rl_entropy")

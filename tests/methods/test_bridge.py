"""`bridge`: three sets of weights, the gradient of each, the ablations, and what is saved."""

import pytest
import torch
from small_training import (
    Coin,
    distance,
    not_refused,
    rows_of,
    snapshot,
    trained,
    watch,
    watch_rollouts,
)
from textbook import coin_rewards, plain_grpo, plain_scores, plain_sft, problems_of

from hybridrl_lib.config.sections import ModelSettings
from hybridrl_lib.learning.progress import Progress
from hybridrl_lib.methods.bridge import Bridge
from hybridrl_lib.policy.loading import load_policy
from hybridrl_lib.policy.packing import PromptCompletion, pack
from hybridrl_lib.policy.sampling import sample

LAM = 0.3
SOME = (f"bridge.rl_weight={LAM}", "bridge.adapter_learning_rate=0.003",
        "rl.learning_rate=0.002", "training.epochs=6")


@pytest.fixture()
def bridge(make_trainer, make_policy):
    """bridge(setup, ...) -> a trainer with an adapter that has left its zero."""
    def build(setup="bridge", *overrides, stir=True, folder=None, **more):
        policy = make_policy(adapter="lora")
        trainer = make_trainer(setup, *SOME, *overrides, policy=policy, folder=folder or setup,
                               **more)
        if stir:
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for name, weight in trainer.policy.trained_weights().items():
                    if "lora_B" in name:
                        weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        return trainer
    return build


class Watched:
    """What goes into and comes out of every update of a Bridge.

    Attributes:
        starts: weights before each update.
        measured: the auxiliary copy where its gradient is taken.
        moves: (optimizer, gradient by name) in order.
    """

    def __init__(self, trainer, monkeypatch):
        self.starts, self.measured, self.moves = [], [], []
        move, auxiliary, gradient = Bridge._move, Bridge._auxiliary, Bridge._gradient

        def noted_move(method, learner, wanted, base, rate, optimizer):
            names = set(method.base)
            mine = {n: g.clone() for n, g in wanted.items() if (n in names) == base}
            if optimizer == "main":
                self.starts.append(snapshot(trainer))
            self.moves.append((optimizer, rate, mine))
            return move(method, learner, wanted, base, rate, optimizer)

        def noted_auxiliary(method, *arguments):
            def noted_gradient(*more):
                now = snapshot(trainer)
                self.measured.append({n: now[n] for n in method.hat})
                return gradient(method, *more)

            with monkeypatch.context() as inside:
                inside.setattr(method, "_gradient", noted_gradient)
                return auxiliary(method, *arguments)

        monkeypatch.setattr(Bridge, "_move", noted_move)
        monkeypatch.setattr(Bridge, "_auxiliary", noted_auxiliary)

    def from_update(self, first):
        """Forgets what was before an update."""
        self.starts, self.measured = self.starts[first:], self.measured[first:]
        kinds = len({name for name, _, _ in self.moves})
        self.moves = self.moves[kinds * first:]

    def of(self, optimizer):
        return [gradient for name, _, gradient in self.moves if name == optimizer]


def flat(gradient):
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)])


def plain_gradient(trainer, loss):
    trainer.policy.model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in trainer.policy.trained_weights().items()
             if p.grad is not None}
    trainer.policy.model.zero_grad(set_to_none=True)
    return found


def plain_losses(trainer, problems, groups, old, reference):
    """(L_SFT, L_RL) of one mini-batch at the weights as they are."""
    rewards = coin_rewards(trainer, problems_of(trainer, groups), groups)
    return plain_sft(trainer, problems), plain_grpo(trainer.policy, groups, rewards, old,
                                                    reference, trainer.settings)


def scores_under(model, groups, temperature):
    with torch.no_grad():
        return [plain_scores(model, g.prompt_ids, c.token_ids, temperature)[0]
                for g in groups for c in g.completions]


def check_every_gradient(bridge, monkeypatch, setup, anchor, last):
    """The gradients of both mini-batches of a step; with `last`, of the second and last step."""
    step, lam = (0, LAM) if last is None else (1, last)
    taken = watch_rollouts(monkeypatch)
    trainer = bridge(setup, f"rl.kl_anchor={anchor}", f"training.epochs={2 * (step + 1)}",
                     "rl.learning_rate=0.04", "bridge.base_learning_rate=0.02",
                     *(() if last is None else (f"bridge.last_rl_weight={last}",)),
                     folder=f"{setup}-{anchor}-{last}")
    seen = Watched(trainer, monkeypatch)
    stage = trainer.method.stages[0]
    demonstrations = trainer._batch(Progress(stage, step, step + 1), "demonstrations", 8)
    trainer.train()
    groups, temperature = taken[step], trainer.settings.rl.temperature
    assert len(seen.starts) == 2 * (step + 1)
    seen.from_update(2 * step)
    trainer.load_weights(seen.starts[0])
    old = scores_under(trainer.policy.model, groups, temperature)
    with trainer.policy.reference() as model:
        reference = scores_under(model, groups, temperature)
    for index in range(2):
        mine, base = list(range(8))[index::2], set(trainer.method.base)
        places = [i * 4 + j for i in mine for j in range(4)]
        arguments = (demonstrations[index::2], [groups[i] for i in mine],
                     [old[i] for i in places], [reference[i] for i in places])
        trainer.load_weights(seen.starts[index])
        g_sft, g_rl = (plain_gradient(trainer, plain_losses(trainer, *arguments)[term])
                       for term in (0, 1))
        mixed = {n: (1 - lam) * g_sft[n] + lam * g_rl[n] for n in g_sft}
        wanted = {"main": {n: g for n, g in mixed.items() if n in base}}
        if setup in ("bridge", "bridge_one_step"):
            # one step ahead: measured where the copy has taken theta's RL step
            trainer.load_weights(seen.starts[index] | seen.measured[index])
            g_hat = plain_gradient(trainer, plain_losses(trainer, *arguments)[1])
            wanted["adapter"] = {n: g - lam * g_hat[n] for n, g in mixed.items() if n not in base}
            of_copy = g_hat if setup == "bridge" else g_rl
            wanted["hat"] = {n: g for n, g in of_copy.items() if n in base}
        else:
            wanted["adapter"] = {n: g if setup == "bridge_joint" else (1 - lam) * g_sft[n]
                                 for n, g in mixed.items() if n not in base}
        for name, expected in wanted.items():
            apart = distance(flat(seen.of(name)[index]), flat(expected))
            assert apart < 2e-4, (setup, anchor, last, name)
    rates = {name: rate for name, rate, _ in seen.moves}
    assert rates["main"] == pytest.approx(rates["adapter"] * 0.02 / 0.003)
    if "hat" in wanted:
        assert rates["hat"] == rates["main"]
        theta = seen.starts[1] if setup == "bridge" else seen.starts[0]
        hat = seen.measured[1 if setup == "bridge" else 0]
        assert distance(flat(hat), flat({n: theta[n] for n in hat})) > 1e-3, "they have parted"
    assert ("hat" in wanted) == bool(seen.of("hat"))


def test_every_gradient_follows_the_formula(bridge, monkeypatch):
    """Two mini-batches: in the second all three have moved, and hat's ratio is to the sampler.
    If lambda is annealed, every step has its own."""
    for case in (("bridge", "reference", None), ("bridge", "old", None),
                 ("bridge_one_step", "reference", None),
                 ("bridge_without_gain", "reference", None), ("bridge_joint", "reference", None),
                 ("bridge", "reference", 0.9), ("bridge_without_gain", "reference", 0.9)):
        with monkeypatch.context() as patch:
            check_every_gradient(bridge, patch, *case)


def test_at_the_first_update_the_gain_has_no_gradient(bridge, monkeypatch):
    """hat is theta: exactly zero, so the adapter's gradient is (1 - lambda) that of SFT. Tokens
    that Clip-Cov draws are the same for both."""
    once = ("training.epochs=2", "rl.updates_per_rollout=1")
    other = bridge("bridge_without_gain", *once, verifier=Coin())
    plain = Watched(other, monkeypatch)
    other.train()
    for more in ((), ("entropy_control.kind=clip_cov", "entropy_control.clip_share=0.1",
                      "entropy_control.clip_low=0.01")):
        trainer = bridge("bridge", *once, *more, folder=f"more-{len(more)}")
        seen = Watched(trainer, monkeypatch)
        trainer.train()
        row = rows_of(trainer)[0]
        assert not more or row["entropy_control/share"] > 0.01
        assert torch.equal(flat(seen.of("adapter")[0]), flat(plain.of("adapter")[0]))
        assert flat(seen.of("adapter")[0]).norm() > 0 == row["bridge/gain"]


def test_a_gain_shows_once_they_part(bridge):
    """Distance and gain are measured; without a gain nothing is."""
    rows = rows_of(trained(bridge, "bridge"))
    assert all(0 < row["bridge/distance"] for row in rows)
    assert rows[0]["bridge/distance"] < rows[-1]["bridge/distance"]
    assert all(row["updates/beside"] == 2 * row["updates"] for row in rows)
    assert any(row["bridge/gain"] != 0 for row in rows)
    assert "bridge/gain" not in rows_of(trained(bridge, "bridge_joint"))[0]


def test_hat_learns_from_rl_alone(bridge, make_trainer, make_policy):
    """With the adapter at zero and still, the persistent copy is what RL makes of the model.

    Not exactly: RL without an adapter skips groups without signal, and here rollouts come from a
    policy that moves in another way; so only one step.
    """
    trainer = bridge("bridge", "training.epochs=2", "rl.updates_per_rollout=1", stir=False,
                     folder="hat")
    trainer.train()
    plain = make_trainer("rl", *SOME[2:], "training.epochs=2", "rl.updates_per_rollout=1",
                         "rl.kl_anchor=reference", "training.checkpoint_every=1", folder="plain")
    steps = watch(plain)
    plain.train()
    weights = {n.replace("base_model.model.", "").replace("base_layer.", ""): h
               for n, h in trainer.method.hat.items()}
    after = steps.weights[1]  # those that the second step starts from
    start = steps.weights[0]
    moved = torch.cat([(weights[n] - start[n]).flatten() for n in sorted(after)])
    wanted = torch.cat([(after[n] - start[n]).flatten() for n in sorted(after)])
    assert distance(moved, wanted) < 1e-2


def test_without_an_adapter_it_is_the_combined_loss(bridge, make_trainer, monkeypatch):
    """Ablation (a): the base weights' gradient is that of `combined`, the adapter stays 0. If
    lambda is annealed, every update has the one of its step."""
    for last in (LAM, 0.9):
        with monkeypatch.context() as patch:
            trainer = bridge("bridge_without_adapter", "training.epochs=4", "rl.beta=0.1",
                             *(() if last == LAM else (f"bridge.last_rl_weight={last}",)),
                             stir=False, folder=f"bridge-{last}")
            seen = Watched(trainer, patch)
            trainer.train()
        plain = make_trainer("combined", f"combined.first={1 - LAM}", f"combined.last={1 - last}",
                             "combined.schedule=linear", *SOME[2:], "training.epochs=4",
                             "rl.beta=0.1", "rl.kl_anchor=reference", folder=f"plain-{last}")
        other = watch(plain)
        plain.train()
        names = list(plain.policy.trained_weights())
        for mine, theirs in zip(seen.of("main"), other.gradients, strict=True):
            by_name = {n.replace("base_model.model.", "").replace("base_layer.", ""): g
                       for n, g in mine.items()}
            assert distance(torch.cat([by_name[n].flatten() for n in names]), theirs) < 1e-4
        assert not seen.of("adapter") and not seen.of("hat")
        assert all(not weight.any() for name, weight in snapshot(trainer).items()
                   if "lora_B" in name)
        assert trainer.method.tensors() == {}


def test_one_step_ahead_starts_from_theta_every_time(bridge, monkeypatch):
    """hat is one RL step away from theta at every update, and a checkpoint does not keep it."""
    trainer = bridge("bridge_one_step", "rl.updates_per_rollout=1")
    seen = Watched(trainer, monkeypatch)
    trainer.train()
    rows = rows_of(trainer)
    assert trainer.method.tensors() == {} and len(seen.of("hat")) == len(rows)
    persistent = rows_of(trained(bridge, "bridge", "rl.updates_per_rollout=1"))
    assert rows[-1]["bridge/distance"] < persistent[-1]["bridge/distance"]


def test_the_reference_is_the_model_as_loaded(bridge, make_policy):
    """Base weights are trained: switching the adapter off would give a model that has moved."""
    trainer = trained(bridge, "bridge", stir=False)
    batch, = pack([PromptCompletion([5, 6, 7], [8, 9, trainer.policy.eos_id])], 1000, 0)
    with torch.no_grad():
        loaded = make_policy().score(batch)[0]
        with trainer.policy.reference() as model:
            assert torch.equal(trainer.policy.score(batch, model=model)[0], loaded)
        with trainer.policy.model.disable_adapter():
            off = trainer.policy.score(batch)[0]
    assert (off - loaded).abs().max() > 1e-3


def test_sampler_and_saved_model_see_both(bridge, tmp_path):
    """Sampled log-probabilities are those of base weights and adapter together, and so is the
    ordinary model that is saved; the policy itself keeps the two apart."""
    trainer = trained(bridge, "bridge")
    group, = sample(trainer.policy, [[5, 6, 7]], samples=4, max_new_tokens=8, temperature=1.0)
    for completion in group.completions:
        exact = plain_scores(trainer.policy.model, group.prompt_ids, completion.token_ids)[0]
        torch.testing.assert_close(torch.tensor(completion.log_probabilities), exact.detach(),
                                   atol=1e-4, rtol=1e-4)
    before = snapshot(trainer)
    trainer.policy.save(tmp_path / "saved")
    after = snapshot(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = load_policy(ModelSettings(path=str(tmp_path / "saved"), device="cpu",
                                      precision="fp32"))
    batch, = pack([PromptCompletion([5, 6, 7], [8, 9, 10, saved.eos_id])], 1000, 0)
    with torch.no_grad():
        mine, theirs = trainer.policy.score(batch)[0], saved.score(batch)[0]
        with trainer.policy.model.disable_adapter():
            off = trainer.policy.score(batch)[0]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert (mine - off).abs().max() > 1e-3, "the adapter must matter in this test"


def test_wrong_settings_name_the_key():
    """It needs an adapter, and three optimizers share a backward pass."""
    assert not not_refused("bridge", {
        override: override.partition("=")[0] for override in
        ("model.adapter=none", "model.precision=fp16", "bridge.rl_weight=1",
         "bridge.adapter=half")})


def test_a_loss_that_is_not_finite_moves_nothing_that_it_is_in(bridge):
    """Even if its gradient is finite. hat, whose loss is fine, takes its step."""
    trainer = bridge("bridge", "rl.updates_per_rollout=1", "training.epochs=4")
    learner, method = trainer.learner, trainer.method
    accumulate, calls = learner.accumulate, []

    def noted(update, totals):
        calls.append(update)
        found = accumulate(update, totals)
        learner.loss_is_finite &= len(calls) != 2  # L_RL of the first update
        return found

    learner.accumulate = noted
    before, hat = snapshot(trainer), {name: value.clone() for name, value in method.hat.items()}
    learn, after = method.learn, []

    def seen(*arguments):
        norms = learn(*arguments)
        after.append(snapshot(trainer))
        return norms

    method.learn = seen
    trainer.train()
    assert len(calls) == 6, "three gradients in each of two updates"
    assert all(torch.equal(before[name], after[0][name]) for name in before)
    assert any(not torch.equal(hat[name], method.hat[name]) for name in hat)
    assert any(not torch.equal(before[name], after[1][name]) for name in before)
    assert rows_of(trainer)[0]["updates_not_finite"] == 1

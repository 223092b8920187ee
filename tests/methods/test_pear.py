"""`pear`: the weights, the demonstrations, the update, and the drift of the model's weights."""

import math
from dataclasses import replace

import pytest
import torch
from small_models import write_model
from small_training import (
    SMALL,
    Coin,
    Fixed,
    distance,
    flat,
    not_refused,
    rows_of,
    snapshot,
    trained,
    watch,
)
from textbook import gradient, plain_mean, plain_scores

from hybridrl_lib.config.methods import PEARSettings
from hybridrl_lib.config.sections import ModelSettings
from hybridrl_lib.experiments.run import run
from hybridrl_lib.methods.pear import log_weights
from hybridrl_lib.methods.pear_demonstrations import behavior_policy
from hybridrl_lib.methods.weight_changes import weight_changes
from hybridrl_lib.policy.loading import load_policy
from hybridrl_lib.system.errors import UserError

WIDE = ("pear.delta_low=-9", "pear.delta_high=9", "pear.log_weight_low=-9",
        "pear.log_weight_high=9")
OPEN = PEARSettings(delta_low=-9, delta_high=9, log_weight_low=-99, log_weight_high=99)


def literal(delta, own):
    """log G token by token, as the formulas have it."""
    delta = [min(max(d, own.delta_low), own.delta_high) for d in delta]
    length, result = len(delta), []
    for t in range(1, length + 1):
        if own.level == "sequence":
            total = sum(delta)
        elif own.level == "token":
            total = (length - t) * math.log(own.gamma) + sum(delta[t:])
        else:
            size = own.block_size
            blocks = [delta[i:i + size] for i in range(0, length, size)]
            mine = (t - 1) // size
            last = min((mine + 1) * size, length)
            total = (length - last) * math.log(own.gamma) + sum(map(sum, blocks[mine + 1:]))
        result.append(min(max(total, own.log_weight_low), own.log_weight_high))
    return torch.tensor(result)


# The weights --------------------------------------------------------------------------------------


def test_the_weights_are_those_of_the_formula():
    """The suffix leaves t itself out, a short last block is a block, T is the answer's length."""
    wrong = []
    for level, size in (("token", 4), ("sequence", 4), ("block", 4), ("block", 1), ("block", 50)):
        for length in (1, 3, 8, 11):
            delta = torch.randn(length, generator=torch.Generator().manual_seed(length))
            for own in (replace(OPEN, level=level, block_size=size, gamma=0.9),
                        replace(OPEN, level=level, block_size=size, delta_low=-0.5, delta_high=0.2,
                                log_weight_low=-0.7, log_weight_high=0.6)):
                expected = literal(delta.tolist(), own)
                if not torch.allclose(log_weights(delta, own), expected, atol=1e-5, rtol=1e-5):
                    wrong.append((own, length))
    assert not wrong


def test_blocks_of_one_token_are_the_token_level():
    """Exactly."""
    delta = torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(log_weights(delta, replace(OPEN, level="block", block_size=1)),
                       log_weights(delta, replace(OPEN, level="token")))


def test_the_published_bounds_leave_the_end_of_a_long_answer_alone():
    """125 tokens at the floor weigh e^-10, 17 at the ceiling e^5; centered, neither happens."""
    own = replace(PEARSettings(), gamma=1.0)
    floor = log_weights(torch.full((126,), -3.0), own)
    assert (float(floor[0]), float(floor[-1])) == (-10.0, 0.0)
    assert float(log_weights(torch.full((18,), 3.0), own)[0]) == 5.0
    assert log_weights(torch.full((126,), -3.0), replace(own, centered=True)).abs().max() == 0


# The update ---------------------------------------------------------------------------------------


def first_update(make_trainer, *overrides, setup="pear", **more):
    """(trainer at the weights of the first update, its gradient, demonstrations, its row)."""
    trainer = make_trainer(setup, *overrides, verifier=Fixed([0, 1, 1, 0, 0, 0, 1, 1]), **more)
    seen = watch(trainer)
    trainer.train()
    trainer.load_weights(seen.weights[0])
    return (trainer, seen.gradients[0], list(trainer.method.demonstrations.values()),
            rows_of(trainer)[0])


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A behavior model with the same tokenizer and other weights than the student."""
    return str(write_model(tmp_path_factory.mktemp("pear") / "other", "qwen2", seed=1))


def scores(model, demonstration):
    return plain_scores(model, demonstration.sequence.prompt, demonstration.sequence.completion)[0]


def test_an_update_follows_the_formula(make_trainer, other):
    """sum_t G_t * -log pi, with G by teacher forcing of the same tokens under both models."""
    writer = load_policy(ModelSettings(path=other, device="cpu", precision="fp32"))
    for number, overrides in enumerate((
            ("pear.gamma=0.9", *WIDE), ("pear.level=block", "pear.block_size=3", *WIDE),
            ("pear.level=sequence",), (), ("pear.normalization=weights", *WIDE),
            ("pear.centered=true", "pear.normalization=weights", *WIDE),
            ("pear.normalization=weights", "sft.loss_normalization=sequence_mean", *WIDE))):
        trainer, measured, demonstrations, row = first_update(
            make_trainer, f"pear.behavior={other}", "pear.samples=2", *overrides,
            folder=f"run-{number}")
        own, losses, weights = trainer.settings.method, [], []
        for demonstration in demonstrations:
            mine = scores(trainer.policy.model, demonstration)
            theirs = scores(writer.model, demonstration).detach()
            torch.testing.assert_close(demonstration.behavior, theirs, atol=1e-4, rtol=1e-5)
            delta = (mine - theirs).detach()
            if own.centered:
                delta = delta - delta.mean()
            weights.append(literal(delta.tolist(), own).exp())
            losses.append(-weights[-1] * mine)
        normalization = trainer.settings.sft.loss_normalization
        loss = plain_mean(losses, normalization)
        if own.normalization == "weights":
            loss = loss / plain_mean(weights, normalization)
        assert distance(measured, gradient(trainer, loss)) < 2e-5, overrides
        assert row["loss/sft"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["pear/weight"] == pytest.approx(float(torch.cat(weights).mean()), rel=1e-4)
        assert 0 < row["pear/effective"] <= 1
        assert len({round(float(w), 4) for w in torch.cat(weights)}) > 3, "the weights must differ"


def test_a_policy_that_is_the_behavior_model_does_plain_sft(make_trainer, model_folders):
    """pi_theta = pi_beta and gamma = 1: all weights are 1."""
    found = []
    for level in ("token", "none"):
        trainer, measured, demonstrations, row = first_update(
            make_trainer, f"pear.behavior={model_folders['qwen2']}", "pear.gamma=1",
            f"pear.level={level}", folder=level)
        found.append(measured)
    loss = plain_mean([-scores(trainer.policy.model, d) for d in demonstrations], "token_mean")
    assert distance(found[0], gradient(trainer, loss)) < 2e-5
    assert distance(found[1], found[0]) < 2e-5
    assert "pear/weight" not in row, "the control arm weights nothing"


def test_the_weights_follow_the_policy(make_trainer, other):
    """They are computed at each update: those of the first would be stale at the second."""
    trainer = trained(make_trainer, "pear", f"pear.behavior={other}", "training.epochs=6",
                      "sft.learning_rate=0.01", *WIDE)
    rows = [row["pear/weight"] for row in rows_of(trainer) if row["stage"] == "sft"]
    assert len(rows) == 3 and len(set(rows)) == 3


# The demonstrations -------------------------------------------------------------------------------


def test_demonstrations_are_the_first_right_answers(make_trainer, other):
    """The verdicts of two answers per problem are 01, 10, 00, 11, repeated: a problem with 00 is
    left out of SFT and counted. Two trainers agree; another seed writes other answers."""
    found = []
    for seed in (0, 0, 1):
        trainer = make_trainer("pear", f"pear.behavior={other}", "pear.samples=2",
                               "rl.max_new_tokens=40", seed=seed, folder=f"run-{len(found)}",
                               verifier=Fixed([0, 1, 1, 0, 0, 0, 1, 1]))
        trainer.train()
        found.append({name: tuple(d.sequence.completion)
                      for name, d in trainer.method.demonstrations.items()})
        row = rows_of(trainer)[0]
        assert row["pear/problems_without"] == 8 - len(found[-1])
        assert row["pear/demonstrations"] == len(found[-1])
        taught = sum(map(len, found[-1].values()))
        assert row["tokens"] == taught + row["pear/behavior_tokens"] > taught
        assert (row["groups/beside"], row["updates/beside"]) == (8 * 2, 0)
        left_out = [p.id for p in trainer.parts.train[2::4]]
        assert found[-1] and not set(left_out) & set(found[-1])
        assert all(tokens[-1] == trainer.policy.eos_id for tokens in found[-1].values())
    assert found[0] == found[1] != found[2]


def test_demonstrations_earn_the_reward_of_rl(make_trainer, other):
    """A right answer after a false equation is not imitated where RL would not reward it."""
    found = {}
    for reward in ("answer", "answer_and_steps"):
        trainer = make_trainer("pear", f"pear.behavior={other}", "pear.samples=2",
                               f"rl.reward={reward}", "rl.max_new_tokens=40",
                               verifier=Fixed([1]), folder=reward)
        trainer.train()
        found[reward] = len(trainer.method.demonstrations)
    assert found["answer"] > 0 == found["answer_and_steps"], "random texts have no equation"


def test_no_right_answer_at_all_is_a_stage_without_updates(make_trainer):
    """And no crash: RL still runs, from the base model."""
    trainer = make_trainer("pear", "pear.behavior_epochs=1", verifier=Fixed([0]))
    trainer.train()
    first, *others = rows_of(trainer)
    assert (first["updates"], first["pear/problems_without"]) == (0, 8)
    assert first["updates/beside"] == 1 and not any("updates/beside" in row for row in others)
    assert trainer.tokens["behavior_demonstrations"] > 0 == trainer.tokens["demonstrations"]
    assert trainer.method.demonstrations == {}


def test_the_behavior_model_of_the_run_is_its_base_model_after_sft(make_trainer):
    """More epochs make the reference solutions likelier; the student is not touched."""
    trainer = make_trainer("pear")
    before = flat(trainer)
    problem = trainer.parts.train[0]
    prompt, solution = (trainer.policy.encode_prompt(problem.question),
                        trainer.policy.encode_completion(problem.solution))
    likely = []
    for epochs in (1, 8, 8):
        policy, taught = behavior_policy("sft", trainer.policy, trainer.parts.train,
                                          trainer.settings, epochs, 0.003, 0)
        likely.append(float(plain_scores(policy.model, prompt, solution)[0].mean().detach()))
        size = trainer.settings.sft.batch_size
        assert taught.updates == epochs * -(-len(trainer.parts.train) // size)
        assert taught.tokens == epochs * sum(len(trainer.policy.encode_completion(p.solution))
                                             for p in trainer.parts.train)
    assert likely[0] < likely[1] == likely[2]
    assert torch.equal(flat(trainer), before)


def test_the_arms_rate_leaves_the_demonstrations_as_they_are(make_trainer):
    """Two arms of a comparison with different factors must not learn from different answers."""
    found = []
    for setup, rate in (("pear", 0.001), ("sft_sampled_then_rl", 0.01)):
        trainer = make_trainer(setup, f"sft.learning_rate={rate}", "pear.behavior_rate=0.003",
                               folder=setup)
        trainer.train()
        found.append({name: (d.sequence, d.behavior.tolist())
                      for name, d in trainer.method.demonstrations.items()})
    assert found[0] == found[1] and found[0]


# The monitors -------------------------------------------------------------------------------------


def test_the_monitors_measure_what_rl_did(make_trainer):
    """Drift, sparsity, and alignment of RL's move, from the weights at three moments."""
    trainer = make_trainer("pear", "training.epochs=4", "pear.behavior_epochs=1",
                           "rl.learning_rate=0.01", verifier=Coin())
    first = flat(trainer)
    moments, compose = [], trainer.method.compose

    def noted(step):
        moments.append((step.progress.stage.name, step.progress.step, flat(trainer)))
        return compose(step)

    trainer.method.compose = noted
    trainer.train()
    middle = next(weights for stage, step, weights in moments if (stage, step) == ("rl", 0))
    moved = flat(trainer) - middle
    row = rows_of(trainer)[-1]
    assert row["pear/drift"] == pytest.approx(float(moved.norm() / middle.norm()), rel=1e-5)
    assert row["pear/sparsity"] == pytest.approx(float((moved.abs() < 1e-5).float().mean()))
    assert row["pear/alignment"] == pytest.approx(
        float(torch.cosine_similarity(middle - first, moved, dim=0)), abs=1e-5)
    assert row["pear/drift"] > 1e-4 and 0 <= row["pear/sparsity"] < 1
    sizes = [weight.numel() for weight in snapshot(trainer).values()]
    assert row["pear/drift_by_tensor"] == {
        name: pytest.approx(float(mine.norm() / before.norm()), rel=1e-3)
        for name, mine, before in zip(snapshot(trainer), moved.split(sizes), middle.split(sizes),
                                      strict=True)}


def test_weights_that_did_not_move_or_were_zero():
    """No direction; no drift of a tensor that was 0, such as an adapter's second half."""
    weights = {"one": torch.ones(3)}
    assert weight_changes(weights, weights, weights) == {
        "drift": 0.0, "drift_by_tensor": {"one": 0.0}, "sparsity": 1.0}
    zero, one = {"a": torch.zeros(2), "b": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}
    assert weight_changes(zero, zero, one)["drift_by_tensor"] == {"b": 0.0}


# Refusals -----------------------------------------------------------------------------------------


def test_wrong_settings_name_the_key():
    """Also a behavior model that is not there, and blocks as long as an answer, with which every
    weight would be 1: the control arm under PEAR's name."""
    assert not not_refused("pear", {
        f"pear.{name}={value}": f"pear.{name}" for name, value in (
            ("behavior", "none"), ("gamma", 0), ("level", "word"), ("delta_low", 0.1),
            ("block_size", 0), ("behavior", "/nowhere"), ("behavior", "./nowhere"),
            ("behavior", "no.gguf"))})
    assert not not_refused("pear", {("pear.level=block", "pear.block_size=16",
                                     "rl.max_new_tokens=16"): "pear.block_size"})


def test_the_behavior_models_path_names_no_home(monkeypatch, tmp_path):
    """Settings are recorded and passed on."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PEARSettings(behavior=str(tmp_path / "model")).behavior == "~/model"


def test_a_behavior_model_that_is_not_there_leaves_no_record(model_folders, other, monkeypatch):
    """It is looked for before anything is recorded, so the command with the right name runs."""
    monkeypatch.setattr("hybridrl_lib.experiments.run.Verifier", Coin)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = [*SMALL, "pear.samples=2", f"model.path={model_folders['qwen2']}"]
    with pytest.raises(UserError, match="models/nowhere.*pear.behavior") as caught:
        run("pear", settings=[*settings, "pear.behavior=models/nowhere"])
    assert "model.path" not in str(caught.value)
    assert run("pear", settings=[*settings, f"pear.behavior={other}"]).is_complete


def test_another_tokenizer_is_refused(make_trainer, tmp_path):
    """Log-probabilities of different tokens would be divided by each other."""
    folder = write_model(tmp_path / "renamed", "qwen2", seed=1)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('" apples"', '" pears"'),
                    encoding="utf-8")
    with pytest.raises(UserError, match="pear.behavior|tokenizer"):
        make_trainer("pear", f"pear.behavior={folder}")

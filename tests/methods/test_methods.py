"""What must hold for every method alike: settings, resumption, adapters, and that it is a file."""

import ast
import copy
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_training import SMALL, Coin, Fixed, distance, small_settings

from hybridrl_lib import methods
from hybridrl_lib.config.methods import METHODS
from hybridrl_lib.config.presets import (
    describe,
    get_setup,
    load_settings,
    preset_names,
    settings_from_dict,
)
from hybridrl_lib.config.presets import settings_to_dict as to_dict
from hybridrl_lib.experiments.run import run
from hybridrl_lib.learning.update import Totals
from hybridrl_lib.methods.registry import make_method, method_class
from hybridrl_lib.policy import packing
from hybridrl_lib.setups import SETUPS
from hybridrl_lib.system.errors import UsageError, UserError
from hybridrl_lib.training.observer import Observer

OTHERS = [name for name, setup in SETUPS.items() if setup.method != "staged" or setup.settings]
# Six steps: more than one stage or event for every method, checkpoints between them.
SIX = (*SMALL, "training.epochs=12", "training.checkpoint_every=1000", "sft.learning_rate=0.003",
       "rl.learning_rate=0.003", "evaluation.samples=0", "evaluation.train_samples=0",
       "evaluation.train_limit=0")
FEWER = {  # by method: so that its events fall into six steps
    "relift": ("relift.batch_size=3",),
    "mifo": ("mifo.batch_size=3",),
    "prl": ("prl.step_tokens=4",),
    "switching": ("switching.loss_fall=1", "switching.least_epochs=2", "probe.every=1",
                  "switching.kl_change=1"),
}
FOLDER = Path(methods.__file__).parent


class Ends(Observer):
    """Asks to stop after a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step(self, row, total):
        import os
        import signal

        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture()
def start(model_folders, monkeypatch):
    """start(setup, experiment, ...) -> the folder of a short run with verdicts by coin."""
    monkeypatch.setattr("hybridrl_lib.experiments.run.Verifier", Coin)

    def begin(name, experiment, *overrides, observer=None):
        setup = get_setup(name)
        return run(name, preset="tiny", experiment=experiment, observer=observer or Observer(),
                   settings=[*SIX, *setup.settings, *FEWER.get(setup.method, ()),
                             f"model.path={model_folders['qwen2']}", "model.device=cpu",
                             *overrides])
    return begin


def record(folder):
    final = folder.path / "checkpoint" / "final"
    rows = [{k: v for k, v in row.items() if not k.startswith("seconds")}
            for row in folder.lines("metrics.jsonl")]
    return rows, {path.name: path.read_bytes() for path in final.glob("*.safetensors")}


def cases():
    """(setup, adapter): every setup, and with an adapter too the first one of each method."""
    seen = set()
    for setup in map(get_setup, OTHERS):
        adapters = method_class(setup.method).adapters
        yield setup.name, adapters[0]
        if setup.method not in seen and len(adapters) > 1:
            yield setup.name, adapters[1]
        seen.add(setup.method)


@pytest.mark.parametrize(("setup", "adapter"), list(cases()))
def test_a_method_goes_on_bit_for_bit(start, setup, adapter):
    """Buffers, counts, draws, auxiliary weights and every optimizer are in the checkpoint."""
    overrides = (f"model.adapter={adapter}",)
    rows, weights = record(start(setup, "whole", *overrides))
    for step in range(1, len(rows), 2):
        with pytest.raises(UserError, match="Stopped"):
            start(setup, "cut", *overrides, observer=Ends(step))
    assert record(start(setup, "cut", *overrides)) == (rows, weights)
    assert any(row["updates"] for row in rows) and len(rows) >= 6


def gradient_of(trainer, update):
    """Of an update that is not taken, flat."""
    trainer.learner.accumulate(update, Totals())
    return torch.cat([gradient.flatten() for gradient in trainer.learner._take_gradients()])


def reordered(rollout, order):
    """The same answers in another order, with all that belongs to each."""
    def moved(values):
        return None if values is None else [values[i] for i in order]

    return replace(rollout, rewards=rollout.rewards[order], shaped=rollout.shaped[order],
                   advantages=rollout.advantages[order], reference=moved(rollout.reference),
                   anchor=moved(rollout.anchor), group=replace(
                       rollout.group, completions=moved(rollout.group.completions)))


# Every method that makes its updates by itself; `staged`, `deepseekmath` and `switching` are `rl`.
EVERY_METHOD = pytest.mark.parametrize(("setup", "overrides"), [
    ("rl", ("rl.beta=0.5", "rl.kl_anchor=reference")), ("combined", ()), ("luffy", ()),
    ("superrl", ()), ("hpt", ()), ("chord_phi", ()), ("frpo", ("prl.beta=0.5",)),
    ("prl", ("prl.beta=0.5", "prl.step_tokens=4")), ("mifo", ("mifo.batch_size=3",)),
    ("relift", ("relift.batch_size=3",)), ("raft", ("raft.deduplicate=false",)),
    ("uft", ("uft.low=0.5", "uft.hinted=1", "uft.sft_coefficient=0.5")), ("prefix_rft", ()),
    ("pear_centered", ("pear.delta_low=-9", "pear.delta_high=9")), ("bridge", ()),
    ("sasr", ("sasr.gamma=1e9", "rl.beta=0.5"))])  # a drawn SFT step has a batch of its own


def test_every_method_is_in_that_list():
    """A new one would skip the tests of order and padding."""
    asked = {get_setup(setup).method for setup, _ in EVERY_METHOD.args[1]}
    assert asked == set(METHODS) - {"deepseekmath", "switching"}


def last_step(make_trainer, make_policy, setup, *overrides):
    """(trainer after a short run, its last step of rollouts, compose); PEAR's is the last of SFT.

    compose(step, order) -> the method's updates at the weights as they are, every time from the
    same state. What it holds beside each problem of the step (hints, hybrids) is in that order.
    """
    trainer = make_trainer(
        setup, "rl.updates_per_rollout=1", "rl.learning_rate=0.01", *overrides,
        policy=make_policy(adapter="lora") if setup == "bridge" else None,
        # in every step three problems for the buffer, and it is empty again
        verifier=Fixed([0] * 12 + [1, 0, 0, 1] * 5) if setup in ("relift", "mifo") else None)
    steps, hybrids, method = [], [], trainer.method
    make, sample = method.compose, getattr(method, "_sample", None)
    method.compose = lambda step: steps.append(step) or make(step)
    if setup == "prefix_rft":
        method._sample = lambda step: hybrids.append(sample(step)) or hybrids[-1]
    trainer.train()
    kind = "demonstrations" if setup == "pear_centered" else "rollouts"
    state = copy.deepcopy(method.state())
    shown = getattr(method, "shown", None)

    def compose(step, order=range(8)):
        if setup == "prefix_rft":
            method._sample = lambda step: [replace(hybrids[-1][i]) for i in order]
        if setup == "uft":
            method.shown = [shown[i] for i in order]
        method.load_state(copy.deepcopy(state))
        return make(step)
    return trainer, [step for step in steps if getattr(step, kind)][-1], compose


@EVERY_METHOD
def test_the_order_of_a_batch_changes_no_gradient(make_trainer, make_policy, setup, overrides):
    """Problems, answers of a group, demonstrations, and what a method holds beside each problem:
    an index that follows another list would."""
    trainer, step, compose = last_step(make_trainer, make_policy, setup,
                                       "training.micro_batch_tokens=60", *overrides)
    draws, taught = random.Random(0), step.demonstrations
    order = draws.sample(range(8), 8)
    other = replace(step, demonstrations=draws.sample(taught, len(taught)), rollouts=[
        reordered(step.rollouts[i], draws.sample(range(4), 4)) for i in order if step.rollouts])
    ones, twos = compose(step), compose(other, order)
    assert len(ones) == 1 + (setup in ("relift", "mifo", "bridge"))
    for one, two in zip(ones, twos, strict=True):
        assert one.sequences != two.sequences
        expected = gradient_of(trainer, one)
        assert expected.norm() > 0 and distance(gradient_of(trainer, two), expected) < 1e-5
    if not overrides:  # what would be wrong shows: the advantages of one order, answers of another
        two.advantages = one.advantages
        assert distance(gradient_of(trainer, two), expected) > 1e-2
    if setup in ("uft", "prefix_rft"):  # and the hints or hybrids of one order
        wrong, = compose(other)
        assert distance(gradient_of(trainer, wrong), expected) > 1e-2


@EVERY_METHOD
def test_padding_changes_no_gradient(make_trainer, make_policy, monkeypatch, setup, overrides):
    """Rows with more of it than they need, as beside a longer one; no mean may count it, nor a
    score that a weight or a correction is made of."""
    trainer, step, compose = last_step(make_trainer, make_policy, setup, *overrides)
    expected = [gradient_of(trainer, update) for update in compose(step)]
    length, sizes = packing._row_length, []
    monkeypatch.setattr(packing, "_row_length", lambda *given: length(*given) + 30)
    score = trainer.policy.score
    monkeypatch.setattr(trainer.policy, "score", lambda packed, **more: (
        sizes.append(packed.input_ids.shape[1]) or score(packed, **more)))
    for update, without in zip(compose(step), expected, strict=True):
        assert distance(gradient_of(trainer, update), without) < 1e-5 and without.norm() > 0
    assert min(sizes) > 30


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("setup", SETUPS)
def test_every_preset_has_settings_for_every_setup(preset, setup):
    """A preset's line for a method is read only when the method is chosen: here all are."""
    chosen = get_setup(setup)
    settings = load_settings(preset, smoke=False, setup=chosen)
    assert make_method(chosen, settings).stages or setup == "base"
    assert settings_from_dict(to_dict(settings)) == settings
    own = section_class(chosen.method)
    assert (settings.method is None) == (own is None)
    assert own is None or own.section == chosen.method
    assert all(meaning for _, _, meaning in describe(settings))


def test_methods_are_found_without_torch():
    """Settings and `hybridrl list` start fast; and a file that is no method is no setting."""
    code = ("import sys; from hybridrl_lib.methods import METHODS; "
            "print('torch' in sys.modules, *METHODS)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    files = sorted(path.stem for path in FOLDER.glob("[a-z]*.py") if path.stem != "method")
    assert done.stdout.split() == ["False", *files] == ["False", *METHODS]
    assert method_class("superrl").__name__ == "SuperRL"  # not what it shares with HPT


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_short_file(name):
    """Found by its name, with a docstring that says where the method comes from."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert len(ast.get_docstring(ast.parse(text)) or "") > 60
    assert method_class(name).__doc__ and method_class(name).__module__.endswith(name)


def test_a_setting_of_another_method_is_refused():
    """It would be ignored in silence; without a setup it is checked: some setup may use it."""
    with pytest.raises(UsageError, match="setup combined has no settings relift"):
        load_settings("tiny", ["relift.batch_size=3"], setup=get_setup("combined"))
    with pytest.raises(UsageError, match="did you mean .relift.batch_size"):
        load_settings("tiny", ["relift.batch_sise=3"], setup=get_setup("relift"))
    assert load_settings("tiny", ["relift.batch_size=3"]) == load_settings("tiny")
    with pytest.raises(UsageError, match="relift.batch_size cannot be"):
        load_settings("tiny", ["relift.batch_size=0"])
    chosen = load_settings("tiny", ["relift.batch_size=3"], setup=get_setup("relift"))
    assert chosen.method.batch_size == 3


def test_a_setup_gives_every_stage_its_share():
    """A stage without one would be left out without a word."""
    setup = replace(get_setup("sft_then_rl"), shares=(0.5,))
    with pytest.raises(ValueError, match="shorter"):
        make_method(setup, small_settings())

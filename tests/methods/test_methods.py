"""What must hold for every method: settings, resumption, adapters, and that it is one file."""

import ast
import copy
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_training import (
    SMALL,
    Coin,
    Fixed,
    distance,
    not_refused,
    rows_of,
    small_settings,
    snapshot,
    trained,
)

from hybridrl_lib import methods
from hybridrl_lib.config.methods import METHODS
from hybridrl_lib.config.presets import (
    describe,
    difference,
    get_setup,
    load_settings,
    preset_names,
    settings_from_dict,
    settings_to_dict,
)
from hybridrl_lib.experiments.run import run
from hybridrl_lib.learning.update import Totals
from hybridrl_lib.methods.registry import make_method, method_class
from hybridrl_lib.policy import packing
from hybridrl_lib.setups import SETUPS
from hybridrl_lib.system.errors import UsageError, UserError
from hybridrl_lib.training.observer import Observer

OTHERS = [name for name, setup in SETUPS.items() if setup.method != "staged" or setup.settings]
# Six steps: more than one stage or event for every method.
SIX = ("training.epochs=12", "sft.learning_rate=0.003", "rl.learning_rate=0.003")
FEWER = {  # by method: so that its events fall into six steps
    "relift": ("relift.batch_size=3",),
    "mifo": ("mifo.batch_size=3",),
    "prl": ("prl.step_tokens=4",),
    "pear": ("pear.samples=2", "pear.behavior_epochs=1"),
    "switching": ("switching.loss_fall=1", "switching.least_epochs=2", "probe.every=1",
                  "switching.kl_change=1"),
}
FIRST = {setup.method: name for name, setup in reversed(SETUPS.items()) if setup.stages}
FOLDER = Path(methods.__file__).parent


# Resumption ---------------------------------------------------------------------------------------


def columns(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith("seconds")}


def test_every_method_resumes_bit_for_bit(make_trainer, make_policy):
    """Buffers, counts, draws, auxiliary weights, and every optimizer are in the checkpoint: a run
    resumed from its next-to-last one takes the same last steps. All cuts and setups: see below."""
    problems = make_trainer("rl", folder="other").parts.train
    wrong = []
    for method, setup in FIRST.items():
        def trainer(setup=setup, method=method, adapter=METHODS[method].adapters[0]):
            return make_trainer(
                setup, *SIX, *FEWER.get(method, ()), f"model.adapter={adapter}",
                f"training.checkpoint_every={4 if setup != 'switching' else 5}",
                policy=make_policy(adapter=adapter), folder=setup,
                validation=problems[:2] if method == "switching" else ())

        whole = trainer()
        whole.train()
        rows, weights = [columns(row) for row in rows_of(whole)], snapshot(whole)
        newest = whole.checkpoints.found()[0][1]
        newest.rename(whole.checkpoints.root / "later")
        again = trainer()
        again.train()
        cut = again.resumed_from
        if not (len(cut) == 1 and 3 < cut[0] < len(rows) and len(rows) >= 6
                and any(row["updates"] for row in rows[cut[0]:])
                and [columns(row) for row in rows_of(again)] == rows
                and all(torch.equal(w, weights[name]) for name, w in snapshot(again).items())):
            wrong.append((setup, cut, len(rows)))
    assert not wrong and set(FIRST) == set(METHODS)


class Ends(Observer):
    """Asks to stop after a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step(self, row, total):
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def cases():
    """(setup, adapter): every setup, and with an adapter too the first one of each method."""
    seen = set()
    for setup in map(get_setup, OTHERS):
        adapters = METHODS[setup.method].adapters
        yield setup.name, adapters[0]
        if setup.method not in seen and len(adapters) > 1:
            yield setup.name, adapters[1]
        seen.add(setup.method)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_setup_resumes_bit_for_bit(model_folders, monkeypatch, part):
    """Whole runs with their evaluation, cut after every second step, also with an adapter."""
    monkeypatch.setattr("hybridrl_lib.experiments.run.Verifier", Coin)

    def record(name, experiment, adapter, observer=None):
        setup = get_setup(name)
        folder = run(name, preset="tiny", experiment=experiment, observer=observer or Observer(),
                     settings=[*SMALL, *SIX, "evaluation.samples=0", "evaluation.train_samples=0",
                               "evaluation.train_limit=0", *setup.settings,
                               *FEWER.get(setup.method, ()),
                               f"model.path={model_folders['qwen2']}", "model.device=cpu",
                               f"model.adapter={adapter}"])
        final = folder.path / "checkpoint" / "final"
        return ([columns(row) for row in folder.lines("metrics.jsonl")],
                {path.name: path.read_bytes() for path in final.glob("*.safetensors")})

    wrong = []
    for name, adapter in list(cases())[part::4]:
        rows, weights = record(name, f"whole-{adapter}", adapter)
        for step in range(1, len(rows), 2):
            with pytest.raises(UserError):
                record(name, f"cut-{adapter}", adapter, Ends(step))
        if record(name, f"cut-{adapter}", adapter) != (rows, weights) or not (
                any(row["updates"] for row in rows) and len(rows) >= 6):
            wrong.append((name, adapter))
    assert not wrong


# Order and padding --------------------------------------------------------------------------------


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


# Every method that makes its own updates; `staged`, `deepseekmath`, and `switching` are `rl`.
OWN_UPDATES = (
    ("rl", ("rl.beta=0.5", "rl.kl_anchor=reference")), ("combined", ()), ("luffy", ()),
    ("superrl", ()), ("hpt", ()), ("chord_phi", ()), ("frpo", ("prl.beta=0.5",)),
    ("prl", ("prl.beta=0.5", "prl.step_tokens=4")), ("mifo", ("mifo.batch_size=3",)),
    ("relift", ("relift.batch_size=3",)), ("raft", ("rl.temperature=1.5",)),
    ("uft", ("uft.low=0.5", "uft.hinted=1", "uft.sft_coefficient=0.5")), ("prefix_rft", ()),
    ("pear_centered", ("pear.delta_low=-9", "pear.delta_high=9")), ("bridge", ()),
    ("sasr", ("sasr.gamma=1e9", "rl.beta=0.5")))  # a drawn SFT step has its own batch


def test_every_method_is_in_that_list():
    """A new one would skip the test of order and padding."""
    asked = {get_setup(setup).method for setup, _ in OWN_UPDATES}
    assert asked == set(METHODS) - {"deepseekmath", "switching"}


def last_step(make_trainer, make_policy, setup, *overrides):
    """(trainer after a short run, its last step of rollouts, compose); PEAR's is the last of SFT.

    compose(step, order) -> the method's updates at the weights as they are, every time from the
    same state. What it holds for each problem of the step (hints, hybrids) is in that order.
    """
    trainer = make_trainer(
        setup, "rl.updates_per_rollout=1", "rl.learning_rate=0.01",
        "training.micro_batch_tokens=200", *overrides, folder=f"last-{setup}",
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
    state, tensors = copy.deepcopy(method.state()), dict(method.tensors())
    shown = getattr(method, "shown", None)

    def compose(step, order=range(8)):
        if setup == "prefix_rft":
            method._sample = lambda step: [replace(hybrids[-1][i]) for i in order]
        if setup == "uft":
            method.shown = [shown[i] for i in order]
        method.load_state(copy.deepcopy(state), tensors)
        return make(step)
    return trainer, [step for step in steps if getattr(step, kind)][-1], compose


def test_order_and_padding_change_no_gradient(make_trainer, make_policy, monkeypatch):
    """Neither the order of problems, answers, demonstrations, and what a method holds for each
    problem, nor longer rows: an index into another list, or a mean over padding, would show."""
    wrong, length = [], packing._row_length
    for setup, overrides in OWN_UPDATES:
        trainer, step, compose = last_step(make_trainer, make_policy, setup, *overrides)
        draws, taught = random.Random(0), step.demonstrations
        order = draws.sample(range(8), 8)
        other = replace(step, demonstrations=draws.sample(taught, len(taught)), rollouts=[
            reordered(step.rollouts[i], draws.sample(range(4), 4)) for i in order if step.rollouts])
        ones, twos = compose(step), compose(other, order)
        assert len(ones) == 1 + (setup in ("relift", "mifo", "bridge"))
        expected = [gradient_of(trainer, update) for update in ones]
        for one, two, gradient in zip(ones, twos, expected, strict=True):
            assert one.sequences != two.sequences and gradient.norm() > 0, setup
            if distance(gradient_of(trainer, two), gradient) >= 1e-5:
                wrong.append((setup, "order"))
        if not overrides:  # a mistake shows: the advantages of one order, answers of the other
            two.advantages = one.advantages
            assert distance(gradient_of(trainer, two), expected[-1]) > 1e-2, setup
        if setup in ("uft", "prefix_rft"):  # and the hints or hybrids of one order
            mistake, = compose(other)
            assert distance(gradient_of(trainer, mistake), expected[-1]) > 1e-2, setup

        sizes, score = [], trainer.policy.score
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_row_length", lambda *given: length(*given) + 30)

            def noted(packed, score=score, sizes=sizes, **more):
                sizes.append(packed.input_ids.shape[1])
                return score(packed, **more)

            patch.setattr(trainer.policy, "score", noted)
            padded = [gradient_of(trainer, update) for update in compose(step)]
        if min(sizes) <= 30 or any(distance(*pair) >= 1e-5
                                   for pair in zip(padded, expected, strict=True)):
            wrong.append((setup, "padding"))
    assert not wrong


# Settings and files -------------------------------------------------------------------------------


def test_every_preset_has_settings_for_every_setup():
    """A preset's line for a method is read only when the method is chosen: here all are."""
    wrong = []
    for preset in preset_names():
        for name, chosen in SETUPS.items():
            settings = load_settings(preset, smoke=False, setup=chosen)
            plain = settings_to_dict(settings)
            again = settings_from_dict(plain)  # without its own settings a method has no name there
            if not ((make_method(chosen, settings).stages or name == "base")
                    and settings_to_dict(again) == plain and not difference(again, settings)
                    and (again == settings) == (chosen.method in plain)
                    and type(settings.method) is METHODS[chosen.method]
                    and all(meaning for _, _, meaning in describe(settings))):
                wrong.append((preset, name))
    assert not wrong


def test_methods_are_known_without_torch():
    """Settings and `hybridrl list` start fast."""
    code = ("import sys; from hybridrl_lib.config.methods import METHODS; import hybridrl_lib; "
            "print('torch' in sys.modules, *METHODS)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", *METHODS]


def test_a_method_is_one_short_file():
    """Named like its settings, with a docstring that says where the method comes from."""
    wrong = []
    for name in METHODS:
        text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        cls = method_class(name)
        if not (len(text.splitlines()) <= 250 and len(ast.get_docstring(ast.parse(text)) or "") > 60
                and cls.__doc__ and cls.__module__.endswith(name)
                and cls.__name__ == METHODS[name].algorithm):
            wrong.append(name)
    assert not wrong and method_class("superrl").__name__ == "SuperRL"


def test_a_setting_of_another_method_is_refused():
    """It would be ignored silently; without a setup it is checked: some setup may use it."""
    for overrides, setup, names in (
            (["relift.batch_size=3"], "combined", ("combined", "relift")),
            (["relift.batch_sise=3"], "relift", ("relift.batch_size",)),
            (["relift.batch_size=0"], None, ("relift.batch_size",))):
        with pytest.raises(UsageError) as caught:
            load_settings("tiny", overrides, setup=get_setup(setup) if setup else None)
        assert all(name in str(caught.value) for name in names)
    assert load_settings("tiny", ["relift.batch_size=3"]) == load_settings("tiny")
    chosen = load_settings("tiny", ["relift.batch_size=3"], setup=get_setup("relift"))
    assert chosen.method.batch_size == 3


def test_settings_that_a_method_cannot_work_with_are_refused():
    """By its settings class alone, before a model is loaded: adapters and dynamic sampling."""
    wrong = []
    for method, setup in FIRST.items():
        own = METHODS[method]
        for adapter in ("none", "lora"):
            if adapter not in own.adapters:
                wrong += not_refused(setup, {f"model.adapter={adapter}": "model.adapter"})
        if not own.dynamic_sampling:
            wrong += not_refused(setup, {
                "rl.dynamic_sampling_rounds=2": "rl.dynamic_sampling_rounds"})
    assert not wrong


def test_a_setup_gives_every_stage_its_share():
    """A stage without one would be left out silently."""
    setup = replace(get_setup("sft_then_rl"), shares=(0.5,))
    with pytest.raises(ValueError, match="zip"):
        make_method(setup, small_settings())
    shares = {name: small_settings("training.epochs=10", setup=name).method.stages(
        get_setup(name), 10) for name in ("sft_then_rl", "sft_then_full_rl", "combined", "raft")}
    assert shares == {"sft_then_rl": (("sft", 5), ("rl", 5)),
                      "sft_then_full_rl": (("sft", 5), ("rl", 10)),
                      "combined": (("rl", 5),), "raft": (("rl", 5),)}


def test_a_method_learns_its_base_only_where_it_says_so(make_trainer, make_policy):
    """With an adapter, only the adapter moves, except for a method with `trains_base`."""
    for setup in ("sft", "bridge"):
        policy = make_policy(adapter="lora")
        before = {name: w.detach().clone() for name, w in policy.model.named_parameters()}
        trained(make_trainer, setup, "model.adapter=lora", policy=policy, folder=setup)
        moved = {name for name, w in policy.model.named_parameters()
                 if not torch.equal(before[name], w)}
        own = METHODS[get_setup(setup).method]
        assert any("lora" in name for name in moved)
        assert any("lora" not in name for name in moved) == own.trains_base

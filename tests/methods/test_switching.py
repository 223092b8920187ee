"""`switching`: what ends a stage, how the epochs are shared, and that it is recorded."""

from dataclasses import replace

import pytest
from small_training import Fixed, not_refused, rows_of, trained

from hybridrl_lib.learning.progress import Progress, Stage
from hybridrl_lib.policy.completions import Completion, Group
from hybridrl_lib.report.arm_figures import draw_diagnostics
from hybridrl_lib.report.loading import Experiment, Run
from hybridrl_lib.training.evaluation import distinct_answers

OFF = ("switching.loss_fall=none", "switching.kl_change=none", "switching.distinct_answers=none",
       "switching.entropy=none")


def alone(make_trainer, *overrides, first="sft", epochs=10, **arguments):
    """A trainer without any reason to switch except the given ones; one step per epoch."""
    names = {text.partition("=")[0] for text in overrides}
    off = [text for text in OFF if text.partition("=")[0] not in names]
    return make_trainer("switching", f"training.epochs={epochs}", f"switching.first={first}",
                        "switching.least_epochs=0", *off, *overrides, **arguments)


def feed(trainer, hook, rows):
    """Shows the method rows at steps 1, 2, ...; the step at which it switched, or None."""
    method = trainer.method
    stage, steps = method.stages[0], trainer.steps_of(method.stages[0])
    for step, row in enumerate(rows, start=1):
        getattr(method, hook)(row, Progress(stage, step, steps, step))
        if len(method.stages) > 1:
            return step
    return None


def probes(**columns):
    """Rows of probe.jsonl with some columns, and others that give no reason to switch."""
    count = len(next(iter(columns.values())))
    return [{"kl/base": 2.0 ** i, "distinct_answers": 1.0, "entropy": 9.0}
            | {name.replace("kl", "kl/base"): values[i] for name, values in columns.items()}
            for i in range(count)]


@pytest.fixture()
def validation(make_trainer):
    """Two problems for probes and validation."""
    return make_trainer("rl", folder="other").parts.train[:2]


def test_the_rate_of_change_of_the_loss(make_trainer):
    """SFT ends at the first fall of less than 5 %, whatever switching.patience is."""
    found = {}
    for losses in ((1.0, 0.8, 0.6, 0.59), (1.0, 0.9, 0.8, 0.7), (1.0, 1.1, 0.8)):
        trainer = alone(make_trainer, "switching.loss_fall=0.05", "switching.patience=3")
        found[losses] = feed(trainer, "after_validation", [{"loss": loss} for loss in losses])
    assert list(found.values()) == [4, None, 2]  # 0.01 of 0.6 is less than 5 %; so is a rise


def test_the_loss_of_the_solutions_does_not_end_rl(make_trainer):
    """RL raises it from its first step on, and does not minimize it."""
    trainer = alone(make_trainer, "switching.loss_fall=0.05", "switching.entropy=0.001", first="rl")
    assert feed(trainer, "after_validation", [{"loss": 1.0}] * 5) is None


def test_the_stability_of_the_kl_divergence(make_trainer):
    """Both stages end when it has changed by less than 10 % `patience` times in a row."""
    rows = (([0.1, 0.2, 0.21, 0.20], 2, 4), ([0.1, 0.2, 0.21, 0.3, 0.31], 2, None),
            ([0.0, 0.0], 1, 2))  # a policy that does not move at all is perfectly stable
    for first in ("sft", "rl"):
        for kl, patience, at in rows:
            trainer = alone(make_trainer, "switching.kl_change=0.1",
                            f"switching.patience={patience}", first=first)
            assert feed(trainer, "after_probe", probes(kl=kl)) == at, (first, kl)


def test_the_diversity_of_the_answers(make_trainer):
    """Few distinct answers, or a low entropy, `patience` times in a row."""
    for name in ("distinct_answers", "entropy"):
        trainer = alone(make_trainer, f"switching.{name}=0.3", "switching.patience=2")
        assert feed(trainer, "after_probe", probes(**{name: [0.4, 0.2, 0.4, 0.2, 0.1]})) == 5
        assert trainer.method.switched == [{"step": 5, "to": "rl", "reason": name, "value": 0.1}]


def test_distinct_answers_are_the_final_ones():
    """However they are written; no answer counts as one more."""
    def group(*texts):
        return Group([1], [Completion([1], [0.0], [0.0], True, text) for text in texts])

    same = group(r"So \boxed{1,000}.", r"Or \boxed{ 1,000 }", "that is 1,000", "#### 1,000")
    assert distinct_answers([same]) == 0.25
    assert distinct_answers([group("none", "no", r"\boxed{3}", r"\boxed{4}")]) == 0.75
    assert distinct_answers([same, group("1", "2", "3", "4")]) == 0.625


def test_the_epochs_stay_the_runs(make_trainer, validation):
    """Back and forth, with stages of different steps per epoch: 6 epochs in all."""
    trainer = trained(
        make_trainer, "switching_rl_first", "training.epochs=6", "rl.prompts_per_step=2",
        "probe.every=3", *OFF[:3], "switching.entropy=1000", "switching.patience=1",
        validation=validation)
    rows = rows_of(trainer)
    names = [row["stage"] for row in rows]
    # RL has 4 steps per epoch, SFT one; the probe comes at every third step of the run.
    assert names == ["rl"] * 6 + ["sft"] * 3 + ["rl"] * 6
    assert rows[-1]["epoch"] == pytest.approx(6)
    assert [row["switching/switches"] for row in rows] == [0] * 6 + [1] * 3 + [2] * 6
    told = {row["step"]: row["switching/reason"] for row in rows if "switching/reason" in row}
    assert told == {7: "entropy", 10: "entropy"}
    assert [stage.steps for stage in trainer.method.stages] == [6, 3, 6]
    # a stage ends with a validation and a checkpoint, as always
    assert {6, 9, 15} <= {row["step"] for row in trainer.folder.lines("validation.jsonl")}


def test_the_signs_are_in_the_record(make_trainer, validation):
    """Each is there once, in the line after it was measured, with the numbers of the two logs:
    what the diagnostic figure draws. A sign that no setting reads is recorded as well."""
    trainer = trained(alone, make_trainer, "switching.loss_fall=1", "probe.every=2", epochs=6,
                      validation=validation)
    rows = rows_of(trainer)
    read = {name: {row["step"]: row[f"switching/{name}"] for row in rows
                   if f"switching/{name}" in row}
            for name in ("loss_fall", "kl_change", "distinct_answers", "entropy")}
    losses = {row["step"]: row["loss"] for row in trainer.folder.lines("validation.jsonl")}
    probes = {row["step"]: row for row in trainer.folder.lines("probe.jsonl")}
    # SFT, one step per epoch: the fall after the second validation ends it
    assert [row["stage"] for row in rows] == ["sft"] * 2 + ["rl"] * 4
    assert read["loss_fall"] == {3: (losses[1] - losses[2]) / losses[1]}
    for name in ("distinct_answers", "entropy"):
        assert read[name] == {step + 1: probes[step][name] for step in (2, 4)}
    assert read["kl_change"] == {}  # it takes two probes in a stage, and a step after them
    assert {row["step"]: row["switching/reason"] for row in rows if "switching/reason" in row} == {
        3: "loss_fall"}
    trainer = trained(alone, make_trainer, "switching.entropy=0.001", "probe.every=2", epochs=8,
                      validation=validation, folder="kl")
    kl = {row["step"]: row["kl/base"] for row in trainer.folder.lines("probe.jsonl")}
    assert {row["step"]: row["switching/kl_change"] for row in rows_of(trainer)
            if "switching/kl_change" in row} == {
        step + 1: abs(kl[step] - kl[step - 2]) / max(kl[step], kl[step - 2]) for step in (4, 6)}


def test_the_comparisons_figure_shows_signs_and_thresholds():
    """A threshold is a dashed line; a sign without one is drawn alone."""
    metrics = [{"step": step, "stage": "sft", "epoch": step, "switching/entropy": 0.5 / step,
                "switching/kl_change": 0.1} for step in (1, 2)]
    run = Run("switching", 0, {"settings": {"switching": {"entropy": 0.05, "kl_change": None}}},
              {}, metrics, [], {})
    figure = draw_diagnostics(Experiment("made", (run,), ()), "switching")
    found = {panel.get_title(loc="left"): [list(line.get_ydata()) for line in panel.lines]
             for panel in figure.axes}
    assert found == {"entropy": [[0.5, 0.25], [0.05, 0.05]], "KL change": [[0.1, 0.1]]}


def test_not_before_the_least_epochs_and_not_at_the_end(make_trainer):
    """A reason that holds from the start waits; where nothing is left, no empty stage follows."""
    trainer = alone(make_trainer, "switching.entropy=1000", "switching.patience=1",
                    "switching.least_epochs=3")
    assert feed(trainer, "after_probe", probes(entropy=[1.0] * 8)) == 3
    late = alone(make_trainer, "switching.entropy=1000", "switching.patience=1",
                 "switching.least_epochs=9.5", folder="late")
    assert feed(late, "after_probe", probes(entropy=[1.0] * 10)) is None
    assert late.method.stages == (Stage("sft", 10),)


def test_one_switch_means_one(make_trainer, validation):
    """switching.switches is a maximum."""
    trainer = trained(alone, make_trainer, "switching.entropy=1000", "switching.patience=1",
                      "probe.every=1", verifier=Fixed([1, 0, 0, 1]), validation=validation,
                      epochs=5)
    assert [row["stage"] for row in rows_of(trainer)] == ["sft"] + ["rl"] * 4


def test_a_loss_that_is_seldom_measured_is_ignored(make_trainer):
    """As at the preset smollm2, whose only validation is at the end; a note names the setting."""
    told = {}
    for every in (4, 5, 3):
        trainer = make_trainer("switching", "training.epochs=8",
                               f"training.validate_every={every}", "switching.loss_fall=1")
        notes = []
        trainer.method.begin(replace(trainer.method.run, note=notes.append))
        told[every] = ["switching.loss_fall" in note for note in notes]
    assert told == {4: [True], 5: [True], 3: []}


def test_wrong_settings_name_the_key():
    """A stage that could never end; no stage at all; values out of bounds."""
    assert not not_refused("switching", {
        OFF: "switching.loss_fall", ("switching.first=rl", *OFF[1:]): "switching.first",
        ("switching.switches=2", *OFF[1:]): "switching.switches",
        ("training.epochs=4", "training.validate_every=2", *OFF[1:]): "training.validate_every",
        ("training.epochs=8", "training.validate_every=3", "switching.least_epochs=7",
         *OFF[1:]): "training.validate_every",
        ("training.epochs=4", "switching.least_epochs=4"): "switching.least_epochs",
        "switching.first=both": "switching.first", "switching.kl_change=0": "switching.kl_change",
        "switching.switches=0": "switching.switches"})

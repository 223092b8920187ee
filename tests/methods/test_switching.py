"""`switching`: what ends a stage, how the epochs are shared, and that it is recorded."""

import pytest
from small_training import Fixed

from hybridrl_lib.learning.progress import Progress, Stage
from hybridrl_lib.policy.completions import Completion, Group
from hybridrl_lib.report.arm_figures import draw_diagnostics
from hybridrl_lib.report.loading import Experiment, Run
from hybridrl_lib.system.errors import UsageError
from hybridrl_lib.training.evaluation import distinct_answers

OFF = ("switching.loss_fall=none", "switching.kl_change=none", "switching.distinct_answers=none",
       "switching.entropy=none")


def alone(make_trainer, *overrides, first="sft", epochs=10, **arguments):
    """A trainer of which all reasons but those named are off; one step an epoch."""
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


@pytest.mark.parametrize(("losses", "patience", "at"), [
    ([1.0, 0.8, 0.6, 0.59], 1, 4),  # 0.01 of 0.6 is less than 5 %
    ([1.0, 0.8, 0.6, 0.59], 2, None),
    ([1.0, 1.1, 0.8, 0.79, 0.79], 2, 5),  # a rise is no fall; a fall starts the count again
    ([1.0, 0.9, 0.8, 0.7], 1, None)])
def test_the_rate_of_change_of_the_loss(make_trainer, losses, patience, at):
    trainer = alone(make_trainer, "switching.loss_fall=0.05", f"switching.loss_patience={patience}")
    assert feed(trainer, "after_validation", [{"loss": loss} for loss in losses]) == at


def test_the_loss_of_the_solutions_ends_no_rl(make_trainer):
    """RL raises it from its first step on and does not minimize it."""
    trainer = alone(make_trainer, "switching.loss_fall=0.05", "switching.entropy=0.001", first="rl")
    assert feed(trainer, "after_validation", [{"loss": 1.0}] * 5) is None


@pytest.mark.parametrize("first", ["sft", "rl"])
@pytest.mark.parametrize(("kl", "patience", "at"), [
    ([0.1, 0.2, 0.21, 0.20], 2, 4), ([0.1, 0.2, 0.21, 0.3, 0.31], 2, None),
    ([0.0, 0.0], 1, 2)])  # a policy that does not move at all is as stable as can be
def test_the_stability_of_the_kl_divergence(make_trainer, first, kl, patience, at):
    trainer = alone(make_trainer, "switching.kl_change=0.1", f"switching.kl_patience={patience}",
                    first=first)
    assert feed(trainer, "after_probe", probes(kl=kl)) == at


@pytest.mark.parametrize(("setting", "column"), [("distinct_answers", "distinct_answers"),
                                                 ("entropy", "entropy")])
def test_the_diversity_of_the_answers(make_trainer, setting, column):
    name = setting.replace("_answers", "")
    trainer = alone(make_trainer, f"switching.{setting}=0.3", f"switching.{name}_patience=2")
    assert feed(trainer, "after_probe", probes(**{column: [0.4, 0.2, 0.4, 0.2, 0.1]})) == 5
    assert trainer.method.switched == [{"step": 5, "to": "rl", "reason": column, "value": 0.1}]


def test_distinct_answers_are_the_final_ones():
    """However they are written; no answer is one more."""
    def group(*texts):
        return Group([1], [Completion([1], [0.0], [0.0], True, text) for text in texts])

    same = group(r"So \boxed{1,000}.", r"Or \boxed{ 1,000 }", "that is 1,000", "#### 1,000")
    assert distinct_answers([same]) == 0.25
    assert distinct_answers([group("none", "no", r"\boxed{3}", r"\boxed{4}")]) == 0.75
    assert distinct_answers([same, group("1", "2", "3", "4")]) == 0.625


def test_the_epochs_stay_the_runs(make_trainer):
    """Back and forth, with stages of different steps an epoch: 6 epochs in all."""
    trainer = make_trainer(
        "switching_rl_first", "training.epochs=6", "rl.prompts_per_step=2", "probe.every=3",
        *OFF[:3], "switching.entropy=1000", "switching.entropy_patience=1",
        validation=make_trainer("rl", folder="other").parts.train[:2])
    trainer.train()
    rows = trainer.folder.lines("metrics.jsonl")
    names = [row["stage"] for row in rows]
    # RL has 4 steps an epoch, SFT one; the probe comes at every third step of the run.
    assert names == ["rl"] * 6 + ["sft"] * 3 + ["rl"] * 6
    assert rows[-1]["epoch"] == pytest.approx(6)
    assert [row["switching/switches"] for row in rows] == [0] * 6 + [1] * 3 + [2] * 6
    told = {row["step"]: row["switching/reason"] for row in rows if "switching/reason" in row}
    assert told == {7: "entropy", 10: "entropy"}
    assert [stage.steps for stage in trainer.method.stages] == [6, 3, 6]
    # a stage ends with a validation and a checkpoint, as any other
    assert {6, 9, 15} <= {row["step"] for row in trainer.folder.lines("validation.jsonl")}


def test_the_signs_are_in_the_record(make_trainer):
    """Each stands once, in the line after it was measured, with the numbers of the two logs: what
    the diagnostic figure draws. A sign that no setting looks at is recorded as well."""
    trainer = alone(
        make_trainer, "switching.loss_fall=1", "switching.loss_patience=2", "probe.every=2",
        epochs=6, validation=make_trainer("rl", folder="other").parts.train[:2])
    trainer.train()
    rows = trainer.folder.lines("metrics.jsonl")
    read = {name: {row["step"]: row[f"switching/{name}"] for row in rows
                   if f"switching/{name}" in row}
            for name in ("loss_fall", "kl_change", "distinct_answers", "entropy")}
    losses = {row["step"]: row["loss"] for row in trainer.folder.lines("validation.jsonl")}
    probes = {row["step"]: row for row in trainer.folder.lines("probe.jsonl")}
    # SFT, a step an epoch: falls after the second and third validation, of which the latter ends it
    assert [row["stage"] for row in rows] == ["sft"] * 3 + ["rl"] * 3
    assert read["loss_fall"] == {
        step + 1: (losses[step - 1] - losses[step]) / losses[step - 1] for step in (2, 3)}
    for name in ("distinct_answers", "entropy"):
        assert read[name] == {step + 1: probes[step][name] for step in (2, 4)}
    assert read["kl_change"] == {}  # it takes two probes in a stage, and a step after them
    assert {row["step"]: row["switching/reason"] for row in rows if "switching/reason" in row} == {
        4: "loss_fall"}


def test_the_change_of_the_divergence_is_in_the_record(make_trainer):
    trainer = alone(make_trainer, "switching.entropy=0.001", "probe.every=2", epochs=8,
                    validation=make_trainer("rl", folder="other").parts.train[:2])
    trainer.train()
    rows = trainer.folder.lines("metrics.jsonl")
    kl = {row["step"]: row["kl/base"] for row in trainer.folder.lines("probe.jsonl")}
    assert {row["step"]: row["switching/kl_change"] for row in rows
            if "switching/kl_change" in row} == {
        step + 1: abs(kl[step] - kl[step - 2]) / max(kl[step], kl[step - 2]) for step in (4, 6)}


def test_the_comparisons_figure_shows_signs_and_thresholds():
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
    trainer = alone(make_trainer, "switching.entropy=1000", "switching.entropy_patience=1",
                    "switching.least_epochs=3")
    assert feed(trainer, "after_probe", probes(entropy=[1.0] * 8)) == 3
    late = alone(make_trainer, "switching.entropy=1000", "switching.entropy_patience=1",
                 "switching.least_epochs=9.5", folder="late")
    assert feed(late, "after_probe", probes(entropy=[1.0] * 10)) is None
    assert late.method.stages == (Stage("sft", 10),)


def test_one_switch_means_one(make_trainer):
    trainer = alone(make_trainer, "switching.entropy=1000", "switching.entropy_patience=1",
                    "probe.every=1", verifier=Fixed([1, 0, 0, 1]),
                    validation=make_trainer("rl", folder="other").parts.train[:2])
    trainer.train()
    assert [row["stage"] for row in trainer.folder.lines("metrics.jsonl")] == ["sft"] + ["rl"] * 9


@pytest.mark.parametrize(("every", "said"), [(4, True), (5, True), (3, False)])
def test_a_loss_that_is_seldom_measured_is_no_sign(make_trainer, every, said):
    """As at the preset smollm2, whose one validation is at the end; the other signs end stages."""
    trainer = make_trainer("switching", "training.epochs=8", f"training.validate_every={every}",
                           "switching.loss_fall=1")
    notes = []
    trainer.observer.note = notes.append
    trainer.method.begin(trainer)
    assert any("switching.loss_fall is not looked at" in note for note in notes) == said


@pytest.mark.parametrize(("overrides", "words"), [
    (OFF, "switching.loss_fall cannot be 'none': no stage could ever end"),
    (("switching.first=rl", *OFF[1:]), "switching.first cannot be 'rl': RL could never end"),
    (("switching.switches=2", *OFF[1:]), "switching.switches cannot be '2': RL could never end"),
    (("training.epochs=4", "training.validate_every=2", *OFF[1:]),
     "training.validate_every cannot be '2': SFT could never end"),
    (("training.epochs=8", "training.validate_every=3", "switching.least_epochs=7", *OFF[1:]),
     "training.validate_every cannot be '3': SFT could never end"),
    (("training.epochs=4", "switching.least_epochs=4"), "no stage could end before"),
    (("switching.first=both",), "one of sft, rl"),
    (("switching.kl_change=0",), "above 0"), (("switching.switches=0",), "at least 1")])
def test_wrong_settings_are_one_sentence(make_trainer, overrides, words):
    with pytest.raises(UsageError, match=words):
        make_trainer("switching", *overrides)

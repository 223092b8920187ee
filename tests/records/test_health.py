"""Detectors: silent on healthy runs, loud on sick ones, and unchanged by a resume."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from facts import lines_with
from small_training import SMALL, Coin, Fixed

from hybridrl_lib.config.presets import KEYS
from hybridrl_lib.experiments.run import run
from hybridrl_lib.notebook import wellness
from hybridrl_lib.notebook.live_view import LiveRun
from hybridrl_lib.notebook.wellness import show_health
from hybridrl_lib.problems.problem import Problem
from hybridrl_lib.records import health
from hybridrl_lib.records.health import DETECTORS, START, WINDOW, Health, replay
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.report.loading import Experiment, Run
from hybridrl_lib.report.page import warnings_table
from hybridrl_lib.rewards.verifier import REASONS, Verdict, Verifier
from hybridrl_lib.training.observer import Lines, Observer

PUBLISHED = Path(__file__).parents[2] / "results" / "published"
# experiment/setup/seed-n: names of its warnings. RL never sees a correct answer at smollm2.
SAID = {"smollm2/rl/seed-0": ["reward_zero"],
        "smollm2/rl_entropy/seed-0": ["reward_zero", "entropy_explosion"]}
NAMES = {detector.name for detector in DETECTORS}


def test_published_runs_are_silent():
    """No false alarm in published runs; every reason has advice, of settings that exist."""
    said, runs = {}, sorted(path.parent for name in ("tiny", "smollm2")
                            for path in PUBLISHED.glob(f"{name}/*/seed-*/metrics.jsonl*"))
    for folder in runs:
        record = RunFolder(folder)
        alarms = replay(record.lines("metrics.jsonl"), record.lines("probe.jsonl")).alarms
        if alarms:
            said[folder.relative_to(PUBLISHED).as_posix()] = [alarm.name for alarm in alarms]
    assert said == SAID and len(runs) >= 30
    assert set(health.FAULTS) == set(REASONS) - {"right"}
    source = Path(health.__file__).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:rl|sft|model|data|training|verifier)\.[a-z_]+", source))
    assert len(named) > 6 and named <= set(KEYS), named - set(KEYS)


class Listener(Observer):
    def __init__(self):
        self.heard = []

    def on_warning(self, name, sentence):
        self.heard.append((name, sentence))


class Silence(Coin):
    """Rewards empty answers, which a policy learns at once."""

    def verify(self, golds, texts, finished):
        return [Verdict(not text, not text, "wrong" if text else "right") for text in texts]


@pytest.fixture()
def sicken(make_trainer):
    """sicken(setup, ...) -> {name: Alarm} of a run of 16 steps, whose record is checked, too."""
    def train(setup, *overrides, prepare=None, **arguments):
        listener = Listener()
        trainer = make_trainer(setup, "training.epochs=16", "rl.reference_every=1", *overrides,
                               observer=listener, **arguments)
        if prepare:
            prepare(trainer)
        trainer.train()
        rows = trainer.folder.lines("metrics.jsonl")
        alarms = trainer.health.alarms
        assert listener.heard == [(alarm.name, str(alarm)) for alarm in alarms]
        assert replay(rows, trainer.folder.lines("probe.jsonl")).alarms == alarms
        for row in rows:
            held = sorted(alarm.name for alarm in alarms if alarm.step <= row["step"]
                          and (alarm.ended is None or row["step"] < alarm.ended))
            assert row.get("warnings", []) == held and row.get("warnings") != []
        return {alarm.name: alarm for alarm in alarms}
    return train


def test_sick_runs_are_named_with_their_setting(sicken, make_policy, make_trainer):
    """Real runs of 16 steps, one per symptom; a healthy one has no warning."""
    assert sicken("rl") == {}
    alarms = sicken("rl", "rl.learning_rate=0.02", verifier=Silence(), folder="collapse")
    assert "rl.learning_rate" in alarms["entropy_collapse"].advice
    policy = make_policy("llama")
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(5)  # confident
    alarms = sicken("rl_entropy", "rl.gamma=10", "rl.learning_rate=0.003", policy=policy,
                    folder="explosion")
    assert "rl.gamma" in alarms["entropy_explosion"].advice
    alarms = sicken("rl", "rl.learning_rate=0.05", folder="runaway")
    assert "rl.learning_rate" in alarms["kl_runaway"].advice
    validation = make_trainer("sft", folder="none").parts.train[:2]
    alarms = sicken("sft", "sft.learning_rate=1", "probe.every=2", validation=validation,
                    folder="sft")
    assert "sft.learning_rate" in alarms["kl_runaway"].advice
    assert alarms["kl_runaway"].step == 5, "after the probes of steps 2 and 4"
    verifier = Fixed([1, 0] * 16 * 9 + [0] * 32 * 20)  # correct half of the time, then never
    alarms = sicken("rl", verifier=verifier, folder="fall")
    assert alarms["reward_fall"].step == 9 + WINDOW // 2


def test_the_advice_on_reward_zero_follows_from_the_verdicts(sicken):
    """Longer answers only help those that were truncated."""
    with Verifier(1, 5.0) as verifier:
        short = sicken("rl", "rl.max_new_tokens=2", verifier=verifier, folder="short")
        long = sicken("rl", "rl.max_new_tokens=40", verifier=verifier, folder="long")
    wrong = sicken("rl", verifier=Fixed([0]), folder="wrong")
    alarms = [found["reward_zero"] for found in (short, long, wrong)]
    assert {alarm.step for alarm in alarms} == {WINDOW}
    assert [alarm.advice for alarm in alarms] == [
        health.FAULTS[reason][1] for reason in ("truncated", "no_box", "wrong")]
    assert "rl.max_new_tokens" in alarms[0].advice and "100%" in alarms[2].sentence
    assert not {"no_signal"} & {*short, *long, *wrong}, "reported once, with its reason"
    assert "length_limit" in short and "length_limit" not in long
    learned = sicken("rl", verifier=Fixed([1]), folder="learned")["no_signal"]
    hard = sicken("rl", verifier=Fixed([1] * 4 + [0] * (32 * 8 - 4)), folder="hard")["no_signal"]
    assert learned.step == hard.step == WINDOW and learned.advice != hard.advice


def test_gradient_spike(sicken):
    """One problem unlike all others is one step; a loss that is NaN once holds for a window."""
    likes = [Problem(id=f"a/{i}", question="How many?", solution=r"\boxed{3}", answer="3",
                     benchmark="tiny_word") for i in range(7)]
    stranger = replace(likes[0], id="a/7", solution="9 * 8 = 72, 72 - 69 = 3.")

    def arrange(trainer):
        trainer._batch = lambda progress, *rest: [stranger] if progress.step == 40 else likes

    alarms = sicken("sft", "sft.learning_rate=0.003", "training.epochs=44", prepare=arrange,
                    train=[*likes, stranger])
    assert (alarms["gradient_spike"].step, alarms["gradient_spike"].ended) == (41, 42)
    def poison(trainer):
        loss = trainer.learner._loss
        trainer.learner._loss = lambda *arguments: loss(*arguments) * (
            float("nan") if trainer.step == 3 else 1)

    alarm = sicken("sft", prepare=poison, folder="poisoned")["not_finite"]
    assert (alarm.step, alarm.ended) == (4, 4 + WINDOW)


def row(step, stage="rl", **values):
    return {"step": step, "stage": stage, "gamma": 0.0, "reward": 0.5, "entropy": 1.0,
            "frac_reward_zero_std": 0.5, "completions/clipped_ratio": 0.0, "grad_norm": 1.0,
            "verdicts": {"right": 8, "wrong": 8}, "groups/correct_counts": [1, 2, 1], **values}


def healthy(count, start=1, **values):
    return [row(step, **values) for step in range(start, start + count)]


def steps_of(rows, name, probe=()):
    """(began, ended) of every warning of a name."""
    return [(alarm.step, alarm.ended) for alarm in replay(rows, probe).alarms if alarm.name == name]


def test_a_warning_begins_once_and_ends_lower():
    """A level between the two thresholds neither begins a warning nor ends it."""
    wrong = []
    for name, key, sick, between, well in (
            ("entropy_collapse", "entropy", 0.04, 0.08, 0.2),
            ("entropy_explosion", "entropy", 2.1, 1.7, 1.2),
            ("kl_runaway", "kl/reference", 1.1, 0.7, 0.2),
            ("reward_fall", "reward", 0.2, 0.3, 0.4),
            ("no_signal", "frac_reward_zero_std", 1.0, 0.92, 0.5),
            ("length_limit", "completions/clipped_ratio", 1.0, 0.8, 0.1)):
        rows = healthy(20)
        for level in (between, sick, between, sick, between, well, between, sick):
            rows += healthy(20, len(rows) + 1, **{key: level})
        found = steps_of(rows, name)
        if len(found) != 2 or not (40 < found[0][0] <= 60 and 120 < found[0][1] <= 140
                                   and 160 < found[1][0] and found[1][1] is None):
            wrong.append((name, found))
    assert not wrong
    rows = healthy(20) + [row(21, grad_norm=11.0)] + healthy(20, 22)
    assert steps_of(rows, "gradient_spike") == [(21, 22)]
    assert steps_of(healthy(20) + [row(21, grad_norm=9.0)], "gradient_spike") == []
    rows = healthy(30, grad_norm=1e-4, frac_reward_zero_std=1.0) + healthy(20, 31)
    assert steps_of(rows, "gradient_spike") == []


def test_what_is_compared():
    """Each stage starts afresh; rollouts and demonstrations apart; no symptom without a column."""
    sft = [row(step, "sft", entropy=1.0 if step < 10 else 0.01) for step in range(1, 31)]
    alarms = replay([*sft, *healthy(30, 31, entropy=0.01)]).alarms
    assert [(alarm.name, alarm.stage, alarm.ended) for alarm in alarms] == [
        ("entropy_collapse", "sft", 31)]
    rows = [row(step, reward=float(step % 20 == 0 or step > 100)) for step in range(1, 120)]
    assert steps_of(rows, "reward_zero") == [(8, 102)]
    for count in range(1, WINDOW):
        assert replay(healthy(count, entropy=9.0, reward=0.0, grad_norm=50.0)).alarms == []
    assert START < WINDOW
    rows = healthy(60)
    for taught in rows[1::2]:
        taught["entropy"] = 0.01
        del taught["reward"]
    assert replay(rows).alarms == []
    bare = [{"step": step, "stage": "mine"} for step in range(1, 40)]
    assert replay(bare).alarms == []
    no_verdicts = [{**entry, "reward": 0.0} for entry in bare]
    assert [alarm.name for alarm in replay(no_verdicts).alarms] == ["reward_zero"]


class Crash(Exception):
    pass


class CrashAt(Listener):
    def __init__(self, step=0):
        super().__init__()
        self.step = step

    def on_step(self, row, total):
        if row["step"] == self.step:
            raise Crash


def test_a_resumed_run_warns_like_an_uninterrupted_one(model_folders, monkeypatch):
    """The state comes from the rows: stopped before, between, or after warnings, it is the same."""
    monkeypatch.setattr("hybridrl_lib.experiments.run.Verifier", Coin)
    settings = (*SMALL, "training.epochs=12", "training.checkpoint_every=2", "probe.every=3",
                "rl.learning_rate=0.05", "rl.reference_every=4", "model.device=cpu",
                f"model.path={model_folders['qwen2']}")

    def rows_of(experiment, *cuts):
        for step in cuts:
            with pytest.raises(Crash):
                run("rl", experiment=experiment, settings=settings, observer=CrashAt(step))
        last = CrashAt()
        folder = run("rl", experiment=experiment, settings=settings, observer=last)
        rows = [{key: value for key, value in entry.items() if not key.startswith("seconds")}
                for entry in folder.lines("metrics.jsonl")]
        return rows, last.heard

    whole, heard = rows_of("whole")
    began = [next(entry["step"] for entry in whole if name in entry.get("warnings", ()))
             for name, _ in heard]
    assert began[0] <= 6 < began[-1], "one warning before the checkpoint of step 6, one after"
    cut, heard_again = rows_of("cut", 3, 8)  # from the checkpoints of steps 2 and 6
    assert json.dumps(cut) == json.dumps(whole)
    assert heard_again == [entry for entry, step in zip(heard, began, strict=True) if step > 6]
    cut, heard_again = rows_of("late", 11)
    assert json.dumps(cut) == json.dumps(whole) and heard_again == []


def sick_rows():
    return healthy(20) + healthy(10, 21, entropy=0.01)


def test_plain_lines_have_the_warning_at_once(capsys):
    """A log that is read the next morning has the step, the sentence, and the advice."""
    said = []
    lines = Lines(1e9, "rl", write=said.append)
    watch = Health()
    for entry in sick_rows():
        for alarm in watch.see(entry):
            lines.on_warning(alarm.name, str(alarm))
    (alarm,) = watch.alarms
    assert len(said) == 1 and lines_with(said[0], "entropy_collapse", 25, "rl.learning_rate")
    assert said[0].endswith(str(alarm)) and alarm.advice in said[0]
    view = LiveRun("rl", show=None)
    view.due = float("inf")
    view.on_warning("no_signal", "step 3: <b>bad</b>")
    view.on_step(row(3, epoch=1.0, warnings=["no_signal"]), total=9)
    assert "no_signal" in view.html() and "&lt;b&gt;bad" in view.html()
    view.on_step(row(4, epoch=1.0), total=9)
    assert "no_signal" not in view.html()
    assert lines_with(capsys.readouterr().out, "no_signal", 3, "<b>bad</b>")


def test_show_health(tmp_path, monkeypatch, capsys):
    """A notebook and a report list the warnings with advice, or say that there are none."""
    shown = []
    monkeypatch.setattr(wellness, "display", lambda piece: shown.append(piece.data))
    record = RunFolder(tmp_path)
    show_health(record)
    nothing_trained = capsys.readouterr().out
    record.write_lines("metrics.jsonl", healthy(20))
    show_health(record)
    no_warning = capsys.readouterr().out
    assert nothing_trained and nothing_trained != no_warning and not shown
    assert lines_with(no_warning, len(NAMES))
    record.write_lines("metrics.jsonl", sick_rows())
    show_health(record)
    assert lines_with(shown[0], "entropy_collapse", 25, "0.01") and "rl.learning_rate" in shown[0]
    def made(seed, metrics):
        return Run("rl", seed, {}, {}, metrics, [], {})

    well, ill = made(0, healthy(20)), made(1, sick_rows())
    nothing = warnings_table(Experiment("a", (well,), ()))
    assert lines_with(nothing, len(NAMES), 1) and "| RL |" not in nothing
    text = warnings_table(Experiment("a", (well, ill), ()))
    assert "| RL | 1 | entropy_collapse |" in text and "| RL | 0 |" not in text

"""Names from users, notebooks, and other people's records stay inside the results folder."""

import json
import os
from pathlib import Path

import pytest
from papermill.translators import PythonTranslator

from hybridrl_lib import setups
from hybridrl_lib.cli import main
from hybridrl_lib.experiments.reproduce import reproduce
from hybridrl_lib.experiments.run import run
from hybridrl_lib.notebook.place import begin, experiment_path
from hybridrl_lib.records.folders import experiment_folder, is_plain_name
from hybridrl_lib.records.run_folder import RunFolder, run_folder
from hybridrl_lib.system.errors import UserError

HOSTILE_NAMES = ("../up", "../../x", "..", ".", "", "/tmp/x", "a/b", "a/../../b", "\\up", "a\\b",
                 ".hidden", "a\nb", "a\0b", "-rf", "~", "~root", "$HOME", "a b", "a;b", "a`b`",
                 "<b>", "a|b", "\u202egnp", "x" * 300, "C:x", None, 2025, ["a"])
HOSTILE_SEEDS = ("../3", "3", "0/../../x", -1, 1.5, True, None, "")


@pytest.fixture(autouse=True)
def nothing_outside(tmp_path, monkeypatch):
    """Every test ends with nothing written but the results folder, two levels down."""
    place = tmp_path / "one" / "two"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HYBRIDRL_SMOKE", "1")
    monkeypatch.setenv("HYBRIDRL_RESULTS_DIR", str(place / "runs"))
    yield place
    found = {path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*")}
    assert found <= {("one",), ("one", "two"), ("one", "two", "runs"), ("record",),
                     ("record", "config.json"), ("record", "manifest.json"),
                     ("record", "eval.jsonl")}


def refused(error: type[Exception], function, *arguments, **named) -> str:
    """The message of the error that a call must raise."""
    with pytest.raises(error) as caught:
        function(*arguments, **named)
        pytest.fail(f"{function.__name__} accepted {arguments} {named}")
    return str(caught.value)


def ignore(line: str) -> None:
    """Takes a line of progress."""


def test_experiment_names():
    """An experiment's name is a single folder's name, wherever it comes from."""
    for name in HOSTILE_NAMES:
        assert "\n" not in refused(UserError, experiment_folder, name)
        if name:  # without a name, the preset's is used
            refused(UserError, run, "sft", "tiny", 0, name)
            refused(UserError, experiment_path, "tiny", name)
            refused(UserError, reproduce, "tiny", experiment=name, say=ignore)
            refused(UserError, begin, "tiny", 0, name, "")
    for name in ("tiny", "tiny-smoke", "2025", "lr_3e-4", "v1.2+x", "опыт", "ß"):
        assert is_plain_name(name) and experiment_folder(name).name == name


def test_setups_and_seeds():
    """A setup is a name in the table, whose names and titles are plain; a seed is a number."""
    for setup in ("../x", "", "sft/../../x", "/tmp/x", None, 3):
        assert "setup" in refused(UserError, run, setup, "tiny", 0)
        assert "setup" in refused(UserError, run_folder, Path("x"), setup, 0)
    for seed in HOSTILE_SEEDS:
        assert "seed" in refused(UserError, run, "sft", "tiny", seed)
        assert "seed" in refused(UserError, reproduce, "tiny", seeds=[seed], setups=["sft"],
                                 say=ignore)
    for name, title in (("../x", "X"), ("a b", "X"), ("x", "<b>"), ("x", "a|b"), ("x", "$x$"),
                        ("x", "[a](b)"), ("x", "`a`"), ("x", "a\nb"), ("x", "a\\b")):
        refused(ValueError, setups.Setup, name, title, ("sft",))
    setups.Setup("mine-2", "Mine (λ = 0.3) + entropy", ("sft",))


GOOD = {"setup": "sft", "preset": "tiny", "seed": 3, "experiment": "x", "settings": {}}
HOSTILE_CONFIGS = [
    {"experiment": "../../x"}, {"experiment": "/tmp/x"}, {"experiment": ["a"]}, {"setup": "../x"},
    {"setup": "/tmp"}, {"setup": None}, {"setup": ["sft"]}, {"setup": {}}, {"seed": "../3"},
    {"seed": None}, {"seed": 1.5}, {"seed": [1]}, {"seed": -1}, {"preset": "../x"},
    {"preset": "../../../etc/passwd"}, {"preset": None}, {"preset": ["tiny"]}, {"settings": []},
    {"settings": {"../x": {}}}, {"settings": {"rl": 3}}, {"settings": None},
    {"settings": {"model": {"path": ["/etc"]}}}, {"settings": {"rl": {"beta": {"a": 1}}}},
    {"settings": {"data": {"benchmarks": "../x"}}}, {"settings": {"model": {"path": "../x"}}}]


@pytest.fixture()
def no_training(monkeypatch):
    """A record that is accepted fails the test at once, instead of training its setup."""
    def train(*arguments, **more):
        raise AssertionError("a run was started")

    monkeypatch.setattr("hybridrl_lib.training.trainer.Trainer.train", train)


DAMAGED = [("config.json", []), ("config.json", "text"), ("config.json", {"setup": "sft"}),
           ("manifest.json", [1]), ("manifest.json", {"threads": 10**9}),
           ("manifest.json", {"threads": "../x"}), ("manifest.json", {"threads": -1})]


def test_rerun_of_a_hostile_or_damaged_record(nothing_outside, no_training, tmp_path, capsys):
    """People share manifests: a forged or damaged one is refused in one sentence."""
    record, wrong = RunFolder(tmp_path / "record"), []
    record.write_lines("eval.jsonl", [])
    for name, content in [("config.json", GOOD | changes) for changes in HOSTILE_CONFIGS] + DAMAGED:
        record.write("config.json", GOOD)
        record.write("manifest.json", {"complete": True, "threads": 1})
        (record.path / name).write_text(json.dumps(content))
        code, errors = main(["rerun", str(record.path)]), capsys.readouterr().err
        if (code not in (1, 2) or not errors.startswith("hybridrl: ") or errors.count("\n") != 1
                or "HYBRIDRL_DEBUG" in errors  # named in errors that nobody expected
                or (name, content) in DAMAGED and not (
                    code == 1 and any(part in errors for part in ("record", name)))):
            wrong.append((name, content, code, errors))
    assert not wrong
    assert not list(nothing_outside.glob("runs/*/*/*/metrics.jsonl"))


def test_parameters_of_a_notebook_stay_texts():
    """papermill writes parameters into a code cell: a text cannot become part of the code."""
    for value in NOTEBOOK_PARAMETERS:
        names = {}
        exec(PythonTranslator.codify({"experiment": value, "settings": value}), names)
        assert names["experiment"] == names["settings"] == value
    assert not os.path.exists("ran")


NOTEBOOK_PARAMETERS = ['"; open("ran", "w"); "', "'''; open('ran', 'w'); '''",
                       '"""; open("ran", "w"); """', "\\\"; open('ran', 'w') #",
                       "\nopen('ran', 'w')\n", "\r\nopen('ran', 'w')", "{open('ran', 'w')}",
                       "\u2028open('ran', 'w')", "# -*- coding: utf-7 -*-"]

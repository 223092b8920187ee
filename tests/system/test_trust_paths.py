"""Names from users, notebooks and other people's records stay inside the results folder."""

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
    """Every test ends with nothing written but the results folder, two levels deep, if that."""
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


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
def test_experiment_names(name):
    """An experiment's name is one folder's name, wherever it comes from."""
    with pytest.raises(UserError, match="plain folder name") as caught:
        experiment_folder(name)
    assert "\n" not in str(caught.value)
    if name:  # nothing given: the preset's name is taken
        for use in (lambda: run("sft", "tiny", 0, name), lambda: experiment_path("tiny", name),
                    lambda: reproduce("tiny", experiment=name, say=lambda line: None),
                    lambda: begin("tiny", 0, name, "")):
            with pytest.raises(UserError, match="plain folder name"):
                use()


@pytest.mark.parametrize("name", ["tiny", "tiny-smoke", "2025", "lr_3e-4", "v1.2+x", "опыт", "ß"])
def test_ordinary_names_are_taken(name):
    """The rule keeps nobody from a name of their own language."""
    assert is_plain_name(name) and experiment_folder(name).name == name


@pytest.mark.parametrize("seed", HOSTILE_SEEDS, ids=repr)
def test_seeds(seed):
    """A notebook's seed is a parameter, and papermill makes a text of what is no number."""
    with pytest.raises(UserError, match="seed"):
        run("sft", "tiny", seed)
    with pytest.raises(UserError, match="seed"):
        reproduce("tiny", seeds=[seed], setups=["sft"], say=lambda line: None)


@pytest.mark.parametrize("setup", ["../x", "", "sft/../../x", "/tmp/x", None, 3], ids=repr)
def test_setups(setup):
    """A setup is a name in the table and nothing else."""
    with pytest.raises(UserError, match="setup"):
        run(setup, "tiny", 0)
    with pytest.raises(UserError, match="setup"):
        run_folder(Path("x"), setup, 0)


def test_a_setup_of_ones_own_has_a_plain_name():
    """The table's names become folders, its titles cells of tables: neither may break out."""
    for name, title in (("../x", "X"), ("a b", "X"), ("x", "<b>"), ("x", "a|b"), ("x", "$x$"),
                        ("x", "[a](b)"), ("x", "`a`"), ("x", "a\nb"), ("x", "a\\b")):
        with pytest.raises(ValueError, match="plain name"):
            setups.Setup(name, title, ("sft",))
    setups.Setup("mine-2", "Mine (λ = 0.3) + entropy", ("sft",))


GOOD = {"setup": "sft", "preset": "tiny", "seed": 3, "experiment": "x", "settings": {}}


@pytest.mark.parametrize("changes", [
    {"experiment": "../../x"}, {"experiment": "/tmp/x"}, {"experiment": ["a"]},
    {"setup": "../x"}, {"setup": "/tmp"}, {"setup": None}, {"setup": ["sft"]}, {"setup": {}},
    {"seed": "../3"}, {"seed": None}, {"seed": 1.5}, {"seed": [1]}, {"seed": -1},
    {"preset": "../x"}, {"preset": "../../../etc/passwd"}, {"preset": None}, {"preset": ["tiny"]},
    {"settings": []}, {"settings": {"../x": {}}}, {"settings": {"rl": 3}}, {"settings": None},
    {"settings": {"model": {"path": ["/etc"]}}}, {"settings": {"rl": {"beta": {"a": 1}}}},
    {"settings": {"data": {"benchmarks": "../x"}}}, {"settings": {"model": {"path": "../x"}}},
], ids=repr)
def test_rerun_of_a_hostile_record(nothing_outside, tmp_path, capsys, changes):
    """People hand each other manifests: one that is made up is refused in a sentence."""
    record = RunFolder(tmp_path / "record")
    record.write("config.json", GOOD | changes)
    record.write("manifest.json", {"complete": True, "threads": 1})
    record.write_lines("eval.jsonl", [])
    assert main(["rerun", str(record.path)]) in (1, 2)
    errors = capsys.readouterr().err
    assert errors.startswith("hybridrl: ") and errors.count("\n") == 1, errors
    assert "Unexpected" not in errors
    assert not list(nothing_outside.glob("runs/*/*/*/metrics.jsonl"))


@pytest.mark.parametrize(("name", "content"), [
    ("config.json", []), ("config.json", "text"), ("config.json", {"setup": "sft"}),
    ("manifest.json", [1]), ("manifest.json", {"threads": 10**9}),
    ("manifest.json", {"threads": "../x"}), ("manifest.json", {"threads": -1}),
], ids=repr)
def test_rerun_of_a_damaged_record(tmp_path, capsys, name, content):
    """Parts that are missing or of another kind are named."""
    record = RunFolder(tmp_path / "record")
    record.write("config.json", GOOD)
    record.write("manifest.json", {"complete": True})
    record.write_lines("eval.jsonl", [])
    (record.path / name).write_text(json.dumps(content))
    assert main(["rerun", str(record.path)]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "damaged" in errors


@pytest.mark.parametrize("value", [
    '"; open("ran", "w"); "', "'''; open('ran', 'w'); '''", '"""; open("ran", "w"); """',
    "\\\"; open('ran', 'w') #", "\nopen('ran', 'w')\n", "\r\nopen('ran', 'w')",
    "{open('ran', 'w')}", "\u2028open('ran', 'w')", "# -*- coding: utf-7 -*-",
])
def test_parameters_of_a_notebook_stay_texts(value):
    """papermill writes parameters into a cell of code: a text cannot become part of the code."""
    names = {}
    exec(PythonTranslator.codify({"experiment": value, "settings": value}), names)
    assert names["experiment"] == names["settings"] == value
    assert not os.path.exists("ran")

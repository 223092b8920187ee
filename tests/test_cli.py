"""The command `hybridrl`: exit codes, one-sentence errors, and what each command prints."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from facts import lines_with
from synthetic_records import build_experiment

from hybridrl_lib import cli
from hybridrl_lib.cli import COMMANDS, main
from hybridrl_lib.config import presets
from hybridrl_lib.experiments import commands
from hybridrl_lib.machine import catalogue
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.system.errors import UsageError, UserError

# Never imported by commands that start at once.
HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft")
LIGHT = [["--version"], ["list", "--json"], *([name, "--help"] for name in COMMANDS)]


@pytest.fixture()
def smoke(monkeypatch):
    """Runs take about a second."""
    monkeypatch.setenv("HYBRIDRL_SMOKE", "1")


def written(results: Path, experiment: str = "tiny-smoke", setup: str = "sft") -> RunFolder:
    return RunFolder(results / experiment / setup / "seed-0")


def test_light_parts_do_not_import_torch(results):
    """The verifier's worker, settings, help, lists, and reports start without torch."""
    build_experiment(results / "small", setups=("base", "sft"), seeds=(0, 1),
                     test={"tiny_word": 6}, train={"tiny_word": 4}, epochs=2)
    program = (
        "import sys\n"
        f"heavy = {HEAVY!r}\n"
        "def imported(*names): return sorted({*names} & set(sys.modules))\n"
        "from hybridrl_lib.rewards import math_check\n"
        "assert math_check.check('x+1', '1+x') == 'right'\n"
        "assert not imported('numpy', *heavy), imported('numpy', *heavy)\n"
        "from hybridrl_lib.config.presets import load_settings\n"
        "load_settings('tiny')\n"
        "assert not imported(*heavy), imported(*heavy)\n"
        "from hybridrl_lib.cli import main\n"
        "from hybridrl_lib.report import report\n"
        "report.as_bytes = lambda figure, kind: b''\n"  # drawing takes most of the time
        f"for words in {[*LIGHT, ['report', 'small']]!r}:\n"
        "    assert main(words) == 0, words\n"
        "    assert not imported(*heavy), (words, imported(*heavy))\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert (results / "small" / "table2.csv").is_file()
    done = subprocess.run(
        f"'{sys.executable}' -m hybridrl_lib.cli list --json | head -c 10", shell=True,
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert len(done.stdout) == 10 and done.stderr == ""


def test_every_command_has_help_with_an_example(capsys):
    """A user finds a line to copy, and that line is valid."""
    for name, (*_, example) in COMMANDS.items():
        assert main([name, "--help"]) == 0
        assert example in capsys.readouterr().out and example.startswith(f"hybridrl {name}")
        _, left_over = cli.make_parser(name).parse_known_args(example.split()[1:])
        assert not left_over, example
    assert [cli.seed_list(text) for text in ("3", "0,4,7", "4,")] == [(0, 1, 2), (0, 4, 7), (4,)]


def test_wrong_use_is_one_sentence_and_exit_2(capsys, monkeypatch):
    """A misspelled call names what was probably meant, without a usage page or a traceback."""
    wrong = []
    for words, hint in (
            (["rnu", "sft"], "'run'"), (["run"], "SETUP"),
            (["run", "sft", "--prest", "tiny"], "'--preset'"), (["run", "sft", "rl"], "'rl'"),
            (["run", "sft", "--seed", "-1"], "'-1'"), (["reproduce", "--seeds", "0"], "'0'"),
            (["reproduce", "--jobs", "x"], "'x'"), (["reproduce", "--setups", "sft,rll"], "'rl'"),
            (["--vresion"], "'--version'"), (["doctor", "--preset", "papre"], "'paper'")):
        code, (out, err) = main(words), capsys.readouterr()
        if code != 2 or out or err.count("\n") != 1 or not err.startswith("hybridrl: ") or (
                hint not in err):
            wrong.append((words, code, out, err))
    assert not wrong
    assert main([]) == 2
    assert "reproduce" in capsys.readouterr().out
    monkeypatch.setenv("HYBRIDRL_DEBUG", "1")
    with pytest.raises(UsageError):
        main(["run", "stf"])


def test_errors_become_one_sentence(monkeypatch, capsys):
    """Nothing that a command raises reaches the user as a traceback."""
    raised = []

    def fail(arguments):
        raise raised[-1]

    monkeypatch.setitem(COMMANDS, "list", (fail, "--json", "", ""))
    wrong = []
    for error, code, hint in (
            (UserError("Do this."), 1, "Do this."), (UsageError("Not so."), 2, "Not so."),
            (KeyboardInterrupt(), 130, "command"),
            (OSError(errno.ENOSPC, "No space left on device"), 1, "HYBRIDRL_RESULTS_DIR"),
            (PermissionError(errno.EACCES, "Permission denied", "a/b"), 1, "a/b"),
            (MemoryError(), 1, "micro_batch_tokens"),
            (RuntimeError("CUDA error: out of memory\nMore"), 1, "micro_batch_tokens"),
            (RuntimeError("mat1 and mat2 do not fit"), 1, "HYBRIDRL_DEBUG"),
            (ZeroDivisionError("division by zero\nsecond line"), 1, "HYBRIDRL_DEBUG")):
        raised.append(error)
        found, err = main(["list"]), capsys.readouterr().err
        if found != code or hint not in err or err.count("\n") != 1 or (
                "Traceback" in err or "second line" in err):
            wrong.append((error, found, err))
    assert not wrong


def test_run_records_and_is_not_run_again(model_folders, results, smoke, capsys):
    """A finished run is read from its record; `list` gives the correct number of steps."""
    words = ["run", "sft_then_rl", "--set", f"model.path={model_folders['qwen2']}"]
    assert main(words) == 0
    run = written(results, setup="sft_then_rl")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert run.is_complete and not (run.path / ".lock").exists()
    settings = presets.settings_from_dict(run.read("config.json")["settings"])
    promised = catalogue.cost(catalogue.SETUPS["sft_then_rl"], settings)
    assert promised.steps == run.read("manifest.json")["steps"] == len(run.lines("metrics.jsonl"))
    capsys.readouterr()
    assert main(words) == 0
    assert lines_with(capsys.readouterr().out, "sft_then_rl", "0"), "the user is told"
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_rerun_gives_the_same_answers(model_folders, results, smoke, monkeypatch, capsys):
    """The second run takes settings and seed from the record only, and compares every byte."""
    assert main(["run", "sft", "--set", f"model.path={model_folders['qwen2']}",
                 "sft.learning_rate=0.001"]) == 0
    first = written(results)
    assert main(["rerun", str(first.path / "manifest.json")]) == 0
    second = written(results, "tiny-smoke-rerun")
    assert second.read("config.json")["settings"] == first.read("config.json")["settings"]

    rows = first.lines("eval.jsonl")
    assert second.lines("eval.jsonl") == rows
    rows[1]["greedy"]["text"] = "another answer"
    first.write_lines("eval.jsonl", rows)
    capsys.readouterr()
    assert main(["rerun", str(first.path)]) == 1
    assert lines_with(capsys.readouterr().out, "eval.jsonl", 1, len(rows))


def test_rerun_of_a_model_that_was_moved(model_folders, results, smoke, tmp_path, capsys):
    """`--set model.path` names the place; the weights are the same, and so are the answers."""
    shutil.copytree(model_folders["qwen2"], tmp_path / "then")
    assert main(["run", "base", "--set", f"model.path={tmp_path / 'then'}"]) == 0
    (tmp_path / "then").rename(tmp_path / "now")
    first = written(results, setup="base")
    assert main(["rerun", str(first.path)]) == 1
    assert "model.path" in capsys.readouterr().err
    assert main(["rerun", str(first.path), "--set", f"model.path={tmp_path / 'now'}"]) == 0
    assert main(["rerun", str(results / "nowhere" / "manifest.json")]) == 1
    assert "nowhere" in capsys.readouterr().err
    build_experiment(results / "small", setups=("base",), test={"tiny_word": 4}, train={})
    assert main(["rerun", str(results / "small/base/seed-0"), "--experiment", "small"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_rerun_passes_every_setting():
    """All settings can be passed to `--set` again, whatever preset they came from."""
    for preset in presets.preset_names():
        wanted = presets.load_settings(
            preset, ["data.train_limits=()", "model.revision=none"], smoke=True)
        record = presets.settings_from_dict(presets.settings_to_dict(wanted))
        overrides = [f"{key}={value}" for key, value, _ in presets.describe(record)]
        for smoke_now in (False, True):
            again = presets.load_settings("tiny", overrides, smoke=smoke_now)
            assert presets.difference(wanted, again) == []


def test_list_shows_what_there_is(capsys):
    """Every setup, method, and preset is named, for people and for programs."""
    assert main(["list", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in listing["setups"]} == set(catalogue.SETUPS)
    assert {row["name"] for row in listing["presets"]} == set(presets.preset_names())
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (
        *catalogue.SETUPS, *catalogue.METHODS, *presets.preset_names()))
    from hybridrl_lib.problems.splits import load_parts

    settings = presets.load_settings("tiny", smoke=False)
    assert catalogue.training_problems(settings) == len(load_parts(settings.data).train)


def test_minutes_come_from_published_runs_only(tmp_path):
    """Times come from uninterrupted published runs; new runs have precedence in a report."""
    for name, setups in (("tiny", ("sft",)), ("tiny-compare", ("sft", "rl"))):
        build_experiment(tmp_path / name, setups, seeds=(0, 1, 2), test={"tiny_word": 4}, train={})
    other = tmp_path / "tiny-compare" / "rl" / "seed-0" / "manifest.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {
        "preset": "tiny", "seconds/wall": 30.0, "resumed_from": []}))
    for seed, (seconds, resumed) in enumerate([(60.0, []), (120.0, []), (9000.0, [7])]):
        path = tmp_path / "tiny" / "sft" / f"seed-{seed}" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest |= {"preset": "tiny", "seconds/wall": seconds, "resumed_from": resumed}
        path.write_text(json.dumps(manifest))
    found = catalogue.read_measured(tmp_path)
    entry, = found.pop(("tiny", "sft"))
    assert (entry.minutes, entry.runs) == (1.5, 2)
    assert not found, "a comparison may have fewer epochs than the preset"
    assert catalogue.minutes(()) == catalogue.NOT_MEASURED
    runs, published = tmp_path / "runs", tmp_path / "published"
    build_experiment(published / "tiny", setups=("base",), test={"tiny_word": 4}, train={})
    assert commands.find_experiment("tiny", runs, published) == (
        published / "tiny", runs / "tiny", None)
    (published / "tiny" / "table2.csv").touch()
    build_experiment(runs / "tiny", setups=("base",), test={"tiny_word": 4}, train={})
    assert commands.find_experiment("tiny", runs, published) == (
        runs / "tiny", None, published / "tiny")
    with pytest.raises(UserError, match="'tiny'"):
        commands.find_experiment("tyni", runs, published)
    with pytest.raises(UserError, match="hybridrl run"):
        commands.find_experiment("tiny", tmp_path / "a", tmp_path / "b")
    assert commands.find_experiment("some/folder", runs, published)[0] == Path("some/folder")


def test_doctor_exits_by_its_verdict(monkeypatch, capsys, tmp_path):
    """With --preset, the exit code says whether it will run here; without it, it is 0."""
    rows = [("python", "3", ""), ("preset paper", "no", "it needs a GPU")]
    monkeypatch.setattr("hybridrl_lib.machine.doctor.report", lambda preset=None: rows)
    assert main(["doctor"]) == 0 and main(["doctor", "--preset", "paper"]) == 1
    assert "it needs a GPU" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["advice"] == "it needs a GPU"
    made = []
    monkeypatch.setattr("hybridrl_lib.experiments.pretraining.pretrain",
                        lambda folder, seed, report: made.append((folder, seed)))
    assert main(["pretrain-tiny", "--out", str(tmp_path / "new"), "--seed", "3"]) == 0
    assert made == [(tmp_path / "new", 3)]
    (tmp_path / "config.json").touch()
    assert main(["pretrain-tiny", "--out", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err and len(made) == 1

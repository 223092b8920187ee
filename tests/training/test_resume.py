"""Runs that were cut off and resumed, runs that repeat, and runs that must not."""

import errno
import gc
import itertools
import json
import os
import re
import shutil
import signal
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from small_training import SMALL, Coin

from hybridrl_lib.experiments import run as run_module
from hybridrl_lib.experiments.run import run
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.system.errors import UserError, show_in_one_sentence
from hybridrl_lib.training import measuring
from hybridrl_lib.training.checkpoints import Checkpoints
from hybridrl_lib.training.observer import Observer

LOGS = ("metrics.jsonl", "probe.jsonl", "validation.jsonl", "samples.jsonl", "eval.jsonl")
BOTH = "sft_then_rl_entropy"  # both stages, with every term of the loss
# Ten steps, one per epoch; probes, samples, and checkpoints are at different steps.
TEN = (*SMALL, "training.epochs=10", "training.checkpoint_every=2", "training.samples_every=3",
       "probe.every=3", "sft.learning_rate=0.003", "rl.learning_rate=0.003")


class Crash(Exception):
    """Power cut: nothing is cleaned up."""


class Told(Observer):
    """Keeps the notes of a run."""

    def __init__(self):
        self.sentences = []

    def note(self, sentence):
        self.sentences.append(sentence)


class Ends(Observer):
    """Ends a run after a step: by a crash in the middle of it, or as Ctrl-C does."""

    def __init__(self, step: int, how: str):
        self.step, self.how = step, how

    def on_step(self, row, total):
        if row["step"] == self.step:
            if self.how == "crash":
                raise Crash
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def coin(monkeypatch):
    """Verdicts by coin: a random model is never right."""
    monkeypatch.setattr("hybridrl_lib.experiments.run.Verifier", Coin)


@pytest.fixture()
def start(model_folders):
    """start(setup, experiment, ...) -> the folder of a run of ten steps."""
    def begin(setup, experiment, *overrides, seed=0, observer=None):
        return run(setup, preset="tiny", seed=seed, experiment=experiment,
                   settings=[*TEN, f"model.path={model_folders['qwen2']}", "model.device=cpu",
                             *overrides], observer=observer or Observer())
    return begin


def record(folder) -> dict:
    """Everything in a run's folder that must repeat: logs without times, and the final weights."""
    logs = {name: [{k: v for k, v in row.items() if not k.startswith("seconds")}
                   for row in folder.lines(name)] for name in LOGS}
    final = folder.path / "checkpoint" / "final"
    weights = {path.name: path.read_bytes() for path in final.glob("*.safetensors")}
    assert weights and len(logs["metrics.jsonl"]) == 10
    return {**logs, "weights": weights, "verdicts": folder.read("manifest.json")["verdicts"]}


def assert_same(one: dict, other: dict) -> None:
    for name in one:
        assert one[name] == other[name], f"{name} differs"


_whole: dict[tuple, dict] = {}


@pytest.fixture()
def whole(start):
    """whole(setup, ...) -> the record of the run that was not cut off, made once."""
    def get(setup, *overrides):
        if (setup, overrides) not in _whole:
            _whole[setup, overrides] = record(start(setup, "whole", *overrides))
        return _whole[setup, overrides]
    return get


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Folders of runs that several tests start from: made once, and copied for each."""
    return tmp_path_factory.mktemp("copies")


@pytest.fixture()
def done(start, copies, results):
    """The folder of a finished run of SFT in the experiment `done`."""
    if not (copies / "done").exists():
        start("sft", "done")
        shutil.copytree(results / "done", copies / "done")
    else:
        shutil.copytree(copies / "done", results / "done")
    return RunFolder(results / "done" / "sft" / "seed-0")


def check_cut(start, whole, step, how):
    """Cuts a run in the middle of a step or after it, and finishes it: the record is the same."""
    experiment = f"cut-{how}-{step}"
    with pytest.raises(Crash if how == "crash" else UserError) as caught:
        start(BOTH, experiment, observer=Ends(step, how))
    if how == "ctrl-c":
        assert f"step {step}" in str(caught.value)
    folder = start(BOTH, experiment)
    assert_same(record(folder), whole(BOTH))
    # Steps 2, 4, 8 by checkpoint_every, 5 and 10 as the last of a stage; a crash comes before.
    last = {1: None, 3: 2, 5: 4, 6: 5, 8: 6, 10: 8}[step] if how == "crash" else step
    assert folder.read("manifest.json")["resumed_from"] == ([] if last is None else [last])


def test_ten_steps_are_six_and_resume_and_four(start, whole):
    """Bit for bit, cut off in RL: a crash loses the steps since the last checkpoint, whose log
    lines are removed; Ctrl-C finishes its step. Other places: see the next test."""
    check_cut(start, whole, 8, "crash")
    check_cut(start, whole, 6, "ctrl-c")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["crash", "ctrl-c"])
def test_ten_steps_can_be_cut_anywhere(start, whole, how):
    """In SFT, at the boundary of the stages, in RL, and before evaluation."""
    for step in (1, 3, 5, 6, 8, 10):
        check_cut(start, whole, step, how)


class OutOfMemory(Observer):
    """Memory runs out after a step; torch has several errors for it."""

    def __init__(self, error):
        self.error = error

    def on_step(self, row, total):
        raise self.error


def test_out_of_memory_names_the_setting_that_helps(start):
    """In a notebook, too, where no command line explains it; another RuntimeError stays one."""
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
                  torch.AcceleratorError("CUDA error: out of memory")
                  if hasattr(torch, "AcceleratorError") else
                  RuntimeError("CUDA error: out of memory"),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(UserError, match="training.micro_batch_tokens") as caught:
            start("sft", "full", observer=OutOfMemory(error))
        assert caught.value.__cause__ is error
    with pytest.raises(RuntimeError, match="shapes"):
        start("sft", "full", observer=OutOfMemory(RuntimeError("shapes do not fit")))


def test_a_stopped_run_leaves_no_model_in_a_notebook(start, monkeypatch, capsys):
    """The cell is run again, and two models do not fit: the last error must not hold the first."""
    models = []

    def noted(*arguments):
        models.append(weakref.ref((policy := load_policy(*arguments)).model))
        return policy

    load_policy = run_module.load_policy
    monkeypatch.setattr(run_module, "load_policy", noted)
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    show_in_one_sentence()
    for number, ends in enumerate((Ends(2, "ctrl-c"), OutOfMemory(torch.OutOfMemoryError(
            "CUDA out of memory.")), OutOfMemory(KeyboardInterrupt()))):
        shell.user_ns |= {"start": start, "ends": ends}
        done = shell.run_cell(f"mine = 1\nstart('rl', 'notebook-{number}', observer=ends)")
        assert done.error_in_exec is not None and shell.user_ns["mine"] == 1
        gc.collect()  # as the next run does first
        assert models[number]() is None, number
        assert ("Traceback" in capsys.readouterr().out) == (
            done.error_in_exec.__class__ is KeyboardInterrupt)


def almost(one, other) -> bool:
    """Whether two values of a record differ by rounding at most."""
    if isinstance(one, dict):
        return set(one) == set(other) and all(almost(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(almost, one, other))
    return one == pytest.approx(other, rel=1e-3, abs=1e-6) if isinstance(one, float) else (
        one == other)


def check_less_memory(start, whole, at):
    """A run that continues after step `at` with smaller batches."""
    less = ("training.micro_batch_tokens=64", "training.logit_chunk_tokens=16",
            "evaluation.batch_size=3")
    with pytest.raises(UserError):
        start(BOTH, f"less-{at}", observer=Ends(at, "ctrl-c"))
    with pytest.raises(UserError, match=r"\(rl.gamma: \S+ -> 0.5\)"):
        start(BOTH, f"less-{at}", *less, "rl.gamma=0.5")
    folder = start(BOTH, f"less-{at}", *less)
    mine, theirs = record(folder), dict(whole(BOTH))
    if at < 10:
        mine.pop("weights")
        assert all(almost(mine[name], theirs[name]) for name in mine)
        assert mine["metrics.jsonl"] != theirs["metrics.jsonl"]  # a sum in another order
    else:
        assert_same(mine, theirs)
    config, changes = folder.read("config.json"), folder.read("manifest.json")["memory"]["changes"]
    assert changes == config["memory_changes"] and [change.partition(" -> ")[2] for change in
                                                    changes] == ["64", "16", "3"]
    assert config["settings"]["evaluation"]["batch_size"] == 3
    assert start(BOTH, f"less-{at}").read("config.json") == config  # it is finished


def test_a_run_that_was_out_of_memory_continues_with_less(start, whole):
    """The three settings of memory may change during a run, and the record says so: before the
    evaluation the result is the same to the last bit. No other setting may change."""
    check_less_memory(start, whole, 10)


@pytest.mark.slow
def test_a_run_that_was_out_of_memory_trains_on_with_less(start, whole):
    """Then the numbers differ by rounding."""
    check_less_memory(start, whole, 5)


@pytest.mark.slow
def test_a_run_that_is_cut_off_again_and_again(start, whole):
    """After every single step, with an adapter and a reference too: the record is the same."""
    for setup, *overrides in (("sft_then_rl", "rl.kl_anchor=reference", "model.adapter=lora"),
                              ("rl", "rl.updates_per_rollout=1")):
        for step in range(1, 11):
            with pytest.raises(UserError):
                start(setup, "cut", *overrides, observer=Ends(step, "ctrl-c"))
        folder = start(setup, "cut", *overrides)
        assert_same(record(folder), whole(setup, *overrides))
        assert folder.read("manifest.json")["resumed_from"] == list(range(1, 11))


def test_seconds_are_those_of_all_processes(start, monkeypatch):
    """A run that was stopped and resumed has the time of both parts."""
    monkeypatch.setattr("hybridrl_lib.training.observer.time", SimpleNamespace(
        monotonic=itertools.count(0, 100).__next__, process_time=itertools.count().__next__))
    with pytest.raises(UserError):
        start("sft", "cut", observer=Ends(5, "ctrl-c"))
    with pytest.raises(UserError):
        start("sft", "cut", observer=Ends(8, "ctrl-c"))
    manifest = start("sft", "cut").read("manifest.json")
    # A process reads its clocks at its start and at each checkpoint: after steps 2, 4 and, by
    # Ctrl-C, 5; after 6, 8 and again 8; after 10, and at the end.
    assert manifest["seconds/wall"] == 100 * (3 + 3 + 2)
    assert manifest["seconds/device"] == 3 + 3 + 2


def test_a_finished_run_of_another_numerics_version_is_refused(start, done):
    """Numbers of different code are not mixed."""
    config = done.read("config.json")
    done.write("config.json", config | {"numerics_version": config["numerics_version"] + 1})
    with pytest.raises(UserError, match="numerics") as caught:
        start("sft", "done")
    assert "\n" not in str(caught.value) and done.is_complete


def test_a_crash_while_a_checkpoint_is_written(start, whole, monkeypatch):
    """The one before is still there, and the half-written one is not used."""
    def fail(*arguments, **more):
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        calls = []
        save = torch.save
        patch.setattr(torch, "save", lambda *a, **k: (
            fail() if len(calls) == 3 else (calls.append(0), save(*a, **k))))
        start(BOTH, "cut")
    folder = start(BOTH, "cut")
    assert_same(record(folder), whole(BOTH))


def test_a_crash_while_a_log_is_written(start, whole, results):
    """A log may lose its last line; the step that wrote it is taken again."""
    with pytest.raises(Crash):
        start(BOTH, "cut", observer=Ends(7, "crash"))
    log = results / "cut" / BOTH / "seed-0" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    assert_same(record(start(BOTH, "cut")), whole(BOTH))


# What disks do to checkpoints and logs -----------------------------------------------------------


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture()
def crashed(start, copies, results):
    """crashed() -> the folder of a run that has the checkpoints of steps 5 and 6, and 8 steps."""
    def crash():
        if not (copies / "cut").exists():
            with pytest.raises(Crash):
                start(BOTH, "cut", observer=Ends(8, "crash"))
            shutil.copytree(results / "cut", copies / "cut")
        shutil.rmtree(results / "cut", ignore_errors=True)
        shutil.copytree(copies / "cut", results / "cut")
        folder = RunFolder(results / "cut" / BOTH / "seed-0")
        assert [step for step, _ in Checkpoints(folder).found()] == [6, 5]
        return folder
    return crash


def check_damaged_checkpoint(start, whole, crashed, damage, file):
    """Damages a file of the newest checkpoint."""
    run, told = crashed(), Told()
    damage(run.path / "checkpoint" / "step-000006" / file)
    folder = start(BOTH, "cut", observer=told)
    assert_same(record(folder), whole(BOTH))
    assert folder.read("manifest.json")["resumed_from"] == [5]
    said = [line for line in told.sentences if "damaged-step-000006" in line]
    assert len(said) == 1 and re.search(r"step 6\b.*step 5\b", said[0])
    assert file in said[0] or file == "checksums.json"  # a wrong checksum blames its file
    assert (run.path / "checkpoint" / "damaged-step-000006").is_dir()


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(start, whole, crashed):
    """A run never continues from damaged weights, and says which checkpoint it did not use."""
    check_damaged_checkpoint(start, whole, crashed, flip_a_bit, "weights.safetensors")
    check_damaged_checkpoint(start, whole, crashed, Path.unlink, "optimizer.pt")


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, Path.unlink])
def test_every_file_of_a_checkpoint_is_checked(start, whole, crashed, damage):
    """Whatever happened to it."""
    for file in ("weights.safetensors", "optimizer.pt", "state.json", "checksums.json"):
        check_damaged_checkpoint(start, whole, crashed, damage, file)


def test_without_a_whole_checkpoint_the_run_starts_again(start, whole, crashed):
    """Two damaged checkpoints cost time and nothing else; both are kept."""
    run, told = crashed(), Told()
    for _, folder in Checkpoints(run).found():
        cut_off(folder / "weights.safetensors")
    folder = start(BOTH, "cut", observer=told)
    assert_same(record(folder), whole(BOTH))
    assert folder.read("manifest.json")["resumed_from"] == []
    assert sum("damaged-step-00000" in line for line in told.sentences) == 2
    assert {path.name for path in (run.path / "checkpoint").iterdir()} == {
        "damaged-step-000005", "damaged-step-000006", "final"}


def check_damaged_log(start, whole, crashed, line, damage, resumed_from):
    """Damages a line of metrics.jsonl, or the log from there on."""
    run = crashed()
    log = run.path / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[line:] = ([lines[line][:20]] if damage == "cut" else
                    [b"\xff" + lines[line][1:], *lines[line + 1:]])
    log.write_bytes(b"".join(lines))
    folder = start(BOTH, "cut")
    assert_same(record(folder), whole(BOTH))
    assert folder.read("manifest.json")["resumed_from"] == resumed_from
    for place in (run.path / "checkpoint").glob("damaged-*"):
        assert (place / "metrics.jsonl").read_bytes() == b"".join(lines)


def test_a_damaged_log_leaves_no_gap(start, whole, crashed):
    """Lines that a power cut removed or damaged are made again, from the checkpoint before them.
    The log as it was found stays with the checkpoint that it made useless."""
    check_damaged_log(start, whole, crashed, 5, "cut", [5])


@pytest.mark.slow
def test_a_damaged_log_leaves_no_gap_anywhere(start, whole, crashed):
    """Line 7 (counted from 0) comes after the newest checkpoint, line 5 between the two, line 2
    before both."""
    for line, resumed_from in ((7, [6]), (5, [5]), (2, [])):
        for damage in ("cut", "flip"):
            check_damaged_log(start, whole, crashed, line, damage, resumed_from)


def test_checkpoints_of_a_finished_run_are_removed_later(start, done):
    """It may have been killed while it removed them; at full scale they take gigabytes."""
    left = done.path / "checkpoint" / "step-000010"
    left.mkdir()
    assert start("sft", "done").is_complete and not left.exists()


def test_a_finished_result_that_was_changed_is_refused(start, done):
    """A flipped bit in the answers is seen; an old manifest without checksums is read."""
    flip_a_bit(done.path / "eval.jsonl")
    before = {p: p.read_bytes() for p in done.path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="eval.jsonl") as caught:
        start("sft", "done")
    assert "\n" not in str(caught.value)
    assert before == {p: p.read_bytes() for p in done.path.rglob("*") if p.is_file()}
    manifest = done.read("manifest.json")
    del manifest["checksums"]
    done.write("manifest.json", manifest)
    assert start("sft", "done").is_complete


def test_a_finished_run_is_read_where_nothing_can_be_written(start, done, monkeypatch):
    """Results on a read-only disk can be read; a new run there is refused."""
    def read_only(path, *arguments, **more):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for name in ("mkdir", "replace"):
        monkeypatch.setattr(os, name, read_only)
    assert start("sft", "done").path == done.path
    with pytest.raises(UserError, match="Read-only file system") as caught:
        start("sft", "new")
    assert "\n" not in str(caught.value)


# Seeds -------------------------------------------------------------------------------------------


def test_one_seed_repeats_whatever_happened_before(start, whole):
    """Random numbers come from the run's seed alone, not from the state of the process."""
    torch.manual_seed(12345)
    torch.rand(10)
    assert_same(record(start(BOTH, "again")), whole(BOTH))


def test_two_seeds_differ(start):
    """The seed changes the samples of training, probes, and evaluation, and not which problems
    there are."""
    one, two = (record(start("rl", "seeds", seed=seed)) for seed in (0, 1))
    probes = [{k: v for k, v in run["probe.jsonl"][0].items() if k != "kl/base"}
              for run in (one, two)]
    assert probes[0] != probes[1], "both are of the base model"
    assert [row["reward"] for row in one["metrics.jsonl"]] != [
        row["reward"] for row in two["metrics.jsonl"]]
    assert one["weights"] != two["weights"]
    assert [row.get("samples") for row in one["eval.jsonl"]] != [
        row.get("samples") for row in two["eval.jsonl"]]
    assert [row["id"] for row in one["eval.jsonl"]] == [row["id"] for row in two["eval.jsonl"]]


def test_the_seed_changes_the_order_of_demonstrations(start):
    """SFT has no samples: its seeds differ only in the order of the batches."""
    losses = [[row["loss/sft"] for row in start(
        "sft", "order", "sft.batch_size=2", "training.epochs=2", seed=seed).lines("metrics.jsonl")]
        for seed in (0, 1)]
    assert len(losses[0]) == len(losses[1]) == 8 and losses[0] != losses[1]


def test_a_complete_run_is_read_and_not_run_again(start, done):
    """Running a notebook again costs seconds and changes nothing on disk."""
    before = {p: p.stat().st_mtime_ns for p in done.path.rglob("*") if p.is_file()}
    again = start("sft", "done", observer=Ends(1, "crash"))
    assert again.path == done.path and again.is_complete
    assert before == {p: p.stat().st_mtime_ns for p in done.path.rglob("*") if p.is_file()}
    assert not list((done.path / "checkpoint").glob("step-*")), "only the final model is kept"


def test_a_run_with_other_settings_is_refused(start, done):
    """Finished or not: the error shows the difference, and what is on disk stays."""
    with pytest.raises(Crash):
        start("sft", "mine", observer=Ends(3, "crash"))
    for experiment in ("mine", "done"):
        with pytest.raises(UserError, match=r"sft.learning_rate.*0\.5") as caught:
            start("sft", experiment, "sft.learning_rate=0.5")
        assert "\n" not in str(caught.value)
    assert done.is_complete


def test_the_base_model_is_a_run_without_steps(start, results):
    """`base` evaluates the untrained model: no step, no checkpoint, its own row of the table."""
    folder = start("base", "base")
    assert folder.is_complete and folder.lines("metrics.jsonl") == []
    rows = folder.lines("eval.jsonl")
    assert {row["part"] for row in rows} == {"test", "train"}
    assert {row["checkpoint"] for row in rows} == {"last"}
    manifest = json.loads((results / "base" / "base" / "seed-0" / "manifest.json").read_text())
    assert manifest["steps"] == 0 and manifest["tokens"] == {"demonstrations": 0, "rollouts": 0}


def test_the_base_model_shows_what_rl_begins_with(start):
    """G sampled answers to each training problem, even if the settings ask for none."""
    observer = Told()
    none = ("evaluation.train_samples=0", "rl.group_size=4")
    for setup, samples in (("base", 4), ("sft", 0)):
        rows = [row for row in start(setup, "begin", *none, observer=observer).lines("eval.jsonl")
                if row["part"] == "train"]
        assert rows
        assert {len(row.get("samples", {}).get("strict", ())) for row in rows} == {samples}
    assert sum("groups of 4" in line for line in observer.sentences) == 2, "a line per benchmark"


def test_table_2_scores_the_last_weights_and_best_is_extra(start, done, monkeypatch):
    """`last` rows and the saved model are the last step's, even if an earlier one did better."""
    scores = iter([1.0] + [0.0] * 20)
    plain = done
    monkeypatch.setattr(measuring, "accuracy", lambda rows: next(scores))
    folder = start("sft", "best")
    assert record(folder)["weights"] == record(plain)["weights"]
    last = [row for row in folder.lines("eval.jsonl") if row["checkpoint"] == "last"]
    best = [row for row in folder.lines("eval.jsonl") if row["checkpoint"] == "best"]
    assert last == [row for row in plain.lines("eval.jsonl") if row["checkpoint"] == "last"]
    assert folder.read("manifest.json")["best_on_validation"] == {"strict": 1.0, "step": 1}
    assert {row["part"] for row in best} == {"test"} and not any("samples" in row for row in best)
    texts = [[row["greedy"]["text"] for row in rows if row["part"] == "test"]
             for rows in (last, best)]
    assert texts[0] != texts[1], "after one step the greedy answers differ from those after ten"

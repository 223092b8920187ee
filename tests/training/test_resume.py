"""Runs that were cut off and went on, runs that repeat, and runs that must not."""

import errno
import gc
import importlib
import itertools
import json
import os
import signal
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_training import SMALL, Coin

from hybridrl_lib.experiments.run import run
from hybridrl_lib.records.folders import experiment_folder
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.system.errors import UserError, show_in_one_sentence
from hybridrl_lib.training.checkpoints import Checkpoints
from hybridrl_lib.training.observer import Observer

run_module = importlib.import_module("hybridrl_lib.experiments.run")  # the package has a function of that name
LOGS = ("metrics.jsonl", "probe.jsonl", "validation.jsonl", "samples.jsonl", "eval.jsonl")
# Ten steps, one an epoch; probes, samples and checkpoints fall on different steps.
TEN = (*SMALL, "training.epochs=10", "training.checkpoint_every=2", "training.samples_every=3",
       "probe.every=3", "sft.learning_rate=0.003", "rl.learning_rate=0.003")


class Crash(Exception):
    """Power cut: nothing is tidied up."""


class Told(Observer):
    """Keeps the sentences of a run."""

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


@pytest.mark.parametrize("how", ["crash", "ctrl-c"])
@pytest.mark.parametrize("step", [1, 3, 5, 6, 8, 10])
def test_ten_steps_are_five_and_resume_and_five(start, whole, step, how):
    """Bit for bit: cut off in SFT, at the boundary of the stages, in RL, and before evaluation.

    A crash loses the steps since the last checkpoint, whose log lines are taken back; Ctrl-C
    finishes its step. After 5 of 10 steps the next one belongs to the second stage.
    """
    setup = "sft_then_rl_entropy"
    with pytest.raises(Crash if how == "crash" else UserError) as caught:
        start(setup, "cut", observer=Ends(step, how))
    if how == "ctrl-c":
        assert f"after step {step}" in str(caught.value) and "same command" in str(caught.value)
    folder = start(setup, "cut")
    assert_same(record(folder), whole(setup))
    # Steps 2, 4, 8 by checkpoint_every, 5 and 10 as the last of a stage; a crash comes before.
    last = {1: None, 3: 2, 5: 4, 6: 5, 8: 6, 10: 8}[step] if how == "crash" else step
    assert folder.read("manifest.json")["resumed_from"] == ([] if last is None else [last])


class OutOfMemory(Observer):
    """Memory runs out after a step; what torch says of it differs."""

    def __init__(self, error):
        self.error = error

    def on_step(self, row, total):
        raise self.error


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory") if hasattr(torch, "AcceleratorError") else
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
    ids=lambda error: type(error).__name__)
def test_out_of_memory_is_one_sentence(start, error):
    """In a notebook, too, where no command line explains it; another RuntimeError stays one."""
    with pytest.raises(UserError, match="Out of memory; lower training.micro_b") as caught:
        start("sft", "full", observer=OutOfMemory(error))
    assert caught.value.__cause__ is error
    with pytest.raises(RuntimeError, match="shapes"):
        start("sft", "full", observer=OutOfMemory(RuntimeError("shapes do not fit")))


@pytest.mark.parametrize("ends", [
    Ends(2, "ctrl-c"), OutOfMemory(torch.OutOfMemoryError("CUDA out of memory.")),
    OutOfMemory(KeyboardInterrupt())], ids=["ctrl-c", "memory", "second ctrl-c"])
def test_a_stopped_run_leaves_no_model_in_a_notebook(start, monkeypatch, capsys, ends):
    """The cell is run again, and two models do not fit: the last error must not hold the first."""
    from IPython.core.interactiveshell import InteractiveShell

    models = []

    def noted(*arguments):
        models.append(weakref.ref((policy := load_policy(*arguments)).model))
        return policy

    load_policy = run_module.load_policy
    monkeypatch.setattr(run_module, "load_policy", noted)
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    show_in_one_sentence()
    shell.user_ns |= {"start": start, "ends": ends}
    done = shell.run_cell("mine = 1\nstart('rl', 'notebook', observer=ends)")
    assert done.error_in_exec is not None and shell.user_ns["mine"] == 1
    gc.collect()  # as the next run does first
    (model,) = models
    assert model() is None
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


@pytest.mark.parametrize("at", [5, 10])
def test_a_run_that_was_out_of_memory_goes_on_with_less(start, whole, at):
    """The three settings of memory may change on the way, and the record says so: before the
    evaluation the result is the same to the last bit, earlier but for rounding. No other may."""
    less = ("training.micro_batch_tokens=64", "training.logit_chunk_tokens=16",
            "evaluation.batch_size=3")
    with pytest.raises(UserError, match="Stopped"):
        start("sft_then_rl_entropy", "cut", observer=Ends(at, "ctrl-c"))
    with pytest.raises(UserError, match=r"other settings \(rl.gamma: \S+ -> 0.5\);"):
        start("sft_then_rl_entropy", "cut", *less, "rl.gamma=0.5")
    folder = start("sft_then_rl_entropy", "cut", *less)
    mine, theirs = record(folder), whole("sft_then_rl_entropy")
    if at == 5:
        mine.pop("weights")
        assert all(almost(mine[name], theirs[name]) for name in mine)
        assert mine["metrics.jsonl"] != theirs["metrics.jsonl"]  # a sum in another order
    else:
        assert_same(mine, theirs)
    config, changes = folder.read("config.json"), folder.read("manifest.json")["memory"]["changes"]
    assert changes == config["memory_changes"] and [change.partition(" -> ")[2] for change in
                                                    changes] == ["64", "16", "3"]
    assert config["settings"]["evaluation"]["batch_size"] == 3
    assert start("sft_then_rl_entropy", "cut").read("config.json") == config  # it is finished


@pytest.mark.parametrize(("setup", "overrides"), [
    ("sft_then_rl", ("rl.kl_anchor=reference", "model.adapter=lora")),
    ("rl", ("rl.updates_per_rollout=1",))])
def test_a_run_that_is_cut_off_again_and_again(start, whole, setup, overrides):
    """After every single step, with an adapter and a reference too: the record is the same."""
    for step in range(1, 11):
        with pytest.raises(UserError, match="Stopped"):
            start(setup, "cut", *overrides, observer=Ends(step, "ctrl-c"))
    folder = start(setup, "cut", *overrides)
    assert_same(record(folder), whole(setup, *overrides))
    assert folder.read("manifest.json")["resumed_from"] == list(range(1, 11))


def test_seconds_are_those_of_all_processes(start, monkeypatch):
    """A run that went on after a stop does not pass for a shorter one."""
    monkeypatch.setattr("hybridrl_lib.training.observer.time", SimpleNamespace(
        monotonic=itertools.count(0, 100).__next__, process_time=itertools.count().__next__))
    with pytest.raises(UserError, match="Stopped"):
        start("sft", "cut", observer=Ends(5, "ctrl-c"))
    with pytest.raises(UserError, match="Stopped"):
        start("sft", "cut", observer=Ends(8, "ctrl-c"))
    manifest = start("sft", "cut").read("manifest.json")
    # A process reads its clocks at its start and at each checkpoint: after steps 2, 4 and, by
    # Ctrl-C, 5; after 6, 8 and again 8; after 10, and at the end.
    assert manifest["seconds/wall"] == 100 * (3 + 3 + 2)
    assert manifest["seconds/device"] == 3 + 3 + 2


def test_a_run_of_another_numerics_version_is_refused(start, monkeypatch):
    """Neither a finished run nor half a run is mixed with numbers of other code."""
    folder = start("sft", "mine")
    config = folder.read("config.json")
    folder.write("config.json", config | {"numerics_version": config["numerics_version"] + 1})
    with pytest.raises(UserError, match="numerics version") as caught:
        start("sft", "mine")
    assert "\n" not in str(caught.value) and folder.is_complete


def test_a_crash_while_a_checkpoint_is_written(start, whole, monkeypatch):
    """The checkpoint before is still there, and the half-written one is not taken for one."""
    def fail(*arguments, **more):
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        calls = []
        save = torch.save
        patch.setattr(torch, "save", lambda *a, **k: (
            fail() if len(calls) == 3 else (calls.append(0), save(*a, **k))))
        start("sft_then_rl_entropy", "cut")
    folder = start("sft_then_rl_entropy", "cut")
    assert_same(record(folder), whole("sft_then_rl_entropy"))


def test_a_crash_while_a_log_is_written(start, whole, results):
    """A log may lose its last line; the step that wrote it is taken again."""
    setup = "sft_then_rl_entropy"
    with pytest.raises(Crash):
        start(setup, "cut", observer=Ends(7, "crash"))
    log = results / "cut" / setup / "seed-0" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    assert_same(record(start(setup, "cut")), whole(setup))


# What disks do to checkpoints and logs -----------------------------------------------------------


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture()
def crashed(start):
    """crashed() -> the folder of a run that has the checkpoints of steps 5 and 6, and 8 steps."""
    def crash():
        with pytest.raises(Crash):
            start("sft_then_rl_entropy", "cut", observer=Ends(8, "crash"))
        folder = RunFolder(experiment_folder("cut") / "sft_then_rl_entropy" / "seed-0")
        assert [step for step, _ in Checkpoints(folder).found()] == [6, 5]
        return folder
    return crash


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.pt", "state.json",
                                  "checksums.json"])
@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_used(start, whole, crashed, file,
                                                                    damage):
    """A run never goes on from damaged weights, and says which checkpoint it left out."""
    run, told = crashed(), Told()
    damage(run.path / "checkpoint" / "step-000006" / file)
    folder = start("sft_then_rl_entropy", "cut", observer=told)
    assert_same(record(folder), whole("sft_then_rl_entropy"))
    assert folder.read("manifest.json")["resumed_from"] == [5]
    said = [line for line in told.sentences if "cannot be used" in line]
    assert len(said) == 1 and "goes on from step 5" in said[0]
    assert file in said[0] or file == "checksums.json"  # a wrong checksum blames what it is of
    assert (run.path / "checkpoint" / "damaged-step-000006").is_dir()


def test_without_a_whole_checkpoint_the_run_begins_again(start, whole, crashed):
    """Two damaged checkpoints cost time and nothing else; both are kept."""
    run, told = crashed(), Told()
    for _, folder in Checkpoints(run).found():
        cut_off(folder / "weights.safetensors")
    folder = start("sft_then_rl_entropy", "cut", observer=told)
    assert_same(record(folder), whole("sft_then_rl_entropy"))
    assert folder.read("manifest.json")["resumed_from"] == []
    assert sum("starts from its beginning" in line for line in told.sentences) == 2
    assert {path.name for path in (run.path / "checkpoint").iterdir()} == {
        "damaged-step-000005", "damaged-step-000006", "final"}


@pytest.mark.parametrize(("line", "resumed_from"), [(7, [6]), (5, [5]), (2, [])])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_log_leads_to_no_hole(start, whole, crashed, line, damage, resumed_from):
    """Lines that a power cut took or damaged are made again, from the checkpoint before them.

    Line 7 (counted from 0) comes after the newest checkpoint, line 5 between the two, line 2 before
    both. The log as it was found stays with the checkpoint that it made useless.
    """
    run = crashed()
    log = run.path / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[line:] = ([lines[line][:20]] if damage == "cut" else
                    [b"\xff" + lines[line][1:], *lines[line + 1:]])
    log.write_bytes(b"".join(lines))
    folder = start("sft_then_rl_entropy", "cut")
    assert_same(record(folder), whole("sft_then_rl_entropy"))
    assert folder.read("manifest.json")["resumed_from"] == resumed_from
    for place in (run.path / "checkpoint").glob("damaged-*"):
        assert (place / "metrics.jsonl").read_bytes() == b"".join(lines)


def test_a_run_killed_while_it_tidies_up_is_tidied_up_later(start):
    """Checkpoints of a finished run, gigabytes at full scale, do not stay for ever."""
    folder = start("sft", "done")
    left = folder.path / "checkpoint" / "step-000010"
    left.mkdir()
    assert start("sft", "done").is_complete and not left.exists()


def test_a_finished_result_that_was_changed_is_refused(start):
    """A flipped bit in the answers is seen; a manifest without checksums, as of old, is read."""
    folder = start("sft", "done")
    flip_a_bit(folder.path / "eval.jsonl")
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="eval.jsonl of the finished run") as caught:
        start("sft", "done")
    assert "\n" not in str(caught.value)
    assert before == {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    manifest = folder.read("manifest.json")
    del manifest["checksums"]
    folder.write("manifest.json", manifest)
    assert start("sft", "done").is_complete


def test_a_finished_run_is_read_where_nothing_can_be_written(start, monkeypatch):
    """Results on a read-only disk can be looked at; a new run there ends in one sentence."""
    folder = start("sft", "done")

    def read_only(path, *arguments, **more):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for name in ("mkdir", "replace"):
        monkeypatch.setattr(os, name, read_only)
    assert start("sft", "done").path == folder.path
    with pytest.raises(UserError, match="Read-only file system.*allow writing there") as caught:
        start("sft", "new")
    assert "\n" not in str(caught.value)


# Seeds -------------------------------------------------------------------------------------------


def test_one_seed_repeats_whatever_happened_before(start, whole):
    """Random numbers come from the run's seed alone, not from the state of the process."""
    setup = "sft_then_rl_entropy"
    torch.manual_seed(12345)
    torch.rand(10)
    again = record(start(setup, "again"))
    assert_same(again, whole(setup))


def test_two_seeds_differ(start):
    """The seed moves the samples of training and evaluation, and not which problems there are."""
    one, two = (record(start("rl", "seeds", seed=seed)) for seed in (0, 1))
    assert [row["reward"] for row in one["metrics.jsonl"]] != [
        row["reward"] for row in two["metrics.jsonl"]]
    assert one["weights"] != two["weights"]
    assert [row.get("samples") for row in one["eval.jsonl"]] != [
        row.get("samples") for row in two["eval.jsonl"]]
    assert [row["id"] for row in one["eval.jsonl"]] == [row["id"] for row in two["eval.jsonl"]]


def test_the_seed_moves_the_order_of_demonstrations(start):
    """SFT has no samples: its seeds differ by the order of the batches alone."""
    losses = [[row["loss/sft"] for row in start(
        "sft", "order", "sft.batch_size=2", "training.epochs=2", seed=seed).lines("metrics.jsonl")]
        for seed in (0, 1)]
    assert len(losses[0]) == len(losses[1]) == 8 and losses[0] != losses[1]


def test_a_complete_run_is_read_and_not_run_again(start):
    """Running a notebook again costs seconds and changes nothing on disk."""
    folder = start("sft", "done")
    before = {p: p.stat().st_mtime_ns for p in folder.path.rglob("*") if p.is_file()}
    again = start("sft", "done", observer=Ends(1, "crash"))
    assert again.path == folder.path and again.is_complete
    assert before == {p: p.stat().st_mtime_ns for p in folder.path.rglob("*") if p.is_file()}
    assert not list((folder.path / "checkpoint").glob("step-*")), "only the final model is kept"


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_with_other_settings_is_refused(start, complete):
    """The sentence shows the difference, and what is on disk stays."""
    if complete:
        folder = start("sft", "mine")
    else:
        with pytest.raises(Crash):
            start("sft", "mine", observer=Ends(3, "crash"))
    with pytest.raises(UserError, match=r"sft.learning_rate.*0\.5") as caught:
        start("sft", "mine", "sft.learning_rate=0.5")
    assert "\n" not in str(caught.value)
    if complete:
        assert folder.is_complete


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
    """G sampled answers to each training problem, also where the settings ask for none."""
    lines = []
    observer = Observer()
    observer.note = lines.append
    none = ("evaluation.train_samples=0", "rl.group_size=4")
    for setup, samples in (("base", 4), ("sft", 0)):
        rows = [row for row in start(setup, "begin", *none, observer=observer).lines("eval.jsonl")
                if row["part"] == "train"]
        assert rows
        assert {len(row.get("samples", {}).get("strict", ())) for row in rows} == {samples}
    assert sum("groups of 4 with signal" in line for line in lines) == 2, "a line a benchmark"


def test_table_2_scores_the_last_weights_and_best_is_extra(start, monkeypatch):
    """`last` rows and the saved model are the last step's, also where an earlier one did better."""
    import hybridrl_lib.training.trainer as training
    scores = iter([1.0] + [0.0] * 20)
    plain = start("sft", "plain")
    monkeypatch.setattr(training, "accuracy", lambda rows: next(scores))
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

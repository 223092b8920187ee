"""Files, folders, logs, and checkpoints: what is on disk after a power cut, and what is read."""

import json
import os
from contextlib import contextmanager

import pytest
from faults.power import Recorder, rebuild
from synthetic_records import build_experiment

from hybridrl_lib.records.files import write_folder, write_whole
from hybridrl_lib.records.locks import only_writer
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.report.loading import load_experiment
from hybridrl_lib.system.errors import UserError
from hybridrl_lib.training.checkpoints import Checkpoints


@pytest.fixture()
def power_cut(tmp_path, monkeypatch):
    """power_cut() -> a `with` block on a folder; afterwards all that was not synced is lost."""
    @contextmanager
    def cut():
        root, store = tmp_path / "disk", tmp_path / "synced"
        for folder in (root, store):
            folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", os.fsync)  # restored at the end
            recorder = Recorder(root, store)
            recorder.begin()
            yield root
        rebuild(root, store)
        for number in recorder.kept_open:
            os.close(number)
    return cut


def test_the_power_cut_takes_what_was_not_synced(power_cut):
    """The model itself: a plain write is gone, and so is a synced file that no folder names."""
    with power_cut() as root:
        (root / "plain.txt").write_text("1")
        with (root / "named.txt").open("w") as stream:
            stream.write("1")
            stream.flush()
            os.fsync(stream.fileno())
    assert not list(root.iterdir())


def test_whole_files_and_folders_survive_a_power_cut(power_cut):
    """What `write_whole` and `write_folder` have returned from is on disk and whole, in folders
    that were new and in the place of older ones."""
    def fill(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(bytes(10_000))

    with power_cut() as root:
        write_whole(root / "a" / "b" / "file.json", "old")
        write_whole(root / "a" / "b" / "file.json", "new")
        write_folder(root / "final", lambda folder: (folder / "old").touch())
        write_folder(root / "final", fill)
    assert (root / "a" / "b" / "file.json").read_text() == "new"
    assert [path.name for path in (root / "a" / "b").iterdir()] == ["file.json"]
    assert (root / "final" / "inner" / "weights").read_bytes() == bytes(10_000)
    assert [path.name for path in (root / "final").iterdir()] == ["inner"]


def test_a_checkpoint_survives_a_power_cut_with_its_logs(power_cut, tmp_path):
    """Lines after the checkpoint may be lost, none before it."""
    with power_cut() as root:
        run = RunFolder(root / "run")
        for step in (1, 2):
            run.append("metrics.jsonl", {"step": step})
        Checkpoints(run).save(2, lambda folder: (folder / "state.json").write_text("{}"))
        run.append("metrics.jsonl", {"step": 3})
    assert Checkpoints(run).resume(pytest.fail) == (2, root / "run" / "checkpoint" / "step-000002")
    assert [row["step"] for row in run.lines("metrics.jsonl")] == [1, 2]


def test_the_newest_two_checkpoints_are_kept_by_number(tmp_path):
    """A million comes after 999,999, whatever the order of names or dates."""
    checkpoints = Checkpoints(RunFolder(tmp_path))
    for step in (999_998, 999_999, 1_000_000):
        checkpoints.save(step, lambda folder: (folder / "state.json").write_text("{}"))
        os.utime(checkpoints.root / f"step-{step:06d}", (2e9 - step, 2e9 - step))
    assert [step for step, _ in checkpoints.found()] == [1_000_000, 999_999]


def test_a_checkpoint_without_checksums_is_not_used(tmp_path):
    """Nothing says that it is whole; what is damaged keeps another name."""
    checkpoints = Checkpoints(RunFolder(tmp_path))
    for name in ("step-000004", "step-000004x", "writing"):
        (checkpoints.root / name).mkdir(parents=True)
    said = []
    assert checkpoints.resume(said.append) is None
    assert len(said) == 1 and "checksums.json" in said[0]
    checkpoints.save(4, lambda folder: (folder / "state.json").touch())
    (checkpoints.root / "step-000004" / "state.json").unlink()
    assert checkpoints.resume(said.append) is None
    assert {path.name for path in checkpoints.root.glob("damaged-*")} == {
        "damaged-step-000004", "damaged-step-000004-1"}


def test_a_log_is_split_at_line_ends_only(tmp_path):
    """Answers hold whatever a model writes, U+2028 and U+0085 too; damaged bytes are an error."""
    rows = [{"step": 1, "epoch": 1, "text": "a\u2028b\x85c\x1cd\r\n"}, {"step": 2, "epoch": 1}]
    RunFolder(tmp_path).write_lines("samples.jsonl", rows)
    assert RunFolder(tmp_path).lines("samples.jsonl") == rows
    RunFolder(tmp_path).write_lines("metrics.jsonl", [{"step": 1}, {"step": 2}])
    content = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff" + content[1:])
    with pytest.raises(UserError, match="1.*metrics.jsonl"):
        RunFolder(tmp_path).lines("metrics.jsonl")


def test_the_report_leaves_out_a_record_that_was_changed(tmp_path):
    """No number of a table comes from a file that is not what its manifest says."""
    build_experiment(tmp_path, ["base", "sft"], [0], {"tiny_word": 2}, {"tiny_word": 2}, epochs=2)
    run = RunFolder(tmp_path / "sft" / "seed-0")
    manifest = run.read("manifest.json") | {"checksums": run.checksums()}
    run.write("manifest.json", manifest)
    assert len(load_experiment(tmp_path).runs) == 2
    path = run.path / "eval.jsonl"
    path.write_text(path.read_text().replace('"strict": true', '"strict": false')
                    .replace('"strict":true', '"strict":false') + "\n")
    experiment = load_experiment(tmp_path)
    assert [one.setup for one in experiment.runs] == ["base"]
    assert any("eval.jsonl" in note for note in experiment.notes)


def test_the_lock_holds_on_a_full_disk(tmp_path, monkeypatch):
    """Its file has no room for the owner's number; the lock itself needs none."""
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with only_writer(tmp_path / "run", "It"):
        with pytest.raises(UserError, match="It"), only_writer(tmp_path / "run", "It"):
            pass


def test_checksums_of_a_checkpoint_cover_all_of_its_files(tmp_path):
    """A file that is written but not covered could be damaged unnoticed."""
    checkpoints = Checkpoints(RunFolder(tmp_path))

    def fill(folder):
        for name in ("weights", "optimizer", "state"):
            (folder / name).write_text(name)

    checkpoints.save(1, fill)
    seal = json.loads((checkpoints.root / "step-000001" / "checksums.json").read_text())
    assert set(seal["files"]) == {"weights", "optimizer", "state"}

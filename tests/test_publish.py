"""Protects published records: what is copied reads the same, and only what can be made again is."""

import gzip
import json

import pytest
from synthetic_records import build_experiment

from hybridrl_lib import records
from hybridrl_lib.cli import main
from hybridrl_lib.errors import UserError
from hybridrl_lib.publish import publish
from hybridrl_lib.records import RunFolder
from hybridrl_lib.report import load_experiment, make_table2, make_texts
from hybridrl_lib.report.loading import BrokenRecord, read_lines


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """A finished experiment of committed code with the checksums of its logs; the folder of it."""
    monkeypatch.setenv("HYBRIDRL_RESULTS_DIR", str(tmp_path / "runs"))
    folder = build_experiment(tmp_path / "runs" / "made", ["base", "sft"], [0, 1])
    for path in folder.glob("*/seed-*"):
        run = RunFolder(path)
        run.write("manifest.json", run.read("manifest.json") | {
            "complete": True, "git_commit": "0" * 40, "git_dirty": False,
            "checksums": run.checksums()})
        (path / "checkpoint").mkdir()
        (path / "checkpoint" / "weights").touch()
    return folder


def test_what_is_published_reads_the_same(experiment, tmp_path, capsys):
    """Protects tables from the packing: they come out of the copy to the letter."""
    assert main(["publish", "made", "--to", str(tmp_path / "kept")]) == 0
    assert str(tmp_path / "kept" / "made") in capsys.readouterr().out
    copy = tmp_path / "kept" / "made"
    texts = [make_texts(one, make_table2(one))
             for one in (load_experiment(experiment), load_experiment(copy))]
    assert texts[0] == texts[1] and texts[0]
    run = copy / "sft" / "seed-0"
    assert (run / "eval.jsonl.gz").is_file() and not (run / "eval.jsonl").exists()
    assert not list(copy.rglob("checkpoint"))
    assert RunFolder(run).altered() == []
    assert RunFolder(run).lines("eval.jsonl") == RunFolder(
        experiment / "sft" / "seed-0").lines("eval.jsonl")


def test_the_same_records_are_the_same_bytes(experiment, tmp_path):
    """Protects the repository from files that change whenever they are published again."""
    def content():
        return {path.relative_to(tmp_path): path.read_bytes()
                for path in sorted((tmp_path / "kept").rglob("*")) if path.is_file()}

    publish("made", tmp_path / "kept")
    before = content()
    (tmp_path / "kept" / "made" / "old.md").touch()  # of an earlier report
    publish("made", tmp_path / "kept")
    assert content() == before


def test_folders_beside_a_comparison_come_along(experiment, tmp_path):
    """Protects the claim that each number of a comparison has its record, tuning included."""
    beside = build_experiment(experiment.with_name("made-tuning-2"), ["sft"], [1000])
    other = build_experiment(experiment.with_name("made-again"), ["sft"], [0])
    for folder in (beside, other):
        run = RunFolder(next(folder.glob("*/seed-*")))
        run.write("manifest.json", run.read("manifest.json") | {
            "complete": True, "git_commit": "0" * 40, "git_dirty": False})
    (other / "comparison.csv").touch()  # another comparison
    copy = publish("made", tmp_path / "kept")
    assert {path.name for path in copy.iterdir()} == {"base", "sft"}, "no comparison, no parts"
    (experiment / "comparison.csv").write_text("a\n")
    copy = publish("made", tmp_path / "kept")
    assert {path.name for path in copy.iterdir()} == {"base", "sft", "comparison.csv", "tuning-2"}
    assert (copy / "tuning-2" / "sft" / "seed-1000" / "manifest.json").is_file()


@pytest.mark.parametrize("change, why", [
    ({"complete": False}, "is not finished"),
    ({"git_dirty": True}, ".*not committed"),
    ({"git_commit": None}, ".*not committed"),
    ({"checksums": {"eval.jsonl": "0"}}, "was changed afterwards .eval.jsonl."),
])
def test_what_nobody_could_make_again_is_not_published(experiment, tmp_path, change, why):
    """Protects readers from numbers without the code or the logs that made them."""
    run = RunFolder(experiment / "sft" / "seed-1")
    run.write("manifest.json", run.read("manifest.json") | change)
    with pytest.raises(UserError, match=f"1 of 3 runs .*sft/seed-1 {why}"):
        publish("made", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_nothing_to_publish_is_said(experiment, tmp_path):
    """A misspelt name is a sentence."""
    with pytest.raises(UserError, match="no run of experiment 'maid'"):
        publish("maid", tmp_path)


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"{}" * 1000)[:-9], b""])
def test_a_damaged_packed_log_is_one_sentence(tmp_path, content):
    """Protects a report over many runs from one file that came through a network in halves."""
    (tmp_path / "metrics.jsonl.gz").write_bytes(content)
    if content:
        with pytest.raises(UserError, match="metrics.jsonl.gz .* cannot be unpacked"):
            RunFolder(tmp_path).lines("metrics.jsonl")
        with pytest.raises(BrokenRecord, match="cannot be unpacked"):
            read_lines(tmp_path / "metrics.jsonl")
    else:
        assert RunFolder(tmp_path).lines("metrics.jsonl") == []


def test_a_packed_log_cannot_fill_the_memory(tmp_path, monkeypatch):
    """Somebody's record may unpack to more than a machine has."""
    monkeypatch.setattr(records, "LARGEST_LOG", 1000)
    line = json.dumps({"step": 1, "epoch": 1.0}).encode() + b"\n"
    (tmp_path / "metrics.jsonl.gz").write_bytes(gzip.compress(line * 100))
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        RunFolder(tmp_path).lines("metrics.jsonl")

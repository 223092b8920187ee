"""Protects published records: what is copied reads the same, and only what can be made again is."""

import gzip
import json
import shutil

import pytest
from made_up_runs import make_up_runs
from synthetic_records import build_experiment

from hybridrl_lib.cli import main
from hybridrl_lib.experiments import compare, sweep
from hybridrl_lib.experiments.publish import publish, tables_of
from hybridrl_lib.records import run_folder as records
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.report.loading import BrokenRecord, load_experiment, read_lines
from hybridrl_lib.report.report import make_texts
from hybridrl_lib.report.table2 import make_table2
from hybridrl_lib.system.errors import UserError


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
    packed = (run / "eval.jsonl.gz").read_bytes()
    assert packed[3:10] == b"\0\0\0\0\0\2\xff", "no name, no time, no system in its head"
    assert not (run / "eval.jsonl").exists()
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


def finish(results):
    """Made-up runs as finished ones of committed code."""
    for path in results.glob("*/*/seed-*"):
        run = RunFolder(path)
        run.write("manifest.json", run.read("manifest.json") | {
            "complete": True, "git_commit": "0" * 40, "git_dirty": False})


def test_a_comparison_comes_with_all_that_it_rests_on(results, tmp_path, monkeypatch):
    """Protects the claim that each number has its record: tuning and transfer are rebuilt, too."""
    make_up_runs(monkeypatch, compare)
    compare.compare("tiny", seeds=(0, 1), methods=["rl"], grid=(1, 0.5), transfer=1, jobs=2,
                    experiment="cmp", say=lambda line: None)
    compare.compare("tiny", methods=["rl"], grid=(1, 0.5), jobs=2, experiment="cmp-2",
                    say=lambda line: None)
    finish(results)
    copy = publish("cmp", tmp_path / "kept")
    assert {path.name for path in copy.iterdir() if path.is_dir()} == {
        "base", "rl", "sft_then_rl", "figures", "tuning-0.5", "tuning-1", "only-tiny_word",
        "only-tiny_symbolic"}
    texts = tables_of(copy, "cmp")
    assert set(texts) == {"comparison.csv", "comparison.md", "comparison.tex", "tuning.csv",
                          "transfer.csv"}
    assert len(list(copy.rglob("manifest.json"))) == 1 + 2 * 2 + 2 * 2 * 2 + 2 * 2
    page = results / "cmp" / "comparison.md"
    page.write_text(page.read_text().replace("tiny word", "tiny words"))
    with pytest.raises(UserError, match="comparison.md of cmp is not what its runs give"):
        publish("cmp", tmp_path / "kept")


def test_a_sweep_comes_with_its_values(results, tmp_path, monkeypatch):
    """As for a comparison; another sweep's folders, whose names begin alike, stay."""
    make_up_runs(monkeypatch, sweep)
    for name, values in (("swept", ["0", "0.02"]), ("swept-0", ["0.1"])):
        sweep.sweep("beta", values, "tiny", (0, 1), experiment=name, say=lambda line: None)
    finish(results)
    copy = publish("swept", tmp_path / "kept")
    assert {path.name for path in copy.iterdir()} == {"0", "0.02", "figures", "sweep.csv",
                                                      "sweep.md"}
    assert set(tables_of(copy, "swept")) == {"sweep.csv", "sweep.md"}


def test_nothing_is_lost_by_publishing(experiment, tmp_path, monkeypatch):
    """Neither the experiment itself, nor what was published before and is not here any more."""
    with pytest.raises(UserError, match="choose another --to"):
        publish("made", experiment.parent)
    assert (experiment / "sft" / "seed-1" / "checkpoint").is_dir()
    publish("made", tmp_path / "kept")
    shutil.rmtree(experiment / "sft" / "seed-1")
    with pytest.raises(UserError, match="1 published runs .*would be lost .sft/seed-1"):
        publish("made", tmp_path / "kept")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Could not write to .*choose another --to"):
        publish("made", tmp_path / "file")


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


def test_a_report_goes_on_past_a_damaged_packed_log(experiment, tmp_path):
    """One file that came through a network in halves keeps no reader from the other runs."""
    copy = publish("made", tmp_path / "kept")
    path = copy / "sft" / "seed-1" / "eval.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    found = load_experiment(copy)
    assert len(found.runs) == 2
    assert any("seed 1" in note and "cannot be unpacked" in note for note in found.notes)


def test_nothing_to_publish_is_said(experiment, tmp_path):
    """A misspelled name is a sentence."""
    with pytest.raises(UserError, match="no run of experiment 'maid'"):
        publish("maid", tmp_path)


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"{}" * 1000)[:-9], b""])
def test_a_damaged_packed_log_is_one_sentence(tmp_path, content):
    """It is named, with what to do; an empty one is an empty log."""
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

"""Published records: a copy reads the same, and only what can be repeated is published."""

import gzip
import json
import shutil

import pytest
from facts import lines_with
from made_up_runs import make_up_runs
from synthetic_records import build_experiment

from hybridrl_lib.cli import main
from hybridrl_lib.experiments.compare import compare
from hybridrl_lib.experiments.publish import publish, tables_of
from hybridrl_lib.experiments.sweep import sweep
from hybridrl_lib.records import files
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.report.loading import load_experiment
from hybridrl_lib.report.report import make_texts
from hybridrl_lib.report.table2 import make_table2
from hybridrl_lib.system.errors import UserError


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Figures are empty files, because drawing them takes most of the time."""
    for module in ("arm_tables", "sweeps"):
        monkeypatch.setattr(f"hybridrl_lib.report.{module}.as_bytes", lambda figure, kind: b"")


@pytest.fixture
def experiment(results):
    """The folder of a finished experiment of committed code, with checksums of its logs."""
    folder = build_experiment(results / "made", ["base", "sft"], [0, 1])
    for path in folder.glob("*/seed-*"):
        run = RunFolder(path)
        run.write("manifest.json", run.read("manifest.json") | {
            "complete": True, "git_commit": "0" * 40, "git_dirty": False,
            "checksums": run.checksums()})
        (path / "checkpoint").mkdir()
        (path / "checkpoint" / "weights").touch()
    return folder


def test_what_is_published_reads_the_same(experiment, tmp_path, capsys):
    """Protects tables from the packing: those of the copy are the same to the letter."""
    assert main(["publish", "made", "--to", str(tmp_path / "kept")]) == 0
    assert str(tmp_path / "kept" / "made") in capsys.readouterr().out
    copy = tmp_path / "kept" / "made"
    texts = [make_texts(one, make_table2(one))
             for one in (load_experiment(experiment), load_experiment(copy))]
    assert texts[0] == texts[1] and texts[0]
    run = copy / "sft" / "seed-0"
    packed = (run / "eval.jsonl.gz").read_bytes()
    assert packed[3:10] == b"\0\0\0\0\0\2\xff", "no name, no time, no system in its header"
    assert not (run / "eval.jsonl").exists()
    assert not list(copy.rglob("checkpoint"))
    assert RunFolder(run).altered() == []
    assert RunFolder(run).lines("eval.jsonl") == RunFolder(
        experiment / "sft" / "seed-0").lines("eval.jsonl")
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


def test_a_comparison_comes_with_all_its_records(results, tmp_path, monkeypatch):
    """Protects the claim that each number has its record: tuning and transfer are rebuilt, too."""
    make_up_runs(monkeypatch)
    compare("tiny", seeds=(0, 1), methods=["rl"], grid=(1, 0.5), transfer=1, jobs=2,
            experiment="cmp", say=lambda line: None)
    compare("tiny", methods=["rl"], grid=(1, 0.5), jobs=2, experiment="cmp-2",
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
    page.write_text(page.read_text().replace("| RL |", "| RL! |"))
    with pytest.raises(UserError, match=r"comparison\.md\b.*\bcmp\b"):
        publish("cmp", tmp_path / "kept")


def test_a_sweep_comes_with_its_values(results, tmp_path, monkeypatch):
    """As for a comparison; those of another sweep with a similar name are left out."""
    make_up_runs(monkeypatch)
    for name, values in (("swept", ["0", "0.02"]), ("swept-0", ["0.1"])):
        sweep("beta", values, "tiny", (0, 1), jobs=2, experiment=name, say=lambda line: None)
    finish(results)
    copy = publish("swept", tmp_path / "kept")
    assert {path.name for path in copy.iterdir()} == {"0", "0.02", "figures", "sweep.csv",
                                                      "sweep.md"}
    assert set(tables_of(copy, "swept")) == {"sweep.csv", "sweep.md"}


def test_nothing_is_lost_by_publishing(experiment, tmp_path, monkeypatch):
    """Neither the experiment itself, nor what was published before and is not here anymore."""
    with pytest.raises(UserError, match="--to"):
        publish("made", experiment.parent)
    assert (experiment / "sft" / "seed-1" / "checkpoint").is_dir()
    publish("made", tmp_path / "kept")
    shutil.rmtree(experiment / "sft" / "seed-1")
    with pytest.raises(UserError, match="sft/seed-1"):
        publish("made", tmp_path / "kept")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--to"):
        publish("made", tmp_path / "file")
    with pytest.raises(UserError, match="'maid'"):
        publish("maid", tmp_path)


def test_what_cannot_be_repeated_is_not_published(experiment, tmp_path):
    """Protects readers from numbers without the code or the logs that made them."""
    run = RunFolder(experiment / "sft" / "seed-1")
    manifest, reasons = run.read("manifest.json"), set()
    for change in ({"complete": False}, {"git_dirty": True}, {"git_commit": None},
                   {"checksums": {"eval.jsonl": "0"}}):
        run.write("manifest.json", manifest | change)
        with pytest.raises(UserError, match="1 of 3 .*sft/seed-1") as caught:
            publish("made", tmp_path / "kept")
            pytest.fail(f"{change} was published")
        reasons.add(str(caught.value))
        assert ("eval.jsonl" in str(caught.value)) == ("checksums" in change)
        assert not (tmp_path / "kept").exists()
    assert len(reasons) == 3, "not finished, not committed, changed"
    run.write("manifest.json", manifest)
    copy = publish("made", tmp_path / "kept")
    path = copy / "sft" / "seed-1" / "eval.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    found = load_experiment(copy)
    assert len(found.runs) == 2
    assert lines_with("\n".join(found.notes), "sft", 1, "eval.jsonl.gz")


def test_a_damaged_packed_log_is_an_error(tmp_path, monkeypatch):
    """It is named; an empty one is an empty log."""
    for content in (b"no gzip", gzip.compress(b"{}" * 1000)[:-9]):
        (tmp_path / "metrics.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match="metrics.jsonl.gz"):
            RunFolder(tmp_path).lines("metrics.jsonl")
    (tmp_path / "metrics.jsonl.gz").write_bytes(b"")
    assert RunFolder(tmp_path).lines("metrics.jsonl") == []
    monkeypatch.setattr(files, "LARGEST_LOG", 1000)
    line = json.dumps({"step": 1, "epoch": 1.0}).encode() + b"\n"
    (tmp_path / "metrics.jsonl.gz").write_bytes(gzip.compress(line * 100))
    with pytest.raises(UserError, match="1,000"):
        RunFolder(tmp_path).lines("metrics.jsonl")

"""The report from synthetic records: correct numbers, complete notes, same bytes, no torch."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from facts import lines_with, notes_with
from PIL import Image
from synthetic_records import build_experiment, write_jsonl

from hybridrl_lib.config.presets import KEYS
from hybridrl_lib.records.files import write_whole
from hybridrl_lib.report import figures
from hybridrl_lib.report import hyperparameters as constants
from hybridrl_lib.report.comparisons import pairs
from hybridrl_lib.report.loading import benchmark_title, load_experiment, probe_problems
from hybridrl_lib.report.page import beside_published, caption
from hybridrl_lib.report.race import make_race, race_markdown
from hybridrl_lib.report.report import make_report, make_texts
from hybridrl_lib.report.style import MARKERS, line_style, palette, style
from hybridrl_lib.report.table2 import interval_notes, make_table2, table_notes
from hybridrl_lib.report.text import number, percent, plus, tex
from hybridrl_lib.setups import SETUPS, Setup, paper_setups, setups_with_notebook
from hybridrl_lib.system.errors import UserError

pytestmark = pytest.mark.xdist_group("report")  # one process draws the figures
SMALL = {"test": {"tiny_word": 30, "tiny_symbolic": 20},
         "train": {"tiny_word": 24, "tiny_symbolic": 16}, "samples": 8, "epochs": 4}
TEXTS = {"table2.csv", "table2.md", "table2.tex", "differences.csv", "differences.md", "gap.csv",
         "gap.md", "steps_to_threshold.csv", "steps_to_threshold.md", "hyperparameters.md",
         "signal.csv", "signal.md", "report.md"}
PAPER = {name: SETUPS[name] for name in paper_setups()}
PICTURES = {f"{name}.{kind}" for kind in ("svg", "png") for name in
            ("kl", "reward", "entropy", "loss", "lengths", "correctness", "table2")}
# What the report must never import.
BLOCKED = ("torch", "transformers", "accelerate", "datasets", "peft")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Seven setups, three seeds, few problems; tests that change files use a copy."""
    return build_experiment(tmp_path_factory.mktemp("runs") / "made_up", seeds=range(3), **SMALL)


@pytest.fixture(scope="module")
def made(records, tmp_path_factory):
    """(folder, files, printed text) of a report on `records`."""
    out, printed = tmp_path_factory.mktemp("report"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        files = make_report(records, out)
    return out, files, printed.getvalue()


@pytest.fixture(scope="module")
def report(made):
    """The folder of a report on `records`."""
    return made[0]


@pytest.fixture
def own_records(records, tmp_path):
    """A copy of the records that a test may change."""
    return Path(shutil.copytree(records, tmp_path / "made_up"))


def tables(folder):
    """The texts of a report by file name, without the figures, which take most of the time."""
    experiment = load_experiment(folder)
    return make_texts(experiment, make_table2(experiment))


def rows(text):
    """A CSV file, or its text, as dictionaries."""
    text = text if isinstance(text, str) else text.read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def lines(path):
    """A JSON-lines file as dictionaries."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_writes_every_file_and_returns_them(made, report):
    """All files that notebooks, README, and CI rely on; pictures are small, 300 dpi, undated."""
    folder, written, printed = made
    assert {path.name for path in folder.iterdir() if path.is_file()} == TEXTS
    assert {path.name for path in (folder / "figures").iterdir()} == PICTURES
    assert sorted(written) == sorted(path for path in folder.rglob("*") if path.is_file())
    assert lines_with(printed, "SFT + RL", "52.7") and lines_with(printed, "95")
    for path in sorted((report / "figures").iterdir()):
        assert path.stat().st_size < 200_000, path.name
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.info["dpi"][0] == pytest.approx(300, abs=1)
                assert picture.width == pytest.approx(2040, abs=2)
        else:
            assert "<dc:date>" not in path.read_text(encoding="utf-8")


def test_same_records_give_the_same_bytes_without_torch(records, report, tmp_path):
    """Protects CI's rebuild of the published tables."""
    code = ("import sys\nclass Absent:\n    def find_spec(self, name, *rest):\n"
            f"        if name.partition('.')[0] in {BLOCKED!r}: raise ImportError(name)\n"
            "sys.meta_path.insert(0, Absent())\nfrom pathlib import Path\n"
            "from matplotlib import rcParams\n"
            "before = {k: v for k, v in rcParams.items() if k != 'backend'}\n"
            "from hybridrl_lib import make_report\n"
            "make_report(Path(sys.argv[1]), Path(sys.argv[2]))\n"
            f"assert not [n for n in {BLOCKED!r} if n in sys.modules]\n"
            "assert {k: v for k, v in rcParams.items() if k != 'backend'} == before\n")
    subprocess.run([sys.executable, "-c", code, records, tmp_path], check=True, capture_output=True,
                   cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONHASHSEED": "7"})
    differ = [name for name in sorted(TEXTS | {f"figures/{picture}" for picture in PICTURES})
              if (tmp_path / name).read_bytes() != (report / name).read_bytes()]
    assert not differ


def test_table_holds_what_the_records_hold(records, report):
    """Means counted from the raw lines, all columns, the paper's values for exact match only."""
    table = {(row["setup"], row["benchmark"], row["metric"]): row
             for row in rows(report / "table2.csv")}
    greedy, pass_at_2, lenient = [], [], []
    for seed in range(3):
        for line in lines(records / "sft_then_rl" / f"seed-{seed}" / "eval.jsonl"):
            where = (line["checkpoint"], line["part"], line["benchmark"])
            if where == ("last", "test", "tiny_word"):
                greedy.append(line["greedy"]["strict"])
                lenient.append(line["greedy"]["lenient"])
                wrong = 8 - sum(line["samples"]["strict"])
                pass_at_2.append(1 - wrong * (wrong - 1) / (8 * 7))
    for metric, values in (("exact_match", greedy), ("pass@2", pass_at_2),
                           ("exact_match_lenient", lenient)):
        row = table["sft_then_rl", "tiny_word", metric]
        assert float(row["mean"]) == pytest.approx(100 * np.mean(values), abs=0.006)
        assert float(row["ci_low"]) < float(row["mean"]) < float(row["ci_high"])
        assert (row["seeds"], row["problems"]) == ("3", "30")
    table = rows(report / "table2.csv")
    assert list(table[0]) == ["setup", "benchmark", "metric", "mean", "ci_low", "ci_high", "seeds",
                              "problems", "paper"]
    assert {row["metric"] for row in table if row["setup"] == "rl"} == {
        "exact_match", "exact_match_lenient", "exact_match_best", "pass@1", "pass@2", "pass@4",
        "pass@8", "pass@1_lenient", "exact_match_train", "pass@1_train"}
    paper = {(row["setup"], row["benchmark"]): row["paper"] for row in table if row["paper"]}
    assert paper["sft_then_rl_entropy", "tiny_word"] == "52.7"
    assert paper["rl", "tiny_symbolic"] == "20.7"
    assert len(paper) == 12 and {row["metric"] for row in table if row["paper"]} == {"exact_match"}


def test_wide_table_has_all_rows_and_its_notes(records, report):
    """A reader finds all rows, notes, hyperparameters, and the published table beside this one."""
    text = (report / "table2.md").read_text(encoding="utf-8")
    experiment = load_experiment(records)
    notes = table_notes(experiment, make_table2(experiment))
    assert not [setup.title for setup in PAPER.values() if f"| {setup.title} |" not in text]
    assert not [note for note in notes if note not in text]
    assert notes_with(text, benchmark_title("tiny_word").title, "GSM8K")
    assert notes_with(text, benchmark_title("tiny_symbolic").title, "MATH-500")
    assert len(interval_notes(experiment)) == 3, "all seeds, few seeds, and the base model's"
    latex = (report / "table2.tex").read_text(encoding="utf-8")
    assert latex.count(r"\\") == 8 and r"\bottomrule" in latex and r"\%" in latex
    experiment = load_experiment(records)
    text = beside_published(experiment, make_table2(experiment), report)
    row = next(line for line in text.splitlines()
               if line.startswith(f"| SFT + RL | {benchmark_title('tiny_word').title} |"))
    here, there = row.split("|")[3:5]
    assert here == there and "3 / 3" in row
    text = (report / "hyperparameters.md").read_text(encoding="utf-8")
    assert "| SFT + RL + entropy reg. | rl | 2 | 108 | 216 | 0 | 1 | 0.02 |" in text
    assert "| SFT + RL | sft | 2 | 28 | 28 | 1 | 0 | 0 |" in text
    wanted = {"| ε |", "| β |", "γ", "`rl.learning_rate` = 0.00015", "`rl.group_size` = 8"} | {
        f"`{key}`" for key in KEYS}
    assert not {piece for piece in wanted if piece not in text}


def test_one_seed_is_noted(records, tmp_path):
    """Protects against reading a one-seed interval as one over seeds."""
    folder = tmp_path / "made_up"
    for setup in ("base", "sft", "rl"):
        shutil.copytree(records / setup / "seed-0", folder / setup / "seed-0")
    texts, experiment = tables(folder), load_experiment(folder)
    text = texts["table2.md"]
    assert {row["seeds"] for row in rows(texts["table2.csv"])} == {"1"}
    of_seeds, of_base = interval_notes(experiment)
    assert of_seeds in text and of_base == interval_notes(load_experiment(records))[-1]
    assert of_seeds not in interval_notes(load_experiment(records))
    assert notes_with(text, "SFT + RL", "SFT + entropy reg."), "missing setups are named"
    assert notes_with(texts["differences.md"], "seed", "SFT", "RL")
    (tmp_path / "empty").mkdir()
    for name, arguments in (("nowhere", {}), ("empty", {}), (
            "empty", {"experiment_folder": records, "published": tmp_path / "empty"})):
        with pytest.raises(UserError, match=name):
            make_report(**({"experiment_folder": tmp_path / name,
                            "out_folder": tmp_path / "out"} | arguments))
    assert not (tmp_path / "out").exists()


def test_differences_pairs_and_holm(report):
    """Protects the family: 12 pairs, two benchmarks, three metrics, Holm never below p."""
    found = rows(report / "differences.csv")
    assert len(found) == 12 * 2 * 3
    assert {(row["first"], row["second"]) for row in found} == {
        *((name, "base") for name in PAPER if name != "base"), ("rl", "sft"),
        ("sft_then_rl", "sft"), ("sft_then_rl", "rl"), ("sft_entropy", "sft"),
        ("rl_entropy", "rl"), ("sft_then_rl_entropy", "sft_then_rl")}
    assert all(float(row["p_holm"]) >= float(row["p_value"]) for row in found)
    paper = {row["paper"] for row in found if (row["first"], row["second"], row["benchmark"])
             == ("sft_then_rl", "rl", "tiny_word")}
    assert paper == {"19.8", ""}
    table = {(row["setup"], row["benchmark"]): float(row["mean"])
             for row in rows(report / "table2.csv") if row["metric"] == "exact_match"}
    for row in found:
        if row["metric"] == "exact_match":
            difference = table[row["first"], row["benchmark"]] \
                - table[row["second"], row["benchmark"]]
            assert float(row["difference"]) == pytest.approx(difference, abs=0.02)
    table = {(row["setup"], row["benchmark"], row["metric"]): float(row["mean"])
             for row in rows(report / "table2.csv")}
    for row in rows(report / "gap.csv"):
        where = (row["setup"], row["benchmark"])
        assert float(row["test"]) == table[(*where, row["metric"])]
        assert float(row["train"]) == table[(*where, row["metric"] + "_train")]
        assert float(row["gap"]) == pytest.approx(float(row["train"]) - float(row["test"]),
                                                  abs=0.011)


def probe(rewards):
    """Lines of a probe taken every ten steps, an epoch apart."""
    return [{"step": 10 * index, "stage": "rl", "epoch": float(index), "reward": reward}
            for index, reward in enumerate(rewards)]


def test_steps_to_threshold(own_records):
    """Protects the race: halfway by default; one lucky probe does not count; never has a row."""
    for setup in PAPER:
        if setup not in ("base", "rl", "sft"):
            shutil.rmtree(own_records / setup)
    for seed in range(3):
        write_jsonl(own_records / "rl" / f"seed-{seed}" / "probe.jsonl",
                    probe([0.2, 0.6, 0.3, 0.5, 0.6, 0.8]))
        write_jsonl(own_records / "sft" / f"seed-{seed}" / "probe.jsonl",
                    probe([0.2, 0.3, 0.3, 0.3, 0.3, 0.4]))
    experiment = load_experiment(own_records)
    race = make_race(experiment)
    assert (race.threshold, race.best) == (pytest.approx(0.5), "rl")
    assert {p.setup: (p.steps, p.epochs) for p in race.setups} == {
        "rl": ((30, 30, 30), (3.0, 3.0, 3.0)), "sft": ((), ())}
    assert [line.count("–") for line in lines_with(race_markdown(experiment, race), "SFT")
            if line.startswith("| SFT |")] == [2]
    assert make_race(experiment, threshold=0.3).setups[0].steps == (10, 10, 10)


def test_unfinished_and_broken_runs_are_left_out_and_named(own_records):
    """Protects against counting half a run, and against losing the report to one broken file."""
    manifest = own_records / "rl" / "seed-0" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    (own_records / "sft" / "seed-1" / "manifest.json").unlink()
    log = own_records / "sft" / "seed-2" / "probe.jsonl"
    log.write_text(log.read_text().replace("{", "", 1))
    texts = tables(own_records)
    text = texts["table2.md"]
    assert notes_with(text, "rl", "0") and notes_with(text, "sft", "1")
    assert notes_with(text, "sft", "2", "1", "probe.jsonl"), "the file and its line are named"
    assert notes_with(text, "SFT", "1, 2"), "missing seeds are named"
    seeds = {row["setup"]: row["seeds"] for row in rows(texts["table2.csv"])}
    assert (seeds["rl"], seeds["sft"], seeds["sft_then_rl"]) == ("2", "1", "3")


def test_damaged_logs(own_records):
    """A cut-off line is one line; problems that a seed lacks are dropped; doubles break a run."""
    log = own_records / "rl" / "seed-0" / "probe.jsonl"
    whole = log.read_text()
    log.write_text(whole[:-20])
    run = load_experiment(own_records).of("rl")[0]
    assert len(run.probe) == whole.count("\n") - 1
    path = own_records / "rl" / "seed-1" / "eval.jsonl"
    kept = [line for line in lines(path)
            if (line["part"], line["id"]) != ("test", "tiny_word-test-3")]
    write_jsonl(path, kept)
    texts = tables(own_records)
    cell = next(row for row in rows(texts["table2.csv"]) if
                (row["setup"], row["benchmark"], row["metric"]) == ("rl", "tiny_word", "pass@1"))
    assert cell["problems"] == "29"
    assert notes_with(texts["table2.md"], "RL", benchmark_title("tiny_word").title, "pass@1", 1)
    path = own_records / "rl" / "seed-1" / "eval.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    experiment = load_experiment(own_records)
    assert notes_with("\n".join(experiment.notes), "rl", "1")
    assert [run.seed for run in experiment.of("rl")] == [0, 2]


def test_updates_are_those_of_all_seeds(own_records):
    """Protects steps from being read as optimizer updates: the log counts the updates made."""
    path = own_records / "rl" / "seed-0" / "metrics.jsonl"
    first, *others = lines(path)
    write_jsonl(path, [first | {"updates": 0}, *others])
    assert re.search(r"\| RL \| rl \| 4 \| 216 \| 430\D+432 \|",
                     tables(own_records)["hyperparameters.md"])
    write_jsonl(path, [{k: v for k, v in line.items() if k != "updates"} for line in others])
    assert "| RL | rl |" in tables(own_records)["hyperparameters.md"]
    path = own_records / "rl" / "seed-0" / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["rl"]["beta"] = 0.5
    path.write_text(json.dumps(config))
    text = tables(own_records)["hyperparameters.md"]
    assert notes_with(text, "`rl.beta`") and "0.02 / 0.5" in text


def test_constants_in_the_table_are_those_of_the_code(make_trainer):
    """Protects the table of constants, which is written without torch."""
    from inspect import signature

    from torch.optim import AdamW

    from hybridrl_lib import objectives

    epsilon = signature(objectives.group_advantages).parameters["epsilon"].default
    assert epsilon == constants.ADVANTAGE_EPSILON
    assert signature(AdamW).parameters["eps"].default == constants.ADAM_EPSILON
    assert objectives.LARGEST_LOG_RATIO == constants.LARGEST_LOG_RATIO
    trainer = make_trainer("sft", "training.epochs=20", "training.warmup_steps=4",
                           "sft.learning_rate=1e-3", "training.final_learning_rate_fraction=0.1")
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.folder.lines("metrics.jsonl")]
    assert rates == pytest.approx([1e-3 * min(1, (s + 1) / 4) * (0.1 + 0.9 * (1 - s / 20))
                                   for s in range(20)], rel=1e-5)
    assert 0.8e-3 < max(rates) < 1e-3 and min(rates[5:]) > 1e-4, "the peak is never reached"
    assert any("min(1, (s + 1) / w) · (f + (1 − f)(1 − s / S))" in t for _, t in constants.FIXED)


def test_joint_curves_come_from_the_probe_alone(own_records):
    """The step log's columns do not change a joint curve; two seeds are drawn one by one."""
    def drawn():
        with style():
            panel = figures.draw_reward(load_experiment(own_records)).axes[0]
        return {line.get_label(): np.array(line.get_xydata()) for line in panel.get_lines()
                if not line.get_label().startswith("_")}

    before = drawn()
    assert set(before) == {setup.title for setup in PAPER.values() if setup.stages}
    expected = np.mean([[line["reward"] for line in lines(
        own_records / "rl" / f"seed-{seed}" / "probe.jsonl")] for seed in range(3)], axis=0)
    assert before["RL"][:, 1] == pytest.approx(expected)
    for path in own_records.glob("*/*/metrics.jsonl"):
        write_jsonl(path, [line | {"reward": 9.0, "entropy": 9.0} for line in lines(path)])
    after = drawn()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    for path in own_records.glob("*/seed-2"):
        shutil.rmtree(path)
    with style():
        panel = figures.draw_kl(load_experiment(own_records)).axes[0]
    assert not panel.collections
    thin = [line for line in panel.get_lines() if line.get_linewidth() == 0.6]
    assert len(thin) == 2 * 6


def test_twins_share_a_color_and_stage_two_is_marked(records):
    """Protects reading without color: the twin is dashed and hollow; stage two has a line."""
    with style():
        figure = figures.draw_entropy(load_experiment(records))
    curves = {line.get_label(): line for line in figure.axes[0].get_lines()}
    for name in ("SFT", "RL", "SFT + RL"):
        plain, twin = curves[name], curves[name + " + entropy reg."]
        assert plain.get_color() == twin.get_color()
        assert twin.is_dashed() and not plain.is_dashed()
        assert twin.get_markerfacecolor() == "white"
    assert len({curves[name].get_color() for name in ("SFT", "RL", "SFT + RL")}) == 3
    marks = [line for line in figure.axes[0].get_lines() if list(line.get_xdata()) == [2.0, 2.0]]
    assert len(marks) == 1
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(legend[:-2]) == {setup.title for setup in PAPER.values() if setup.stages}
    assert len(legend) == 8, "the start of stage two and the band come last"
    with style():
        figure = figures.draw_correctness(load_experiment(records))
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert {axes.get_title(loc="left") for axes in panels} == {
        setup.title for setup in PAPER.values() if setup.stages}
    for axes in panels:
        assert len(axes.collections) == 9  # 0..8 right
        top = axes.collections[-1].get_paths()[0].vertices
        assert top[:, 1].max() == pytest.approx(100.0)
        assert top[:, 0].min() == 0.0  # the base model's state


def test_signal_is_that_of_the_base_model_on_training_problems(own_records, tmp_path):
    """Protects the estimate of RL's chances: base model, training problems, groups of G."""
    texts = tables(own_records)
    found = {(row["benchmark"], row["verdict"]): row for row in rows(texts["signal.csv"])}
    assert set(found) == {(b, v) for b in SMALL["train"] for v in ("strict", "lenient")}
    (log,) = (own_records / "base").glob("seed-*/eval.jsonl")
    for benchmark, count in SMALL["train"].items():
        samples = [line["samples"]["strict"] for line in lines(log)
                   if line["part"] == "train" and line["benchmark"] == benchmark]
        row = found[benchmark, "strict"]
        assert (int(row["problems"]), int(row["samples"]), int(row["group"])) == (count, 8, 8)
        assert float(row["pass@1"]) == pytest.approx(100 * np.mean(samples), abs=0.01)
        solved, all_of = np.any(samples, axis=1), np.all(samples, axis=1)
        assert float(row["pass@group"]) == pytest.approx(100 * np.mean(solved), abs=0.01)
        assert float(row["groups_with_signal"]) == pytest.approx(
            100 * np.mean(solved & ~all_of), abs=0.01)
    shutil.rmtree(own_records / "base")
    assert "signal.md" not in tables(own_records)
    for path in own_records.glob("*/*/probe.jsonl"):
        path.unlink()
    for path in own_records.glob("*/*/eval.jsonl"):
        write_jsonl(path, [{k: v for k, v in line.items() if k != "samples"}
                           for line in lines(path) if line["part"] == "test"])
    make_report(own_records, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert not {"gap.csv", "signal.csv", "steps_to_threshold.csv", "reward.svg",
                "correctness.svg"} & names
    assert {"table2.csv", "loss.svg", "table2.svg", "report.md"} <= names


def test_a_setup_in_the_table_of_setups_that_never_ran_changes_nothing(records, monkeypatch):
    """Protects the rebuild of published tables when somebody adds a setup."""
    before = tables(records)
    monkeypatch.setitem(SETUPS, "blended", Setup("blended", "Blended", ("rl",)))
    assert tables(records) == before
    assert "blended" not in setups_with_notebook() and set(setups_with_notebook()) < set(SETUPS)
    before = {name: line_style(name) for name in SETUPS}
    names = [f"method_{index}" for index in range(12)]
    for name in names:
        monkeypatch.setitem(SETUPS, name, Setup(name, name, ("rl",)))
    assert {name: line_style(name) for name in before} == before
    looks = [line_style(name)["color"] for name in (*names, "unknown", "method_3_entropy")]
    assert len({before[name]["color"] for name in ("sft", "rl", "sft_then_rl")} | set(looks)) == 7
    assert looks[3] == looks[-1] and len(palette()) == len(set(palette())) == len(MARKERS)


def test_a_setup_in_the_table_of_setups_gets_its_row_once_it_ran(own_records, monkeypatch):
    """A new method has a title, a row after the paper's, baselines, and its own color."""
    (own_records / "rl").rename(own_records / "blended")
    others = dict(SETUPS)
    SETUPS.clear()  # where the line is in the table does not matter
    SETUPS["blended"] = Setup("blended", "Blended", ("rl",))
    SETUPS.update(others)
    try:
        experiment = load_experiment(own_records)
        text = tables(own_records)["table2.md"]
        with style():
            figure = figures.draw_reward(experiment)
    finally:
        SETUPS.clear()
        SETUPS.update(others)
    assert experiment.setups[-1] == "blended"
    assert "RL" not in experiment.setups and "| RL | – |" in text
    assert text.index("| SFT + RL + entropy reg. |") < text.index("| Blended |")
    assert {second for first, second in pairs(experiment) if first == "blended"} == {
        "base", "sft_then_rl"}
    colors = {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
    assert list(colors.values()).count(colors["Blended"]) == 1
    (own_records / "blended").rename(own_records / "another_method")
    experiment = load_experiment(own_records)
    assert ("another_method", "sft_then_rl") in pairs(experiment)
    assert "| another_method |" in tables(own_records)["table2.md"]


def test_best_checkpoint_that_is_the_last_one_counts(own_records):
    """Protects the best checkpoint's mean: a seed whose last is its best has no rows `best`."""
    def best():
        table = make_table2(load_experiment(own_records))
        return table.cells.get(("rl", "tiny_word", "exact_match_best"))

    run = own_records / "rl" / "seed-1"
    everything = lines(run / "eval.jsonl")
    write_jsonl(run / "eval.jsonl", [line for line in everything if line["checkpoint"] == "last"])
    record = json.loads((run / "manifest.json").read_text())
    assert best().interval.seeds == 2
    for step, strict, seeds in ((216, 0.5, 3), (108, 0.5, 2), (216, -1.0, 2), (216, 0.0, 3)):
        write_whole(run / "manifest.json", json.dumps(
            record | {"steps": 216, "best_on_validation": {"strict": strict, "step": step}}))
        assert best().interval.seeds == seeds, (step, strict)
    strict = [line["greedy"]["strict"] for seed in range(3) for line in
              (lines(own_records / "rl" / f"seed-{seed}" / "eval.jsonl"))
              if (line["checkpoint"], line["part"], line["benchmark"])
              == ("last" if seed == 1 else "best", "test", "tiny_word")]
    assert best().interval.mean == pytest.approx(np.mean(strict))


def test_the_probes_problems_are_counted(own_records):
    """Protects the reader: of 32 prompts taken in turn, one benchmark may still have more."""
    for path in own_records.glob("*/*/manifest.json"):
        record = json.loads(path.read_text())
        record["data"] = {name: {"problems": {"validation": count}}
                          for name, count in (("tiny_symbolic", 9), ("tiny_word", 29))}
        path.write_text(json.dumps(record))
    experiment = load_experiment(own_records)
    facts = (23, benchmark_title("tiny_word").title, 9, benchmark_title("tiny_symbolic").title)
    assert lines_with(probe_problems(experiment), *facts)
    assert notes_with(race_markdown(experiment, make_race(experiment)), *facts)
    assert lines_with(caption(experiment, "kl"), *facts)
    assert not lines_with(caption(experiment, "table2"), *facts)


def test_numbers_as_text(tmp_path):
    """Protects the byte-for-byte rebuild: noise in the last bit changes no digit; no -0."""
    assert number(43.125, 2) == number(43.125 - 7e-15, 2) == number(43.125 + 7e-15, 2)
    assert number(-0.001, 2) == "0.00" and number(-0.04, 1) == "0.0" and number(None) == ""
    assert percent(0.5) == "50.00"
    assert (plus(1.25), plus(-3.0), plus(0.0), plus(None)) == ("+1.2", "-3.0", "0.0", "–")
    assert tex("50 % of a_b & {c}") == r"50 \% of a\_b \& \{c\}"
    target = tmp_path / "table2.csv"
    target.mkdir()
    with pytest.raises(UserError, match="table2.csv"):
        write_whole(target, "new")
    assert list(tmp_path.iterdir()) == [target]

"""What notebooks show: model output stays data, the live view stays small, numbers are right."""

import contextlib
import csv
import io
import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from facts import lines_with
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from synthetic_records import build_experiment

from hybridrl_lib.experiments import execute
from hybridrl_lib.notebook import answers, curves, findings, scores, tables
from hybridrl_lib.notebook.answers import show_answers, show_completions, show_tokens
from hybridrl_lib.notebook.curves import plot_against, plot_run
from hybridrl_lib.notebook.findings import show_claims, show_findings
from hybridrl_lib.notebook.live_view import LiveRun, live
from hybridrl_lib.notebook.place import begin, experiment_path, is_headless, list_files
from hybridrl_lib.notebook.questions import check
from hybridrl_lib.notebook.scores import show_reasons, show_scores, show_signal
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.report.style import line_style
from hybridrl_lib.system.errors import UsageError, UserError
from hybridrl_lib.training.observer import Lines

pytestmark = pytest.mark.xdist_group("views")  # one process makes the report
ATTACK = "<script>alert(1)</script><img src=x onerror=\"alert('2')\">&amp;"
LARGEST_PICTURE = 60_000


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Made-up records of three setups, two seeds each."""
    return build_experiment(tmp_path_factory.mktemp("records") / "tiny",
                            setups=("base", "sft", "rl", "sft_then_rl"), seeds=range(2),
                            test={"tiny_word": 40, "tiny_symbolic": 30},
                            train={"tiny_word": 10, "tiny_symbolic": 10})


@pytest.fixture()
def shown(monkeypatch):
    """What a notebook would show, as text (HTML, Markdown) or bytes (PNG)."""
    pieces = []
    for module in (answers, tables, curves, scores, findings):
        monkeypatch.setattr(module, "display", lambda piece: pieces.append(piece.data))
    return pieces


def step_row(step, **values):
    return {"step": step, "stage": "rl", "epoch": step / 10, "reward": 0.25, "entropy": 0.3,
            "frac_reward_zero_std": 0.5, "grad_norm": 1.0, "completions/mean_length": 20.0,
            "loss/rl": 0.0, **values}


def sample_row(text, **values):
    return {"step": 1, "id": "a/1", "prompt": text, "completion": text, "gold": text,
            "reward": 0.0, "finished": False, **values}


def assert_harmless(html):
    assert "<script" not in html and "<img" not in html and "&lt;script&gt;" in html
    assert "&amp;amp;" in html, "what looks like an escape is shown as it was written"


def test_model_output_is_escaped_everywhere(shown, tmp_path):
    """What a model wrote reaches the page as text: escaped, not typeset, and truncated."""
    record = RunFolder(tmp_path / "rl" / "seed-0")
    record.write_lines("samples.jsonl", [sample_row(ATTACK)])
    record.write_lines("eval.jsonl", [{
        "checkpoint": "last", "part": "test", "benchmark": ATTACK, "id": ATTACK, "gold": ATTACK,
        "greedy": {"text": ATTACK, "strict": False, "reason": ATTACK, "finished": True}}])
    record.write("config.json", {"settings": {}})
    show_completions(record)
    show_answers(record)
    show_tokens([[ATTACK]], [[0.5]], [ATTACK])
    tables.show_rows([ATTACK], [[ATTACK]])
    view = LiveRun("rl", show=None)
    view.on_sample(sample_row(ATTACK))
    for html in (*shown, view.html()):
        assert_harmless(html)
    assert len(shown) == 4
    tables.show_rows(["price"], [["from $3 to $5"]])
    assert "from $3 to $5" in shown[-1] and "mathjax_ignore" in shown[-1]
    assert len(tables.escaped("x" * 100_000)) < 1_000


class Page:
    """Replaces IPython's display: keeps what is shown, by handle."""

    def __init__(self):
        self.bundles, self.updates = [], 0

    def __call__(self, bundle, raw, display_id):
        assert raw and display_id
        self.bundles.append(bundle)
        page, place = self, len(self.bundles) - 1

        class Handle:
            def update(self, bundle, raw):
                page.bundles[place], page.updates = bundle, page.updates + 1

        return Handle()


def test_live_view(capsys, monkeypatch):
    """Two displays, drawn at the first and last step; an error in drawing does not end the run."""
    page = Page()
    view = LiveRun("rl", seconds=1e9, show=page)
    for step in range(1, 21):
        view.on_probe({"step": step, "epoch": step / 10, "reward": 0.2, "kl/base": 0.01,
                       "entropy": 0.3, "completions/mean_length": 20.0})
        view.on_sample(sample_row(f"answer {step}"))
        view.on_step(step_row(step), total=20)
    assert len(page.bundles) == 2, "a picture and a table, each with its display"
    assert page.updates == 2, "drawn at the first and last step, and not in between"
    picture, table = page.bundles
    assert Image.open(io.BytesIO(picture["image/png"])).format == "PNG"
    assert len(picture["image/png"]) < LARGEST_PICTURE
    assert "answer 20" in table["text/html"] and "answer 16" not in table["text/html"]
    assert lines_with(picture["text/plain"], 20)
    assert capsys.readouterr().out == ""
    view = LiveRun("rl", show=Page())
    monkeypatch.setattr("hybridrl_lib.notebook.live_view.draw_live", lambda *rows: 1 / 0)
    for step in (1, 2):
        view.on_step(step_row(step), total=3)
    assert capsys.readouterr().out.count("ZeroDivisionError") == 1
    rows = [{"step": 1, "stage": "sft", "epoch": 0.5, "loss/sft": 1.0, "entropy": 0.2}]
    assert len(curves.png(curves.draw_live(rows, []))) < LARGEST_PICTURE
    assert len(curves.png(curves.draw_run(rows, [], []))) < LARGEST_PICTURE


def test_headless(monkeypatch, capsys):
    """Protects logs from pictures that nobody sees, and viewers from plain lines."""
    for variables, headless in (
            ({"HYBRIDRL_HEADLESS": "1"}, True), ({"HYBRIDRL_HEADLESS": "0"}, False),
            ({"HYBRIDRL_HEADLESS": "0", "CI": "true"}, False), ({"CI": "true"}, True), ({}, True)):
        for name in ("HYBRIDRL_HEADLESS", "CI"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert is_headless() is headless, variables
        assert isinstance(live("rl"), Lines if headless else LiveRun), variables
    for text in ("2 runs of 1 arm", "\narm  score\nRL   81.0\n", "\n9 files in results"):
        tables.say(text)
    assert capsys.readouterr().out == "2 runs of 1 arm\n9 files in results\n"


def test_views_of_a_finished_run(experiment, shown, capsys):
    """Every view works from the record only, and says what is missing."""
    record = RunFolder(experiment / "sft_then_rl" / "seed-1")
    plot_run(record)
    plot_against(record, "rl")
    show_scores(record)
    show_reasons(record)
    show_signal(record)
    pictures = [piece for piece in shown if isinstance(piece, bytes)]
    assert len(pictures) == 3 and max(map(len, pictures)) < LARGEST_PICTURE
    table = shown[2]
    assert table.count("base model |") == 2
    differences = [line for line in table.splitlines() if line.startswith("- ")]
    scored = [line for line in differences if lines_with(line, "SFT + RL", "base model")]
    assert [("strict" in line, "lenient" in line) for line in scored] == [
        (True, False), (True, False), (False, True), (False, True)], "two benchmarks by two rules"
    assert lines_with(capsys.readouterr().out, 8), "groups of 8 with signal"
    shown.clear()
    plot_run(RunFolder(experiment / "base" / "seed-0"))
    plot_against(RunFolder(experiment / "rl" / "seed-0"), "rl_entropy")
    show_completions(RunFolder(experiment / "sft" / "seed-0"))
    said = capsys.readouterr().out
    assert said.count("\n") == 3 and lines_with(said, "rl_entropy") and not shown


def test_signal_is_the_chance_of_a_mixed_group(shown, tmp_path, capsys):
    """Protects the advice on whether RL can learn: checked by hand for 1 of 2 correct samples."""
    record = RunFolder(tmp_path / "base" / "seed-0")
    record.write_lines("eval.jsonl", [
        {"checkpoint": "last", "part": "test", "benchmark": "gsm8k", "id": str(i),
         "samples": {"strict": verdicts}} for i, verdicts in enumerate(([0, 0], [1, 0], [1, 1]))])
    show_signal(record, group_size=2)
    assert lines_with(capsys.readouterr().out, "GSM8K", "Pass@1 50.0%", "66.7%", "33.3%")


@pytest.fixture(scope="module")
def reported(experiment):
    """(files, printed text) of a report next to the records."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return tables.write_report(experiment, "tiny"), printed.getvalue()


def test_report_views(experiment, reported, shown, monkeypatch):
    """Protects the notebooks of the report, and their output from a folder of this machine."""
    files, printed = reported
    assert str(experiment) not in printed and len(files) > 10
    tables.show_table(experiment / "table2.md")
    show_claims(experiment)
    tables.show_picture(experiment, "kl")
    assert "#### Table 2" not in shown[0] and "### Table 2" in shown[0]
    assert "| --- |" in shown[1]
    assert isinstance(shown[2], bytes) and len(shown[2]) < LARGEST_PICTURE
    with pytest.raises(UserError, match="nothing.md"):
        tables.show_table(experiment / "nothing.md")
    monkeypatch.setattr(findings, "published_folder", lambda: experiment.parent)
    shown.clear()
    show_findings("rl")
    with (experiment / "table2.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream)
                if row["setup"] == "rl" and row["metric"] == "exact_match"]
    for row in rows:
        assert lines_with(shown[0], row["mean"]) and f"[{row['ci_low']}, {row['ci_high']}]" in (
            shown[0])
    assert lines_with(shown[0], "base model"), "and the difference to it"
    show_findings("rl", "absent")
    assert shown[1] != shown[0] and not lines_with(shown[1], rows[0]["mean"])


def test_claims_are_judged_by_sign_and_p_value(tmp_path):
    """Protects the paper, and us, from a verdict on noise. The claim here: RL is worse than SFT."""
    verdicts = []
    for difference, p_value in (("-5.00", "0.01"), ("5.00", "0.01"), ("-5.00", "0.20"),
                                ("5.00", "0.20")):
        (tmp_path / "differences.csv").write_text(
            "benchmark,metric,first,second,difference,ci_low,ci_high,p_value,p_holm,paper\n"
            f"gsm8k,exact_match,rl,sft,{difference},-1.00,1.00,0.5,{p_value},-12.3\n")
        (row,) = lines_with(findings.claims(tmp_path), "-12.3")
        *_, paper, verdict = (cell.strip() for cell in row.strip("| ").split("|"))
        assert paper == "-12.3" and difference.removeprefix("-").rstrip("0").rstrip(".") in row
        verdicts.append(verdict)
    holds, opposite, noise, same_noise = verdicts
    assert len({holds, opposite, noise}) == 3 and noise == same_noise


def test_begin_prints_what_will_run(capsys, monkeypatch, results):
    """Protects against a run with other settings than its reader believes."""
    monkeypatch.delenv("HYBRIDRL_SMOKE", raising=False)
    assert begin("tiny", 3, "", "rl.beta=0.5") == "tiny"
    said = capsys.readouterr().out
    assert lines_with(said, "tiny", 3) and lines_with(said, "rl.beta", "0.02", "0.5")
    assert "$HYBRIDRL_RESULTS_DIR/tiny" in said and str(results) not in said
    with pytest.raises(UsageError, match="rl.beta"):
        begin("tiny", 0, "", "rl.betta=0.5")
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils.logging import is_progress_bar_enabled

    for headless in ("0", "1"):
        monkeypatch.setenv("HYBRIDRL_HEADLESS", headless)
        begin("tiny", 0, "", "")
        assert are_progress_bars_disabled() == (headless == "1")
        assert not is_progress_bar_enabled()


def test_paths_are_shown_without_the_machines_folders(monkeypatch, tmp_path, capsys):
    """Protects a notebook's author: outputs do not show where the project is."""
    monkeypatch.setenv("HYBRIDRL_SMOKE", "1")
    monkeypatch.delenv("HYBRIDRL_RESULTS_DIR")
    (tmp_path / "hybridrl_lib").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    folder = experiment_path("tiny")
    assert folder.as_posix() == "../results/runs/tiny-smoke"
    RunFolder(folder / "rl" / "seed-0").write("config.json", {})
    (folder / "rl" / "seed-0" / ".lock").touch()
    list_files(RunFolder(folder / "rl" / "seed-0"))
    assert capsys.readouterr().out.split()[0] == "results/runs/tiny-smoke/rl/seed-0/config.json"


def test_a_users_error_is_one_sentence(monkeypatch, capsys):
    """Protects the sentence that says what to do from a long traceback."""
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    begin("tiny", 0, "", "")
    capsys.readouterr()
    shell.run_cell("from hybridrl_lib import UserError\nraise UserError('Do this.')")
    assert capsys.readouterr().out.strip() == "UserError: Do this."
    def said(answer, expected):
        check("the thing", answer, expected, hint="think")
        out = capsys.readouterr().out
        return out.partition("the thing")[0], "think" in out

    right, wrong, untried = (said(answer, 1.5) for answer in (1.5, 1.6, None))
    assert len({right, wrong, untried}) == 3
    assert (right[1], wrong[1], untried[1]) == (False, True, False), "a hint for wrong answers"
    rows = [(1.4999, np.float64(1.5), right), ([1, 2.0], np.array([1.0, 2.0]), right),
            ([1], [1, 2], wrong), (True, True, right), (1, True, wrong), (False, True, wrong),
            (" Yes", "yes", right), ("1.5", 1.5, right), ({}, 1.5, wrong),
            (-0.0375, -0.0375, right)]
    assert not [row for row in rows if said(*row[:2]) != row[2]]


def test_execute_runs_in_place_or_not_at_all(tmp_path, monkeypatch, capsys):
    """A notebook is replaced by a whole run only, without timings, widgets, and parameters."""
    (tmp_path / "hybridrl_lib").mkdir()
    (tmp_path / "pyproject.toml").touch()
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.environ", dict(os.environ))  # what it sets for kernels is undone
    for name, last in (("01_good", "print(preset)"), ("02_bad", "1 / 0")):
        cells = [nbformat.v4.new_code_cell('preset = "auto"', metadata={"tags": ["parameters"]}),
                 nbformat.v4.new_code_cell(last)]
        nbformat.write(nbformat.v4.new_notebook(
            cells=cells, metadata={"language_info": {"name": "python"}}), folder / f"{name}.ipynb")
    before = (folder / "02_bad.ipynb").read_text()
    assert execute.main(["03_absent"]) == 2
    assert execute.main(["01_good", "--preset", "tiny"]) == 0
    good = nbformat.read(folder / "01_good.ipynb", as_version=4)
    assert [cell.source for cell in good.cells] == ['preset = "auto"', "print(preset)"]
    assert good.cells[1].outputs[0].text == "tiny\n"
    with pytest.raises(Exception, match="ZeroDivisionError"):
        execute.main(["02_bad"])
    assert (folder / "02_bad.ipynb").read_text() == before
    new = nbformat.v4
    stream = {"output_type": "stream", "name": "stdout"}
    cells = [
        new.new_code_cell("x = 1", metadata={"tags": ["parameters"], "papermill": {"duration": 1}},
                          execution_count=1),
        new.new_code_cell("x = 2", metadata={"tags": ["injected-parameters"]}, execution_count=2),
        new.new_code_cell("x", metadata={"execution": {"iopub": "now"}}, execution_count=3,
                          outputs=[nbformat.from_dict({**stream, "text": "a\n"}),
                                   nbformat.from_dict({**stream, "text": "b\n"}),
                                   new.new_output("execute_result", data={"text/plain": "1"},
                                                  metadata={"z": 1}, execution_count=3)])]
    notebook = new.new_notebook(cells=cells, metadata={
        "papermill": {}, "widgets": {"state": {}},
        "language_info": {"name": "python", "version": "3.11.7"}})
    done = execute.clean(notebook)
    assert [cell.source for cell in done.cells] == ["x = 1", "x"]
    assert [cell.metadata for cell in done.cells] == [{"tags": ["parameters"]}, {}]
    assert [cell.execution_count for cell in done.cells] == [1, 2]
    text, result = done.cells[1].outputs
    assert text.text == "a\nb\n" and result.execution_count == 2 and result.metadata == {}
    assert set(done.metadata) == {"kernelspec", "language_info"}
    before = nbformat.writes(done)
    assert nbformat.writes(execute.clean(done)) == before, "cleaning twice changes nothing more"


def test_published_files_are_shown_or_named(tmp_path, monkeypatch, capsys):
    """Tables and pictures of the repository; wide ones get smaller and keep their colors."""
    shown = []
    monkeypatch.setattr(tables, "display", shown.append)
    monkeypatch.setattr(tables, "published_folder", lambda: tmp_path)
    tables.show_published("one", "table.md", "figures/picture.png")
    assert not shown and "results/published/one" in capsys.readouterr().out
    (tmp_path / "one" / "figures").mkdir(parents=True)
    (tmp_path / "one" / "table.md").write_text("# Table <b>\n")
    picture = tmp_path / "one" / "figures" / "picture.png"
    Image.new("RGB", (2, 2)).save(picture)
    tables.show_published("one", "table.md", "figures/picture.png")
    assert shown[0].data.startswith("### Table <\u200bb>") and shown[1].data == picture.read_bytes()
    with pytest.raises(UserError, match="other.png"):
        tables.show_published("one", "figures/other.png")
    shown = []
    monkeypatch.setattr(tables, "display", shown.append)
    noise = Image.effect_noise((3000, 600), 80).convert("RGB")
    noise.save(tmp_path / "wide.png")
    tables.show_file(tmp_path / "wide.png")
    assert Image.open(io.BytesIO(shown[0].data)).size == (1000, 200)
    assert len(shown[0].data) < (tmp_path / "wide.png").stat().st_size / 5
    published = Path(__file__).parents[2] / "results" / "published"
    whole = (published / "tiny-compare" / "figures" / "pass_at_k.png").read_bytes()
    small = tables.smaller(whole)
    assert len(small) < len(whole) / 2
    with Image.open(io.BytesIO(small)) as picture:
        found = np.array(picture.convert("RGB")).reshape(-1, 3).astype(int)
    for setup in ("sft", "rl", "sft_then_rl"):
        wanted = np.array([int(line_style(setup)["color"][i:i + 2], 16) for i in (1, 3, 5)])
        near = (np.abs(found - wanted).max(axis=1) < 25).sum()
        assert near > 200, f"{setup}: its color is gone"

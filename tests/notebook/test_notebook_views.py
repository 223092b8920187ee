"""What notebooks show: model output stays data, the live view stays small, numbers stay true."""

import csv
import io
import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
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
from hybridrl_lib.notebook.tables import (
    say,
    show_picture,
    show_published,
    show_rows,
    show_table,
    write_report,
)
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.report.style import line_style
from hybridrl_lib.system.errors import UsageError, UserError
from hybridrl_lib.training.observer import Lines

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


# Model output is data ---------------------------------------------------------------------------


def test_model_output_is_escaped_everywhere(shown, tmp_path):
    """Protects a reader's browser from what a model wrote."""
    record = RunFolder(tmp_path / "rl" / "seed-0")
    record.write_lines("samples.jsonl", [sample_row(ATTACK)])
    record.write_lines("eval.jsonl", [{
        "checkpoint": "last", "part": "test", "benchmark": ATTACK, "id": ATTACK, "gold": ATTACK,
        "greedy": {"text": ATTACK, "strict": False, "reason": ATTACK, "finished": True}}])
    record.write("config.json", {"settings": {}})
    show_completions(record)
    show_answers(record)
    show_tokens([[ATTACK]], [[0.5]], [ATTACK])
    show_rows([ATTACK], [[ATTACK]])
    view = LiveRun("rl", show=None)
    view.on_sample(sample_row(ATTACK))
    for html in (*shown, view.html()):
        assert_harmless(html)
    assert len(shown) == 4 and "[cut off]" in shown[0]


def test_dollar_signs_are_not_typeset(shown):
    """Protects answers about money: MathJax leaves code and marked tables alone."""
    show_rows(["price"], [["from $3 to $5"]])
    assert "from $3 to $5" in shown[0] and "mathjax_ignore" in shown[0]


def test_long_text_is_cut_in_the_page_alone():
    """Protects the notebook's size from a completion that never ends."""
    assert len(tables.escaped("x" * 100_000)) < 1_000


# The live view ----------------------------------------------------------------------------------


class Page:
    """In place of IPython's display: keeps what is shown, by handle."""

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


def test_live_view_draws_in_place_and_ends_with_the_last_step(capsys):
    """Protects notebooks from growing while they run: two displays, the last step always drawn."""
    page = Page()
    view = LiveRun("rl", seconds=1e9, show=page)
    for step in range(1, 21):
        view.on_probe({"step": step, "epoch": step / 10, "reward": 0.2, "kl/base": 0.01,
                       "entropy": 0.3, "completions/mean_length": 20.0})
        view.on_sample(sample_row(f"answer {step}"))
        view.on_step(step_row(step), total=20)
    assert len(page.bundles) == 2, "a picture and a table, each in its place"
    assert page.updates == 2, "drawn at the first step and at the last, and not between"
    picture, table = page.bundles
    assert Image.open(io.BytesIO(picture["image/png"])).format == "PNG"
    assert len(picture["image/png"]) < LARGEST_PICTURE
    assert "answer 20" in table["text/html"] and "answer 16" not in table["text/html"]
    assert "over after 20 steps" in picture["text/plain"]
    assert capsys.readouterr().out == ""


def test_a_picture_that_fails_does_not_end_the_run(monkeypatch, capsys):
    """Protects hours of training from a fault in drawing."""
    view = LiveRun("rl", show=Page())
    monkeypatch.setattr("hybridrl_lib.notebook.live_view.draw_live", lambda *rows: 1 / 0)
    for step in (1, 2):
        view.on_step(step_row(step), total=3)
    assert capsys.readouterr().out.count("training goes on") == 1


def test_sft_rows_are_drawn_too():
    """Protects setups without rollouts: a panel shows the loss, others say what is missing."""
    rows = [{"step": 1, "stage": "sft", "epoch": 0.5, "loss/sft": 1.0, "entropy": 0.2}]
    assert len(curves.png(curves.draw_live(rows, []))) < LARGEST_PICTURE
    assert len(curves.png(curves.draw_run(rows, [], []))) < LARGEST_PICTURE


@pytest.mark.parametrize(("variables", "headless"), [
    ({"HYBRIDRL_HEADLESS": "1"}, True), ({"HYBRIDRL_HEADLESS": "0"}, False),
    ({"HYBRIDRL_HEADLESS": "0", "CI": "true"}, False), ({"CI": "true"}, True), ({}, True)])
def test_headless(variables, headless, monkeypatch):
    """Protects logs from pictures that nobody sees, and viewers from plain lines."""
    for name in ("HYBRIDRL_HEADLESS", "CI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_headless() is headless
    assert isinstance(live("rl"), Lines if headless else LiveRun)


# From records -----------------------------------------------------------------------------------


def test_views_of_a_finished_run(experiment, shown, capsys):
    """Protects the notebooks of the setups: every view works from the record alone."""
    record = RunFolder(experiment / "sft_then_rl" / "seed-1")
    plot_run(record)
    plot_against(record, "rl")
    show_scores(record)
    show_reasons(record)
    show_signal(record)
    pictures = [piece for piece in shown if isinstance(piece, bytes)]
    assert len(pictures) == 3 and max(map(len, pictures)) < LARGEST_PICTURE
    table = shown[2]
    assert table.count("base model |") == 2 and "SFT + RL − base model" in table
    differences = [line for line in table.splitlines() if line.startswith("- ")]
    assert [line.count("greedy, strict") for line in differences] == [1, 1, 0, 0]
    assert [line.count("greedy, lenient") for line in differences] == [0, 0, 1, 1]
    assert "won by the strict rule alone" in table, "or the base model's lost boxes are a gain"
    assert "groups of 8 with signal" in capsys.readouterr().out


def test_a_picture_made_smaller_keeps_its_colors():
    """Setups are told apart by them; thin lines are a small part of a picture that is mostly white.
    The published Pass@k picture had SFT's blue and SFT + RL's green as one teal."""
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


def test_tables_that_a_command_prints_are_left_to_the_page(capsys):
    """Wider than a page they would break in the middle of numbers."""
    for text in ("2 runs of 1 arm", "\narm  score\nRL   81.0\n", "\n9 files in results"):
        say(text)
    assert capsys.readouterr().out == "2 runs of 1 arm\n9 files in results\n"


def test_views_say_what_is_missing(experiment, shown, capsys):
    """Protects a reader who opens things in another order from a traceback."""
    plot_run(RunFolder(experiment / "base" / "seed-0"))
    plot_against(RunFolder(experiment / "rl" / "seed-0"), "rl_entropy")
    show_completions(RunFolder(experiment / "sft" / "seed-0"))
    said = capsys.readouterr().out
    for part in ("no curves", "rl_entropy has not run", "learns from reference solutions"):
        assert part in said
    assert not shown


def test_signal_is_the_chance_of_a_mixed_group(shown, tmp_path, capsys):
    """Protects the advice on whether RL can learn: checked by hand for 1 right out of 2 samples."""
    record = RunFolder(tmp_path / "base" / "seed-0")
    record.write_lines("eval.jsonl", [
        {"checkpoint": "last", "part": "test", "benchmark": "gsm8k", "id": str(i),
         "samples": {"strict": verdicts}} for i, verdicts in enumerate(([0, 0], [1, 0], [1, 1]))])
    show_signal(record, group_size=2)
    assert "groups of 2 with signal 33%" in capsys.readouterr().out


def test_report_views(experiment, shown, capsys):
    """Protects the notebooks of the report, and their output from a folder of this machine."""
    files = write_report(experiment, "tiny")
    assert str(experiment) not in capsys.readouterr().out and len(files) > 10
    show_table(experiment / "table2.md")
    show_claims(experiment)
    show_picture(experiment, "kl")
    assert "#### Table 2" not in shown[0] and "### Table 2" in shown[0]
    assert "RL alone is worse than SFT" in shown[1]
    assert isinstance(shown[2], bytes) and len(shown[2]) < LARGEST_PICTURE
    with pytest.raises(UserError, match="make the report first"):
        show_table(experiment / "nothing.md")


def test_findings_quote_the_published_table(experiment, shown, monkeypatch):
    """Protects 'what was found' from numbers that nobody measured."""
    write_report(experiment, "tiny")
    monkeypatch.setattr(findings, "published_folder", lambda: experiment.parent)
    show_findings("rl")
    with (experiment / "table2.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream)
                if row["setup"] == "rl" and row["metric"] == "exact_match"]
    for row in rows:
        assert f"{row['mean']} % [{row['ci_low']}, {row['ci_high']}]" in shown[0]
    assert "than base model" in shown[0] or "told apart from base model" in shown[0]
    show_findings("rl", "absent")
    assert "no published records" in shown[1]


@pytest.mark.parametrize(("difference", "p_value", "verdict"), [
    ("-5.00", "0.01", "holds"), ("5.00", "0.01", "the opposite holds"),
    ("-5.00", "0.20", "cannot be told")])
def test_claims_are_judged_by_sign_and_p_value(difference, p_value, verdict, tmp_path):
    """Protects the paper, and us, from a verdict on noise. The claim here: RL is worse than SFT."""
    (tmp_path / "differences.csv").write_text(
        "benchmark,metric,first,second,difference,ci_low,ci_high,p_value,p_holm,paper\n"
        f"gsm8k,exact_match,rl,sft,{difference},-1.00,1.00,0.5,{p_value},-12.3\n")
    text = findings.claims(tmp_path)
    assert f"| -12.3 | {verdict} |" in text and findings._plus(difference) in text


# Parameters, files, errors ----------------------------------------------------------------------


def test_begin_echoes_what_will_run(capsys, monkeypatch, results):
    """Protects against a run at other settings than its reader thinks."""
    monkeypatch.delenv("HYBRIDRL_SMOKE", raising=False)
    assert begin("tiny", 3, "", "rl.beta=0.5") == "tiny"
    said = capsys.readouterr().out
    assert "preset tiny, seed 3" in said and "rl.beta: 0.02 -> 0.5" in said
    assert "$HYBRIDRL_RESULTS_DIR/tiny" in said and str(results) not in said
    with pytest.raises(UsageError, match="rl.beta"):
        begin("tiny", 0, "", "rl.betta=0.5")


def test_paths_are_shown_without_the_machines_folders(monkeypatch, tmp_path, capsys):
    """Protects a notebook's author: outputs do not tell where the project lies."""
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
    """Protects the sentence that says what to do from drowning in a traceback."""
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    begin("tiny", 0, "", "")
    capsys.readouterr()
    shell.run_cell("from hybridrl_lib import UserError\nraise UserError('Do this.')")
    assert capsys.readouterr().out.strip() == "UserError: Do this."


@pytest.mark.parametrize("headless", ["0", "1"])
def test_bars_of_downloads_are_for_people(monkeypatch, headless):
    """Who watches sees how far a gigabyte is; a log gets plain lines, and loading has no bar."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils.logging import is_progress_bar_enabled

    monkeypatch.setenv("HYBRIDRL_HEADLESS", headless)
    begin("tiny", 0, "", "")
    assert are_progress_bars_disabled() == (headless == "1") and not is_progress_bar_enabled()


# Questions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "expected", "said"), [
    (None, 1.5, "your turn"), (1.5, 1.5, "right"), (1.4999, np.float64(1.5), "right"),
    (1.6, 1.5, "not yet"), ([1, 2.0], np.array([1.0, 2.0]), "right"), ([1], [1, 2], "not yet"),
    (True, True, "right"), (1, True, "not yet"), (False, True, "not yet"), (" Yes", "yes", "right"),
    ("1.5", 1.5, "right"), ({}, 1.5, "not yet"), (-0.0375, -0.0375, "right")])
def test_check(answer, expected, said, capsys):
    """Protects the reader: right is right, wrong is wrong, and nothing they type stops the page."""
    check("the thing", answer, expected, hint="think")
    out = capsys.readouterr().out
    assert out.startswith(said)
    assert ("Hint: think" in out) == (said == "not yet")


# Executing the committed notebooks --------------------------------------------------------------


def test_clean_leaves_what_belongs_to_the_notebook():
    """Protects the diff of every commit from timings, widgets and injected parameters."""
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


def test_execute_runs_in_place_or_not_at_all(tmp_path, monkeypatch, capsys):
    """Protects a committed notebook from being replaced by half of a failed run."""
    (tmp_path / "hybridrl_lib").mkdir()
    (tmp_path / "pyproject.toml").touch()
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.environ", dict(os.environ))  # what it sets for kernels stays here
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


def test_published_files_are_shown_or_said_to_be_elsewhere(tmp_path, monkeypatch, capsys):
    """Tables and pictures as they are; without the repository's results one sentence, no error."""
    shown = []
    monkeypatch.setattr(tables, "display", shown.append)
    monkeypatch.setattr(tables, "published_folder", lambda: tmp_path)
    show_published("one", "table.md", "figures/picture.png")
    assert not shown and "results/published/one" in capsys.readouterr().out
    (tmp_path / "one" / "figures").mkdir(parents=True)
    (tmp_path / "one" / "table.md").write_text("# Table <b>\n")
    picture = tmp_path / "one" / "figures" / "picture.png"
    Image.new("RGB", (2, 2)).save(picture)
    show_published("one", "table.md", "figures/picture.png")
    assert shown[0].data.startswith("### Table <\u200bb>") and shown[1].data == picture.read_bytes()
    with pytest.raises(UserError, match="no picture other.png in one"):
        show_published("one", "figures/other.png")


def test_a_wide_picture_of_a_command_is_shown_as_wide_as_a_page(tmp_path, monkeypatch):
    """A comparison's figures as they are would take a notebook over its size."""
    shown = []
    monkeypatch.setattr(tables, "display", shown.append)
    noise = Image.effect_noise((3000, 600), 80).convert("RGB")
    noise.save(tmp_path / "wide.png")
    tables.show_file(tmp_path / "wide.png")
    assert Image.open(io.BytesIO(shown[0].data)).size == (1000, 200)
    assert len(shown[0].data) < (tmp_path / "wide.png").stat().st_size / 5

"""What a model, a data set, or a record says is shown on a page and never becomes part of it."""

import base64
import html
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from hostile import OPEN_LINK, TEXT
from IPython.core.formatters import DisplayFormatter
from IPython.display import Image
from synthetic_records import build_experiment

from hybridrl_lib.cli import main
from hybridrl_lib.notebook import (
    answers,
    curves,
    findings,
    live_view,
    place,
    questions,
    scores,
    tables,
    wellness,
)
from hybridrl_lib.notebook.live_view import LiveRun
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.report.loading import load_experiment
from hybridrl_lib.report.report import make_report
from hybridrl_lib.report.table2 import make_table2, table2_csv
from hybridrl_lib.report.text import code_span, literal
from hybridrl_lib.setups import SETUPS
from hybridrl_lib.system.errors import UserError, printable

pytestmark = pytest.mark.xdist_group("pages")  # one process makes the pages
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
# A folder's name: no slash, and no byte that a file system refuses.
NAME = TEXT.replace("/", "").replace("\ud800", "")[:120]
HOSTILE_TAGS = {"script", "img", "a", "iframe", "svg", "h1", "strong"}


class Tags(HTMLParser):
    """The elements of a piece of HTML and their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def change_lines(path: Path, change) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_hostile(folder: Path) -> Path:
    """An experiment whose every text, and whose own name, attacks the page it is shown on."""
    build_experiment(folder, setups=("base", "sft", "rl"), seeds=range(2),
                     test={"tiny_word": 12}, train={"tiny_word": 6}, epochs=2)
    for path in folder.glob("*/seed-*"):
        change_lines(path / "eval.jsonl", lambda row: (
            row.update(id=row["id"] + TEXT, gold=TEXT, level=TEXT, subject=TEXT),
            row["greedy"].update(text=TEXT, reason=TEXT)))
        if (path / "metrics.jsonl").exists():  # every answer earned nothing, for a reason of TEXT
            change_lines(path / "metrics.jsonl", lambda row: row.update(
                reward=0.0, frac_reward_zero_std=1.0, verdicts={TEXT: 5}))
        (path / "samples.jsonl").write_text(json.dumps(
            {"step": TEXT, "id": TEXT, "prompt": TEXT, "completion": TEXT, "gold": TEXT,
             "reward": 0.0, "finished": False}) + "\n")
        manifest = json.loads((path / "manifest.json").read_text())
        manifest |= {
            "git_commit": TEXT, "device": TEXT, "precision": TEXT, "numerics_version": TEXT,
            "versions": {TEXT: TEXT}, "model": {"name": TEXT, "parameters": TEXT, "sha256": TEXT},
            "data": {TEXT: {"revision": TEXT, "problems": {TEXT: TEXT}}}, "tokens": {TEXT: 3}}
        (path / "manifest.json").write_text(json.dumps(manifest))
        config = json.loads((path / "config.json").read_text())
        config["preset"] = config["experiment"] = TEXT
        config["settings"]["model"] |= {"path": TEXT, TEXT: TEXT}
        config["settings"][TEXT] = {TEXT: [TEXT]}
        (path / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "sft", folder / NAME)  # a setup that calls itself an attack
    shutil.copytree(folder / "rl" / "seed-0", folder / "rl" / f"seed-{NAME}")
    for name, log, key in (("7", "eval", "benchmark"), ("8", "metrics", "stage"),
                           ("9", "eval", "part")):
        broken = folder / "rl" / f"seed-{name}"
        shutil.copytree(folder / "rl" / "seed-0", broken)
        change_lines(broken / f"{log}.jsonl", lambda row, key=key: row.update({key: TEXT}))
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return make_hostile(tmp_path_factory.mktemp("records") / NAME)


@pytest.fixture(scope="module")
def report(hostile, tmp_path_factory):
    """The report of the hostile experiment, with itself as the published one."""
    out = tmp_path_factory.mktemp("report")
    experiment = load_experiment(hostile)
    (out / "table2.csv").write_text(table2_csv(make_table2(experiment)))
    make_report(hostile, out, published=out)
    return out


@pytest.fixture(scope="module")
def page(hostile, report, tmp_path_factory):
    """An executed notebook of every view over the hostile record, as nbconvert's HTML."""
    nbconvert = pytest.importorskip("nbconvert")
    outputs = collect_outputs(hostile, report)
    cell = nbformat.v4.new_code_cell("notebook.show_everything()", outputs=outputs)
    book = nbformat.v4.new_notebook(cells=[cell])
    text, _ = nbconvert.HTMLExporter().from_notebook_node(book)
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(text, encoding="utf-8")
    (path.parent / "page.ipynb").write_text(nbformat.writes(book), encoding="utf-8")
    return path


def collect_outputs(hostile: Path, report: Path) -> list:
    """What the notebook's functions put on the page, as a kernel would send it."""
    outputs = []
    formatter = DisplayFormatter()

    def collect(*pieces, raw=False, display_id=None, **_):
        for piece in pieces:
            data, metadata = (piece, {}) if raw else formatter.format(
                piece, include={"text/html", "text/markdown", "image/png"})
            if isinstance(piece, Image):
                data, metadata = piece._repr_mimebundle_()
            assert data
            data = {kind: base64.b64encode(value).decode() if isinstance(value, bytes) else value
                    for kind, value in data.items()}
            outputs.append(nbformat.v4.new_output("display_data", data, metadata=metadata))

    record = RunFolder(hostile / "rl" / "seed-0")
    evil = RunFolder(hostile / NAME / "seed-0")
    broken = RunFolder(hostile / "rl" / "seed-7")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (answers, tables, curves, scores, findings, wellness):
            patch.setattr(module, "display", collect)
        for module in (answers, tables, curves, scores, live_view, place, questions):
            patch.setattr(module, "print", lambda *words, **_: printed.append(
                " ".join(map(str, words)) + "\n"), raising=False)
        answers.show_completions(record)
        answers.show_answers(record)
        answers.show_tokens([[TEXT]], [[0.5]], [TEXT])
        tables.show_rows([TEXT], [[TEXT]])
        scores.show_scores(record)
        scores.show_reasons(record)
        scores.show_reasons(broken)
        scores.show_signal(broken)
        wellness.show_health(record)
        wellness.show_health(RunFolder(hostile / "rl" / "seed-8"))
        curves.plot_run(record)
        curves.plot_against(evil, "rl")
        curves.plot_against(record, NAME)
        curves.plot_against(record, "absent" + NAME)
        findings.show_claims(report)
        for path in sorted(report.glob("*.md")):
            tables.show_table(path)
        for kind in sorted(("reward", "kl", "table2")):
            tables.show_picture(hostile, kind)
        patch.setattr(findings, "published_folder", lambda: report.parent)
        findings.show_findings("rl", report.name)
        findings.show_findings("rl", NAME)
        (report.parent / NAME).mkdir(exist_ok=True)
        for name in ("table2.csv", "differences.csv"):
            lines = (report / name).read_text().splitlines()
            text = html.unescape(TEXT).replace('"', "'").replace("\ud800", "")
            (report.parent / NAME / name).write_text("\n".join(
                [lines[0], *(f'{line},"{text}"'.replace("tiny_word", f'"tiny{text}"')
                             for line in lines[1:])]))
        findings.show_findings("rl", NAME)
        findings.show_claims(report.parent / NAME)
        (report / f"{NAME}.txt").write_text("")
        place.list_files(report)
        questions.check(TEXT, TEXT, "no", hint=TEXT)
        view = LiveRun(TEXT, show=collect)
        view.on_sample({"step": TEXT, "prompt": TEXT, "completion": TEXT, "gold": TEXT,
                        "reward": 0.5})
        view.on_warning(TEXT, TEXT)
        view.on_step({"step": 1, "stage": TEXT, "warnings": [TEXT], "epoch": 0.5, "reward": 0.2,
                      "entropy": 0.1, "frac_reward_zero_std": 0.5, "grad_norm": 1.0}, total=1)
    # Plain text is the page's to escape; a lone surrogate would not reach it as a message.
    text = "".join(printed).replace("\ud800", "")
    outputs.append(nbformat.v4.new_output("stream", name="stdout", text=text))
    outputs.append(nbformat.v4.new_output("error", ename="UserError", evalue="x", traceback=[
        "UserError: " + TEXT.replace("\ud800", "")]))
    return outputs


def test_no_view_makes_an_element_of_it(page):
    """Whatever a model or a record's author wrote, the page only has the project's elements."""
    book = nbformat.read(page.with_suffix(".ipynb"), as_version=4)
    kinds = set()
    for output in book.cells[0].outputs:
        for kind, text in output.get("data", {}).items():
            kinds.add(kind)
            if kind == "text/html":
                assert not {tag for tag, _ in Tags(text).found} & HOSTILE_TAGS, text[:3000]
                assert not [attributes for _, attributes in Tags(text).found
                            for name in attributes if name.startswith("on")]
                assert "mathjax_ignore" in text or "$" not in text
            if kind in ("text/html", "text/markdown"):
                assert "\x1b" not in text and "\u202e" not in text
    assert kinds >= {"text/html", "text/markdown", "image/png"}


def test_files_of_the_report_hold_text_only(report, tmp_path):
    """No tag, link, formula, or script gets into Markdown or SVG, and tables keep their columns."""
    for path in report.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        outside = "".join(text.split("`")[::2])
        assert not Tags(outside).found, path.name
        assert "](javascript" not in outside and "$$" not in outside and "\x1b" not in text
        assert "# heading" not in text.split("\n")
    for path in report.glob("*.md"):
        rows = 0
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.startswith("| "):
                cells = line.replace("\\|", "").count("|")
                rows = rows or cells
                assert cells == rows, (path.name, line[:200])
            else:
                rows = 0
    for path in (report / "figures").glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert "<script" not in text and "onerror" not in text and "javascript" not in text


def test_runs_with_hostile_names_are_left_out_and_named(hostile, tmp_path, capsys):
    """One bad folder hides no other run and is named; a terminal gets no control characters."""
    experiment = load_experiment(hostile)
    assert experiment.setups == ("base", "sft", "rl")
    assert {(run.setup, run.seed) for run in experiment.runs if run.setup == "rl"} == {
        ("rl", 0), ("rl", 1)}
    assert len(experiment.notes) >= 6, "one for each folder that was left out"
    assert not Tags("".join(experiment.notes) + experiment.name).found
    with pytest.raises(UserError):
        tables.show_table(tmp_path / f"{NAME}.md")
    assert main(["report", str(hostile), "--out", str(tmp_path)]) == 0
    assert main(["report", str(hostile / "absent\x1b]0;title\x07")]) == 1
    assert main(["run", "sft", "--experiment", "a\x1b[2Jb"]) == 1
    assert main(["run", "rl\x9b2J"]) == 2
    out, errors = capsys.readouterr()
    assert not {c for c in out + errors if not c.isprintable()} - {"\n", "\u200b"}
    assert errors.count("\n") == 3


def test_titles_of_setups_are_plain():
    """Titles of setups and what runs record of themselves are shown unchanged."""
    wrong = [setup.name for setup in SETUPS.values() if literal(setup.title) != setup.title
             or code_span(setup.name) != f"`{setup.name}`"]
    assert not wrong
    for text in ("Qwen/Qwen2.5-0.5B, 494,032,768 parameters, sha256 0123", "(10, 20)", "+6.7 − 1",
                 "q_proj, k_proj", "CPU: AMD EPYC 7B13, 2 cores", "hub openai/gsm8k@e53f048", "λ"):
        assert literal(text) == text == printable(text)


SPY = """<script>
window.addEventListener('load', () => setTimeout(() => {
  for (const link of document.querySelectorAll('a[href^="javascript" i]')) link.click();
  setTimeout(() => { document.title = 'pwned=' + (window.pwned || 'no'); }, 50);
}, 50));
</script>"""


def opened(path: Path, folder: Path) -> str:
    """The page after Chromium ran its scripts."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    spied = folder / "spied.html"
    spied.write_text(SPY + path.read_text(encoding="utf-8"), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
         "--virtual-time-budget=10000", "--dump-dom", spied.as_uri()],
        capture_output=True, text=True, check=False, timeout=300)
    assert "<title>pwned=" in done.stdout, done.stderr[-2000:]
    return done.stdout


def verdict(dom: str) -> str:
    return dom.split("<title>pwned=")[1].split("<")[0]


def test_pages_in_a_browser(tmp_path, page, report):
    """Nothing runs in nbconvert's HTML or in the report's Markdown, though the spy sees attacks."""
    for number, attack in enumerate((TEXT.replace("\ud800", ""), OPEN_LINK)):
        (tmp_path / "bad.html").write_text(f"<title>page</title><body>{attack}</body>")
        folder = tmp_path / str(number)
        folder.mkdir()
        assert verdict(opened(tmp_path / "bad.html", folder)) != "no"
    dom = opened(page, tmp_path)
    assert verdict(dom) == "no"
    assert "window.pwned = 'script'" in html.unescape(dom), "and the text itself is shown"
    mistune = pytest.importorskip("mistune")
    read = mistune.create_markdown(escape=False, plugins=["table"])
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(report.glob("*.md")))
    (tmp_path / "report.html").write_text(f"<title>x</title>{read(text)}", encoding="utf-8")
    assert verdict(opened(tmp_path / "report.html", tmp_path)) == "no"

"""The committed notebooks, read but not run: form, size, and the library's names they rely on."""

import ast
import importlib
import inspect
import re
import tomllib

import nbformat
import pytest
from notebook_files import NOTEBOOKS, ROOT, SOLUTION, code_cells, read, setup_cell

from hybridrl_lib.config.methods import METHODS
from hybridrl_lib.config.presets import SECTIONS, known_key
from hybridrl_lib.experiments.execute import KERNELSPEC, LARGEST, clean
from hybridrl_lib.notebook.methods import source_of
from hybridrl_lib.setups import SETUPS

NAMES = ("00_start_here", "01_problems_and_rewards", "02_grpo_step_by_step", "10_sft", "11_rl",
         "12_sft_then_rl", "13_sft_entropy", "14_rl_entropy", "15_sft_then_rl_entropy", "20_table2",
         "21_training_dynamics", "30_combined_loss", "31_switching", "32_deepseekmath", "33_relift",
         "34_superrl", "35_sasr", "36_bridge", "37_pear", "38_prl", "39_other_mixers",
         "40_comparison", "41_sensitivity")
PARAMETERS = 'preset = "auto"\nseed = 0\nexperiment = ""\nsettings = ""'
BADGE = ("[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
         "(https://colab.research.google.com/github/hybridrl/hybridrl_lib/blob/main/notebooks/")
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/$-])/(?:home|root|work|tmp|Users|content|usr|opt|mnt|var)/")
MOST_LINES, MOST_COLUMNS = 25, 88

every_notebook = pytest.mark.parametrize("name", sorted(NOTEBOOKS))


def test_all_notebooks_are_there():
    """Protects the list that README and `hybridrl reproduce` name."""
    assert tuple(NOTEBOOKS) == NAMES
    assert {setup.notebook for setup in SETUPS.values()} - {""} <= set(NAMES)


@every_notebook
def test_code_cells_parse_and_fit_on_a_screen(name):
    """Protects against a cell that no one can run, or that nobody reads to its end."""
    for cell in code_cells(name):
        ast.parse(cell.source)
        lines = cell.source.split("\n")
        assert len(lines) <= MOST_LINES, cell.source
        assert max(map(len, lines)) <= MOST_COLUMNS, max(lines, key=len)


@every_notebook
def test_title_cost_and_badge_come_first(name):
    """Protects what a visitor sees: what it teaches, what it costs, and a link that opens it."""
    title = read(name).cells[0]
    assert title.cell_type == "markdown" and title.source.startswith(f"# {name[:2]} · ")
    assert f"{BADGE}{name}.ipynb)" in title.source
    assert "You will learn" in title.source and "| | CPU | T4 | A100 |" in title.source


def test_setup_cell_is_the_same_everywhere():
    """Protects against notebooks that drift apart: one is mended, the others stay broken."""
    assert len({setup_cell(name) for name in NOTEBOOKS}) == 1
    assert all(read(name).cells[1].source == setup_cell(name) for name in NOTEBOOKS)


def test_setup_cell_installs_what_the_project_says():
    """Protects against two places that name two sources."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert f'"HYBRIDRL_SOURCE", "{tool["hybridrl"]["source"]}")' in setup_cell(NAMES[0])


@every_notebook
def test_parameters_cell(name):
    """Protects papermill: one tagged cell, right after the setup cell, with literals only."""
    tagged = [index for index, cell in enumerate(read(name).cells)
              if "parameters" in cell.metadata.get("tags", ())]
    assert tagged == [2]
    assert read(name).cells[2].source == PARAMETERS


@every_notebook
def test_committed_as_make_notebooks_leaves_it(name):
    """Protects the diff: no timings, widget state, papermill metadata or injected parameters."""
    text = NOTEBOOKS[name].read_text(encoding="utf-8")
    assert nbformat.writes(clean(read(name))) + "\n" == text
    assert "application/vnd.jupyter.widget" not in text
    assert read(name).metadata.kernelspec == KERNELSPEC
    assert len(text.encode()) < LARGEST


@every_notebook
def test_committed_executed(name):
    """Protects readers on the web, who see outputs and do not run anything."""
    for cell in code_cells(name):
        assert cell.execution_count is not None, f"run 'make notebooks': {cell.source}"
        assert not [output for output in cell.outputs if output.output_type == "error"]
        assert not [output for output in cell.outputs if output.get("name") == "stderr"]


@every_notebook
def test_no_path_of_a_machine(name):
    """Protects against a notebook that works in one person's folder, and tells its name."""
    for cell in read(name).cells:
        texts = [cell.source]
        for output in cell.get("outputs", ()):
            texts += [output.get("text", "")]
            texts += [text for kind, text in output.get("data", {}).items()
                      if not kind.startswith("image/")]
        for text in texts:
            assert not ABSOLUTE_PATH.search(text), text


@every_notebook
def test_says_which_files_it_wrote(name):
    """Protects the reader who wants to know what to look at or to delete."""
    last = read(name).cells[-1]
    assert "list_files" in last.source or "This notebook wrote no files." in last.source


@every_notebook
def test_library_names_and_arguments_exist(name):
    """Protects against the library moving on while a notebook still calls what is gone."""
    known = {}
    for cell in code_cells(name)[1:]:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("hybridrl_lib"):
                for alias in node.names:
                    known[alias.name] = _imported(node.module, alias.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and \
                    node.value.id == "notebook":
                assert node.attr in known["notebook"].__all__, node.attr
    calls = 0
    for cell in code_cells(name)[1:]:
        for node in ast.walk(ast.parse(cell.source)):
            function = _called(node, known)
            if function is not None:
                calls += 1
                inspect.signature(function).bind(
                    *node.args, **{keyword.arg: keyword.value for keyword in node.keywords})
    assert calls


@every_notebook
def test_code_that_is_shown_is_todays(name):
    """Protects the reader from code in a committed page that the library no longer has."""
    known = {}
    for cell in code_cells(name):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("hybridrl_lib"):
                exec(compile(ast.Module([node], []), name, "exec"), known)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "notebook.show_source":
                things = [eval(ast.unparse(argument), known) for argument in node.args]
                shown = [output.data["text/markdown"] for output in cell.outputs
                         if "text/markdown" in output.get("data", {})]
                assert shown == [source_of(thing) for thing in things], cell.source
                known["shows"] = True
    assert known.get("shows") or not re.match("3[0-9]_", name), "a method's page shows its code"


def _imported(module: str, name: str):
    home = importlib.import_module(module)
    return getattr(home, name) if hasattr(home, name) else importlib.import_module(
        f"{module}.{name}")


def _called(node: ast.AST, known: dict):
    """The library's function that a call without stars calls, or None."""
    if not isinstance(node, ast.Call) or any(isinstance(a, ast.Starred) for a in node.args):
        return None
    if isinstance(node.func, ast.Name):
        function = known.get(node.func.id)
    elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and \
            node.func.value.id == "notebook":
        function = getattr(known["notebook"], node.func.attr)
    else:
        return None
    return function if callable(function) else None


@every_notebook
def test_settings_and_notebooks_in_the_text_exist(name):
    """Protects the prose: a setting or a notebook it names is one that there is."""
    setting = re.compile(rf"\b((?:{'|'.join((*SECTIONS, *METHODS))})\.[a-z_]+)(?:=|`|\b)")
    for cell in read(name).cells:
        if cell.cell_type == "markdown":
            for quoted in re.findall(r"`([^`\n]+)`", cell.source):
                for key in setting.findall(quoted):
                    if not key.endswith((".py", ".md")):
                        known_key(key)
                for other in re.findall(r"\b\d\d_[a-z]\w+", quoted):
                    assert other in NAMES, other


@every_notebook
def test_every_question_has_its_solution_below(name):
    """Protects the reader who is stuck."""
    cells = read(name).cells
    for cell, below in zip(cells, cells[1:], strict=False):
        if cell.cell_type == "code" and cell.source.startswith("answer = "):
            assert cell.source.startswith("answer = None\n") and "check(" in cell.source
            assert SOLUTION.search(below.source), cell.source

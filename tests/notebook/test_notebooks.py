"""The committed notebooks, read but not run: form, size, and the library's names they use."""

import ast
import importlib
import inspect
import re
import tomllib

import nbformat
from notebook_files import NOTEBOOKS, ROOT, SOLUTION, code_cells, read, setup_cell

from hybridrl_lib.config.methods import METHODS
from hybridrl_lib.config.presets import SECTIONS, known_key
from hybridrl_lib.experiments.execute import KERNELSPEC, LARGEST, clean
from hybridrl_lib.notebook.methods import source_of
from hybridrl_lib.setups import SETUPS
from hybridrl_lib.system.errors import UsageError

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


def test_all_notebooks_are_there():
    """Protects the list in the documentation and in `hybridrl reproduce`."""
    assert tuple(NOTEBOOKS) == NAMES
    assert {setup.notebook for setup in SETUPS.values()} - {""} <= set(NAMES)


def test_every_cell_is_in_its_place():
    """Title with cost and badge, setup, one cell of literals, files last, solutions below."""
    wrong = []
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert f'"HYBRIDRL_SOURCE", "{tool["hybridrl"]["source"]}")' in setup_cell(NAMES[0])
    for name in NOTEBOOKS:
        cells = read(name).cells
        title, last = cells[0], cells[-1]
        held = {
            "title": (title.cell_type == "markdown" and title.source.startswith(f"# {name[:2]} · ")
                      and f"{BADGE}{name}.ipynb)" in title.source
                      and "| | CPU | T4 | A100 |" in title.source),
            "setup": cells[1].source == setup_cell(name) == setup_cell(NAMES[0]),
            "parameters": cells[2].source == PARAMETERS and [2] == [
                i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", ())],
            "files": "list_files" in last.source or (
                last.cell_type == "markdown" and "files" in last.source),
            "solutions": all(
                cell.source.startswith("answer = None\n") and "check(" in cell.source
                and SOLUTION.search(below.source)
                for cell, below in zip(cells, cells[1:], strict=False)
                if cell.cell_type == "code" and cell.source.startswith("answer = "))}
        wrong += [(name, part) for part, holds in held.items() if not holds]
    assert not wrong


def test_committed_as_make_notebooks_leaves_it():
    """Executed, clean, small: no error, no timing, no path of a machine, cells fit a screen."""
    wrong = []
    for name, path in NOTEBOOKS.items():
        text = path.read_text(encoding="utf-8")
        if (nbformat.writes(clean(read(name))) + "\n" != text
                or "application/vnd.jupyter.widget" in text
                or read(name).metadata.kernelspec != KERNELSPEC or len(text.encode()) >= LARGEST):
            wrong.append((name, "not clean"))
        for cell in read(name).cells:
            outputs, texts, lines = cell.get("outputs", ()), [cell.source], cell.source.split("\n")
            for output in outputs:
                texts += [output.get("text", "")]
                texts += [text for kind, text in output.get("data", {}).items()
                          if not kind.startswith("image/")]
            kinds = {output.output_type for output in outputs} | {
                output.get("name") for output in outputs}
            if any(map(ABSOLUTE_PATH.search, texts)) or cell.cell_type == "code" and (
                    not ast.parse(cell.source) or cell.execution_count is None
                    or kinds & {"error", "stderr"} or len(lines) > MOST_LINES
                    or max(map(len, lines)) > MOST_COLUMNS):
                wrong.append((name, cell.source))
    assert not wrong


def test_library_names_and_arguments_exist():
    """Protects against a notebook that calls what the library no longer has."""
    wrong = []
    for name in NOTEBOOKS:
        trees = [ast.parse(cell.source) for cell in code_cells(name)[1:]]
        known, calls = {}, 0
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("hybridrl_lib"):
                for alias in node.names:
                    try:
                        known[alias.asname or alias.name] = _imported(node.module, alias.name)
                    except ImportError as error:
                        wrong.append((name, str(error)))
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (
                    node.value.id == "notebook") and node.attr not in known["notebook"].__all__:
                wrong.append((name, f"notebook.{node.attr}"))
                continue
            function = _called(node, known)
            if function is not None:
                calls += 1
                try:
                    inspect.signature(function).bind(
                        *node.args, **{keyword.arg: keyword.value for keyword in node.keywords})
                except TypeError as error:
                    wrong.append((name, ast.unparse(node), str(error)))
        if not calls:
            wrong.append((name, "calls nothing of the library"))
    assert not wrong


def test_code_that_is_shown_is_current():
    """Protects the reader from code in a committed page that the library no longer has."""
    wrong = []
    for name in NOTEBOOKS:
        known, shows = {}, False
        for cell in code_cells(name):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("hybridrl_lib"):
                    exec(compile(ast.Module([node], []), name, "exec"), known)
                elif isinstance(node, ast.Call) and (
                        ast.unparse(node.func) == "notebook.show_source"):
                    shows = True
                    shown = [output.data["text/markdown"] for output in cell.outputs
                             if "text/markdown" in output.get("data", {})]
                    try:
                        current = [source_of(eval(ast.unparse(argument), known))
                                   for argument in node.args]
                    except (AttributeError, TypeError) as error:  # gone, or data by now
                        current = str(error)
                    if shown != current:
                        wrong.append((name, cell.source))
        if re.match("3[0-9]_", name) and not shows:
            wrong.append((name, "the page of a method shows its code"))
    assert not wrong


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
        function = getattr(known["notebook"], node.func.attr, None)
    else:
        return None
    return function if callable(function) else None


def test_settings_and_notebooks_in_the_text_exist():
    """Protects the prose: settings and notebooks that it names exist."""
    setting = re.compile(rf"\b((?:{'|'.join((*SECTIONS, *METHODS))})\.[a-z_]+)(?:=|`|\b)")
    wrong = []
    for name in NOTEBOOKS:
        text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
        for quoted in re.findall(r"`([^`\n]+)`", text):
            for key in setting.findall(quoted):
                try:
                    if not key.endswith((".py", ".md")):
                        known_key(key)
                except UsageError as error:
                    wrong.append((name, str(error)))
            wrong += [(name, other) for other in re.findall(r"\b\d\d_[a-z]\w+", quoted)
                      if other not in NAMES]
    assert not wrong

"""The package's rooms: who imports whom, on how many layers, and how long files are."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hybridrl_lib"
MOST_ROOMS, MOST_LAYERS, MOST_LINES = 18, 8, 400
Arrows = dict[str, set[str]]


def imports_of(module: str, tree: ast.AST, is_face: bool, known: set[str]) -> set[str]:
    """The modules of the same package that a module imports, wherever in its text."""
    parents, found = module.split(".") if is_face else module.split(".")[:-1], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = parents[:len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            found |= {name if name in known else source for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found |= {argument.value for argument in node.args
                      if isinstance(argument, ast.Constant)}
    return (found & known) - {module}


def files_of(package: Path) -> Arrows:
    """{module: modules that it imports}, without the package's own face."""
    paths = {".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(
        ".__init__"): path for path in package.rglob("*.py")}
    return {module: imports_of(module, ast.parse(path.read_text(encoding="utf-8")),
                               path.name == "__init__.py", set(paths)) - {package.name}
            for module, path in paths.items() if module != package.name}


def rooms_of(files: Arrows) -> Arrows:
    """The same between rooms."""
    rooms: Arrows = {}
    for module, targets in files.items():
        room = module.split(".")[1]
        rooms.setdefault(room, set()).update({t.split(".")[1] for t in targets} - {room})
    return rooms


def layers_of(rooms: Arrows) -> dict[str, int]:
    """{room: its layer}, from 1; a room is one layer above the highest that it imports."""
    layers: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        layers[room] = 1 + max((layers[below] for below in rooms[room]), default=0)
    return layers


def test_imports_go_downward_on_few_layers():
    """No circle of files or rooms; at most 18 rooms on at most 8 layers."""
    files = files_of(PACKAGE)
    TopologicalSorter(files).prepare()  # raises CycleError with the circle
    layers = layers_of(rooms_of(files))
    assert len(layers) <= MOST_ROOMS and max(layers.values()) <= MOST_LAYERS, layers
    assert layers["system"] == layers["objectives"] == 1 < layers["cli"] == max(layers.values())


def test_no_file_is_long():
    """At most 400 lines."""
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines())
               for path in PACKAGE.rglob("*.py")}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}
    assert len(lengths) > 100


def test_the_equations_import_torch_and_nothing_else():
    """objectives.py can be read, and copied, alone."""
    tree = ast.parse((PACKAGE / "objectives.py").read_text(encoding="utf-8"))
    names = [name for node in ast.walk(tree) for name in (
        [alias.name for alias in node.names] if isinstance(node, ast.Import) else
        ["." * node.level + (node.module or "")] if isinstance(node, ast.ImportFrom) else [])]
    assert names and set(names) == {"torch"}


def test_the_functions_of_the_readmes_table_exist():
    """formula of the paper -> `module.function`, with the paper's own ones in objectives.py."""
    names = [name for name in re.findall(r"^\|.*\| `([\w.]+)` \|$", (
        PACKAGE.parent / "README.md").read_text(encoding="utf-8"), re.M) if "." in name]
    missing = []
    for name in names:
        parts, path = name.split("."), PACKAGE
        while path.is_dir():
            path = path / parts.pop(0)
        found = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8")).body
        for part in parts:
            found = next((node.body for node in found if getattr(node, "name", "") == part), None)
            if found is None:
                missing.append(name)
                break
    assert not missing
    assert len([name for name in names if name.startswith("objectives.")]) >= 6


def test_every_kind_of_import_is_seen(tmp_path):
    """A package of one import of each kind, then with a circle of rooms but not of files."""
    package = tmp_path / "made"
    for name, text in {
            "__init__.py": "from .top import a", "top.py": "from .one import b\nimport made.two.c",
            "one/__init__.py": "", "one/b.py": "def f():\n    from ..two import d",
            "two/__init__.py": "", "two/c.py": "if TYPE_CHECKING:\n    from ..low import X",
            "two/d.py": "importlib.import_module('made.low')", "low.py": "import os"}.items():
        (package / name).parent.mkdir(exist_ok=True, parents=True)
        (package / name).write_text(text)
    files = files_of(package)
    assert {name: targets for name, targets in files.items() if targets} == {
        "made.top": {"made.one.b", "made.two.c"}, "made.one.b": {"made.two.d"},
        "made.two.c": {"made.low"}, "made.two.d": {"made.low"}}
    assert layers_of(rooms_of(files)) == {"low": 1, "two": 2, "one": 3, "top": 4}
    (package / "two" / "e.py").write_text("from made.one import b")
    files = files_of(package)
    TopologicalSorter(files).prepare()
    with pytest.raises(CycleError):
        layers_of(rooms_of(files))

"""What the library calls in other packages is still there, by the names it uses.

Every call in the code whose function an import leads to is looked up in the package that is
installed, and its keyword arguments are held against the function's signature. So a release that
renames an argument fails here with the argument's name, and not in the middle of a run.
"""

import ast
import builtins
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "hybridrl_lib"
FILES = sorted(ROOT.rglob("*.py"))
NOT_INSTALLED = {"vllm", "ray", "google"}  # optional: looked up where they are installed

# These have **arguments too, for engines and formats of one's own; what is used here has a name.
NAME_WHAT_THEY_TAKE = {"datasets", "papermill"}


def imported(tree: ast.AST, path: Path) -> dict[str, object]:
    """{name in the file: what it stands for}, of imports from other packages.

    Raises:
        AssertionError: a package no longer has what is imported from it.
    """
    found: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            pairs = [(alias.asname or alias.name.partition(".")[0],
                      alias.name if alias.asname else alias.name.partition(".")[0], None)
                     for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            pairs = [(alias.asname or alias.name, node.module, alias.name) for alias in node.names]
        else:
            continue
        for name, module, attribute in pairs:
            try:
                home = importlib.import_module(module)
            except ModuleNotFoundError:
                if module.partition(".")[0] in NOT_INSTALLED:
                    continue
                raise
            if attribute and not hasattr(home, attribute):
                try:
                    found[name] = importlib.import_module(f"{module}.{attribute}")
                except ModuleNotFoundError:
                    raise AssertionError(f"{where(path, node)}: {module} has no {attribute}; it "
                                         "was renamed or removed.") from None
            else:
                found[name] = getattr(home, attribute) if attribute else home
    return found


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT.parent)}:{node.lineno}"


def called(node: ast.expr, known: dict[str, object], place: str) -> object | None:
    """What a call's function is, if imports lead to it."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = called(node.value, known, place)
        if owner is None or not (inspect.ismodule(owner) or inspect.isclass(owner)):
            return None
        assert hasattr(owner, node.attr), (
            f"{place}: {owner.__name__} has no {node.attr}; it was renamed or removed.")
        return getattr(owner, node.attr)
    return None


def missing_arguments(function: object, names: list[str]) -> list[str] | None:
    """The names that a function does not take; None if it does not say what it takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built-in functions of C++
        return None
    home = (getattr(function, "__module__", None) or "").partition(".")[0]
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and home not in NAME_WHAT_THEY_TAKE:
        return None
    taken = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    return [name for name in names if name not in taken]


def calls(path: Path) -> Iterator[tuple[str, object, list[str]]]:
    """(place, function of another package, keyword arguments) of every call in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = imported(tree, path)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = called(node.func, known, where(path, node))
        home = (getattr(function, "__module__", None) or "").partition(".")[0]
        if function is None or home in ("hybridrl_lib", builtins.__name__):
            continue
        yield where(path, node), function, [k.arg for k in node.keywords if k.arg]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_call_of_another_package_fits_its_signature(path):
    for place, function, names in calls(path):
        wrong = missing_arguments(function, names)
        assert not wrong, (f"{place}: {function.__module__}.{function.__qualname__} has no "
                           f"argument {' and no argument '.join(wrong)}; it was renamed or removed "
                           "in the installed release.")


def test_calls_are_found():
    """The tests above look at something: signatures that say what they take, of several homes."""
    checked = {function.__module__.partition(".")[0] for path in FILES
               for _, function, names in calls(path)
               if names and missing_arguments(function, names) is not None}
    assert {"accelerate", "datasets", "math_verify", "papermill", "peft", "torch",
            "transformers"} <= checked


def test_a_changed_signature_is_named(monkeypatch):
    """Protects the message: an argument that is gone and a name that is gone are both said."""
    import peft

    path = ROOT / "policy.py"
    test_every_call_of_another_package_fits_its_signature(path)
    with monkeypatch.context() as patch:
        patch.setattr(peft, "LoraConfig", type("LoraConfig", (), {
            "__init__": lambda self, r, target_modules: None, "__module__": "peft"}))
        with pytest.raises(AssertionError, match=r"policy.py:\d+: peft.LoraConfig has no argument "
                                                 r"lora_alpha and no argument lora_dropout"):
            test_every_call_of_another_package_fits_its_signature(path)
    monkeypatch.delattr(peft, "get_peft_model")
    with pytest.raises(AssertionError, match="peft has no get_peft_model; it was renamed"):
        test_every_call_of_another_package_fits_its_signature(path)

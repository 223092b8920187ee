"""pyproject.toml, constraints.txt, environment.yml, Makefile, and CITATION.cff agree."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import yaml
from facts import lines_with
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OUR_NAME = canonicalize_name(PROJECT["name"])
TARGETS = ("reproduce", "test", "test-all", "test-oldest", "env", "env-hashed", "report",
           "notebooks", "bench", "lint", "audit", "lock")
PACKAGE_OF_MODULE = {"yaml": "pyyaml", "PIL": "pillow"}


def pins() -> dict[str, str]:
    """{package: version} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "constraints.txt holds exact pins only"
    names = [canonicalize_name(name) for name, _ in pairs]
    assert len(names) == len(set(names)), "a package is pinned twice"
    return dict(zip(names, (version for _, version in pairs), strict=True))


def declared() -> list[Requirement]:
    """Every requirement of the project and its extras, other than on itself."""
    texts = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    return [item for item in map(Requirement, texts)
            if canonicalize_name(item.name) not in (OUR_NAME, "vllm")]


def test_every_requirement_has_a_floor_and_a_pin_above_it():
    """`make env` installs versions that pyproject.toml allows, and pins every package."""
    pinned = pins()
    uncapped = [item.name for item in declared() if [specifier.operator for specifier
                                                     in item.specifier] != [">="]]
    assert not uncapped, "a requirement has a floor and no cap"
    outside = [item.name for item in declared()
               if not item.specifier.contains(pinned[canonicalize_name(item.name)])]
    assert not outside
    assert not [name for name, version in pins().items() if "+" in version]
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = {canonicalize_name(r.name): r for r in map(
        Requirement, (line for line in lines if not line.startswith("#")))}
    extra = PROJECT["optional-dependencies"]["test"]
    for item in map(Requirement, [*PROJECT["dependencies"], *extra]):
        version = next(iter(oldest[canonicalize_name(item.name)].specifier)).version
        assert item.specifier.contains(version), item
        if item.name in ("transformers", "datasets", "accelerate", "peft", "numpy"):
            assert Version(version) == Version(next(iter(item.specifier)).version), item


@pytest.mark.skipif(sys.platform != "linux", reason="the pins are Linux's")
def test_nothing_comes_in_without_a_pin():
    """What the requirements bring along is pinned too (torch pins its own CUDA libraries)."""
    pinned, seen, wanted = pins(), set(), [(item.name, "") for item in declared()]
    while wanted:
        name, extra = wanted.pop()
        if (canonicalize_name(name), extra) in seen:
            continue
        seen.add((canonicalize_name(name), extra))
        try:
            needs = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                wanted += [(need.name, option) for option in ("", *need.extras)]
    names = {name for name, _ in seen if not re.match("nvidia-|cuda-|triton", name)}
    assert len(names) > 50 and sorted(names - set(pinned)) == []


def locked(name: str) -> dict[str, str]:
    """{package: version} of a lock file, each with the sha256 of at least one file."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            pin, *hashes = line.split()
            assert hashes and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", h) for h in hashes)
            package, version = pin.split("==")
            found[canonicalize_name(package)] = version
    return found


def test_lock_files_are_the_pins_with_their_hashes():
    """`make env-hashed` installs what `make env` does; `make lock` follows a changed pin."""
    cuda = locked("requirements-cuda.lock")
    everything = locked("requirements.lock") | {"torch": cuda["torch"]}
    assert everything == pins()
    assert not [name for name in cuda if not re.match("torch$|triton$|nvidia-|cuda-", name)]


def test_hashed_environment_takes_nothing_unhashed():
    """Without these options, pip would fetch dependencies or build tools that nobody recorded."""
    commands = [line for line in make("-n", "env-hashed").splitlines() if "requirements" in line]
    assert len(commands) == 2
    for command in commands:
        assert "--require-hashes --only-binary :all: --no-deps" in command
    assert "--no-deps --no-build-isolation -e ." in make("-n", "env-hashed")


def audit_script():
    loader = SourceFileLoader("audit", str(ROOT / ".ci" / "audit"))
    module = module_from_spec(spec_from_loader("audit", loader))
    loader.exec_module(module)
    return module


def test_audit_without_its_data_is_a_sentence_and_no_failure():
    """CI must not fail because an advisory server cannot be reached."""
    for address in ("http://127.0.0.1:9/x", "file:///nowhere", "no address"):
        done = subprocess.run([sys.executable, ROOT / ".ci" / "audit"], capture_output=True,
                              text=True, check=False, env={"AUDIT_URL": address, "PATH": ""})
        assert done.returncode == 0 and done.stderr == "", address
        assert done.stdout.startswith("audit: skipped") and done.stdout.count("\n") == 1


def test_audit_fails_for_a_vulnerability_alone(monkeypatch, capsys, tmp_path):
    """A finding is named with the version that fixes it; an unknown package is not a finding."""
    audit = audit_script()
    report = {"dependencies": [
        {"name": "good", "version": "1", "vulns": []},
        {"name": "unknown", "skip_reason": "not found"},
        {"name": "bad", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}]}
    monkeypatch.setattr(audit, "problem", lambda: "")
    monkeypatch.setattr(audit, "audit", lambda: report)
    assert audit.main() == 1 and lines_with(capsys.readouterr().out, "bad", 2, "CVE-1", 3)
    audit.ACCEPTED["CVE-1"] = "it affects nobody here"
    assert audit.main() == 0 and lines_with(capsys.readouterr().out, 0, 2)
    report["dependencies"] = report["dependencies"][1:2]
    assert audit.main() == 0 and "skipped" in capsys.readouterr().out
    monkeypatch.setattr(audit, "audit", lambda: {}["dependencies"])
    assert audit.main() == 0 and "skipped" in capsys.readouterr().out
    audit = audit_script()
    program = tmp_path / ".venv" / "audit" / "bin" / "pip-audit"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho Traceback >&2\necho 'ServiceError: 500' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(audit, "ROOT", tmp_path)
    monkeypatch.setattr(audit, "problem", lambda: "")
    assert audit.main() == 0
    assert lines_with(capsys.readouterr().out, "ServiceError: 500")


def test_dev_is_every_extra_but_vllm():
    """`.[dev]`, which every environment installs, only leaves out vllm (see `declared`)."""
    extras = dict(PROJECT["optional-dependencies"])
    dev, = map(Requirement, extras.pop("dev"))
    assert canonicalize_name(dev.name) == OUR_NAME and dev.extras == set(extras) - {"vllm"}
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, _, pip = environment["dependencies"]
    assert pip["pip"] == ["-c constraints.txt", "-e .[dev]"]
    assert "install -c constraints.txt -e '.[dev]'" in (ROOT / "Makefile").read_text()
    floor = PROJECT["requires-python"].removeprefix(">=")
    assert python == f"python={floor}"


def test_every_import_is_declared():
    """A fresh install can import every module without luck from another package."""
    known = {canonicalize_name(item.name) for item in declared()} | {OUR_NAME, "vllm"}
    undeclared = set()
    for path in (ROOT / "hybridrl_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            for name in (name.partition(".")[0] for name in names):
                package = canonicalize_name(PACKAGE_OF_MODULE.get(name, name))
                if name not in sys.stdlib_module_names and package not in known:
                    undeclared.add((path.name, package))
    assert sorted(undeclared) == []
    folders = {path.parent for path in (ROOT / "hybridrl_lib").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    covered = {path for pattern in setuptools["package-data"]["hybridrl_lib"]
               for path in (ROOT / "hybridrl_lib").glob(pattern.replace("**", "**/*"))}
    needed = {path for path in (ROOT / "hybridrl_lib").rglob("*") if path.is_file()
              and path.suffix not in (".py", ".pyc") and ".ruff_cache" not in path.parts}
    assert needed and needed <= covered


def make(*arguments: str) -> str:
    """What make prints; skips the test without make."""
    if shutil.which("make") is None:
        pytest.skip("make is not available")
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout


def test_make_has_its_targets():
    """Every target can be made, and help names it."""
    offered = make("-s", "help")
    for target in TARGETS:
        make("-n", target)
    assert not [target for target in TARGETS if f"make {target}" not in offered]
    for arguments, command in (([], "reproduce --preset tiny --seeds 1"),
                               (["PRESET=paper", "SEEDS=5", "JOBS=2", "EXPERIMENT=night"],
                                "reproduce --preset paper --seeds 5 --jobs 2 --experiment night")):
        words = make("-n", "--no-print-directory", "reproduce", *arguments).replace(
            "\\\n", " ").split()
        assert words[words.index("reproduce"):] == command.split()
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text and all(
        re.search(rf"make {target}\b", text) for target in ("lint", "audit", "test", "test-oldest"))
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_citation_names_software_and_paper():
    """The citation's version is the package's, and the paper is in it."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["title"], str(citation["version"])) == (PROJECT["name"], PROJECT["version"])
    paper, = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Denisov", "Serdyuk"]
    assert paper["year"] == 2025
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    source = tool["hybridrl"]["source"]
    assert source.startswith("git+https://") and source.endswith(f"@v{PROJECT['version']}")

"""What of the notebooks has to be run to be trusted: the setup cell, and the solutions."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from notebook_files import SOLUTION, read, setup_cell

COLAB = {"COLAB_RELEASE_TAG": "release-colab_20260101"}
INSTALLED = {"torch": "2.9.0+cu126", "numpy": "2.0.2"}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A virtual environment that has, as far as pip can see, Colab's torch and numpy."""
    folder = tmp_path_factory.mktemp("machine")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, version in INSTALLED.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text(f"{info.name}/METADATA,,\n")
    return folder


def make_wheel(folder: Path, *requirements: str) -> Path:
    """A wheel of an empty hybridrl_lib with these requirements."""
    path, info = folder / "hybridrl_lib-0.1.0-py3-none-any.whl", "hybridrl_lib-0.1.0.dist-info"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("hybridrl_lib/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hybridrl_lib\n"
                                           f"Version: 0.1.0\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\n"
                                        "Root-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def run_setup_cell(machine: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs the setup cell there, without a network."""
    environment = {key: value for key, value in os.environ.items()
                   if not key.startswith(("PYTHON", "PIP_", "COLAB", "HYBRIDRL"))}
    return subprocess.run(
        [str(machine / "bin" / "python"), "-c", setup_cell("00_start_here")],
        env={**environment, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables},
        cwd=machine, capture_output=True, text=True, check=False)


def versions(machine: Path) -> dict[str, str]:
    """What pip says is installed there."""
    lines = subprocess.run([str(machine / "bin" / "python"), "-m", "pip", "freeze"], check=True,
                           capture_output=True, text=True).stdout.splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


@pytest.mark.slow
def test_setup_cell_on_colab_and_elsewhere(machine, tmp_path):
    """Protects the first thing anybody runs: it is executed for real, with pip, and not stubbed."""
    here = run_setup_cell(machine)
    assert here.returncode != 0 and "pip install -e ." in here.stderr
    assert "hybridrl_lib" not in versions(machine), "elsewhere nothing may be installed"

    greedy = make_wheel(tmp_path, "torch>=99")
    refused = run_setup_cell(machine, HYBRIDRL_SOURCE=str(greedy), **COLAB)
    assert refused.returncode != 0 and versions(machine) == INSTALLED, "torch must stay as it is"

    wheel = make_wheel(tmp_path, "torch>=2.8", "numpy>=2.0")
    done = run_setup_cell(machine, HYBRIDRL_SOURCE=str(wheel), **COLAB)
    assert done.returncode == 0, done.stderr
    after = versions(machine)
    assert INSTALLED.items() <= after.items()
    again = run_setup_cell(machine)
    assert again.returncode == 0 and not again.stdout and not again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_problems_and_rewards", "02_grpo_step_by_step"])
def test_solutions_are_right(name, monkeypatch, capsys):
    """Protects the reader from a question whose own solution is called wrong."""
    monkeypatch.setenv("HYBRIDRL_SMOKE", "1")
    cells = read(name).cells
    namespace = {"preset": "tiny", "seed": 0, "experiment": "", "settings": ""}
    questions = 0
    for index, cell in enumerate(cells):
        if cell.cell_type != "code" or index < 3:
            continue
        source = cell.source
        if source.startswith("answer = None"):
            questions += 1
            solution = SOLUTION.search(cells[index + 1].source)[1]
            # behind what the cell imports and sets, just before it is checked
            source = solution + source.removeprefix("answer = None")
        exec(compile(source, f"{name}, cell {index}", "exec"), namespace)
    said = capsys.readouterr().out
    assert questions >= 2 and said.count("right: ") == questions, said
    assert "not yet" not in said and "your turn" not in said

"""The notebooks' setup cell, run on a machine that looks like Google Colab."""

import json
import platform
import re
import subprocess
import sys
import threading
import time

import pytest
from colab_machine import LACKING, NEEDED, Colab, copy_project
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from notebook_files import ROOT, read, setup_cell
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hybridrl_lib import colab
from hybridrl_lib.system.errors import UserError

pytestmark = pytest.mark.xdist_group("colab")
FLOORS = {one.name: next(iter(one.specifier)).version for one in NEEDED}
# Colab's own kernel (June 2026), the oldest transformers allowed, and what these two need.
OLDER = ("ipython==7.34.0", "ipykernel==6.17.1", "traitlets==5.7.1", "backcall==0.2.0",
         "decorator==4.4.2", "pickleshare==0.7.5", "antlr4-python3-runtime==4.9.3",
         f"transformers=={FLOORS['transformers']}", "tokenizers==0.22.2", "huggingface_hub==1.3.0")


@pytest.fixture()
def versions(monkeypatch):
    """{package: version} of what the library believes is installed."""
    found = dict(FLOORS)
    for place in ("hybridrl_lib.system.requirements", "hybridrl_lib.colab"):
        monkeypatch.setattr(f"{place}.installed", lambda name: found.get(name, ""))
    return found


def test_too_old_packages_are_one_sentence(versions, monkeypatch):
    """What is too old is named with its version; torch is never left to pip; newer is fine."""
    colab.refuse_unfit(NEEDED)
    for name, version in (("transformers", "4.40.2"), ("torch", "2.3.0+cu121"),
                          ("numpy", "1.26.4")):
        before, versions[name] = versions[name], version
        with pytest.raises(UserError) as caught:
            colab.refuse_unfit(NEEDED)
        versions[name], sentence = before, str(caught.value)
        assert f"{name} {version}" in sentence and f">={FLOORS[name]}" in sentence
        assert "\n" not in sentence
        assert (f"%pip install {name}==" in sentence) == (name == "transformers")
        assert ("%pip" in sentence) == (name == "transformers")
    versions.update({name: "99.0" for name in versions} | {"transformers": "99.0.dev0"})
    colab.refuse_unfit(NEEDED)
    lines = (ROOT / "tests" / "data" / "colab.txt").read_text().splitlines()
    listed = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name.lower() for name in listed} == set(versions) - set(LACKING)
    versions.update({name.lower(): version for name, version in listed.items()})
    colab.refuse_unfit(NEEDED)
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.12")
    with pytest.raises(UserError, match=r"Python 3\.10\.12 .*>=3\.11") as caught:
        colab.refuse_unfit([])
    assert "%pip" not in str(caught.value)


def test_where_results_go(monkeypatch, tmp_path):
    """Google Drive if it is mounted, unless the user chose a folder; one line says which."""
    monkeypatch.setattr(colab, "DRIVES", (tmp_path / "MyDrive",))
    monkeypatch.setenv("HYBRIDRL_RESULTS_DIR", "")
    assert "drive.mount" in colab.choose_results()
    assert not colab.os.environ["HYBRIDRL_RESULTS_DIR"]
    (tmp_path / "MyDrive").mkdir()
    for _ in range(2):  # the cell may be run again
        assert "Google Drive" in colab.choose_results()
        assert colab.os.environ["HYBRIDRL_RESULTS_DIR"] == str(
            tmp_path / "MyDrive" / "hybridrl_lib" / "results")
    monkeypatch.setenv("HYBRIDRL_RESULTS_DIR", str(tmp_path))
    assert "HYBRIDRL_RESULTS_DIR" in colab.choose_results()
    assert colab.os.environ["HYBRIDRL_RESULTS_DIR"] == str(tmp_path)


def test_pins_are_those_of_the_project(tmp_path):
    """The cell installs the versions that `make env` does; run `make lock` after a change."""
    assert colab.PINS.read_bytes() == (ROOT / "constraints.txt").read_bytes()
    done = subprocess.run([sys.executable, "-S", "-c", setup_cell("00_start_here")], env={},
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "pip install -e ." in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Colab with the packages of this environment."""
    return Colab(tmp_path_factory.mktemp("colab") / "newer")


@pytest.fixture(scope="module")
def older_machine(tmp_path_factory):
    """Colab with its own older kernel and the oldest transformers that the library allows."""
    folder = tmp_path_factory.mktemp("packages")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder),
         *OLDER], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the older packages cannot be fetched here: {done.stderr.strip()[-200:]}")
    machine = Colab(tmp_path_factory.mktemp("colab") / "older", folder)
    there = machine.versions()
    for older in map(Requirement, OLDER):
        assert older.specifier.contains(there[older.name]), older
    return machine


@pytest.mark.slow
def test_setup_cell_says_what_is_wrong(machine):
    """The cell with real pip: old packages, no package, a clone of the same name beside it."""
    machine.new_session()
    before = machine.versions()
    for name, version in (("transformers", "4.40.2"), ("torch", "2.3.0+cu121")):
        machine.pretend(name, version)
        refused = machine.run_setup_cell()
        machine.stop_pretending()
        last = refused.stderr.strip().splitlines()[-1]
        assert refused.returncode and f"{name} {version}" in last and FLOORS[name] in last
        assert last.startswith("hybridrl_lib.system.errors.UserError: ")
    failed = machine.run_setup_cell(PIP_FIND_LINKS=str(machine.content))
    last = failed.stderr.splitlines()[-1]
    assert "UserError: " in last and "math-verify==" in last
    assert machine.versions() == before | {"hybridrl_lib": "0.1.0"}
    done = machine.run_setup_cell()
    assert not done.returncode and done.stdout.count("\n") == 1 and not done.stderr
    assert "drive.mount" in done.stdout
    only_lacking_was_installed(before, machine.versions())
    machine.new_session()
    clone = copy_project(machine.content / "hybridrl_lib")
    failed = machine.run_setup_cell(HYBRIDRL_SOURCE=str(machine.content / "elsewhere"))
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and "HYBRIDRL_SOURCE" in last
    done = machine.run_setup_cell(HYBRIDRL_SOURCE=str(clone))
    assert not done.returncode, done.stderr
    place = machine.run_python("import hybridrl_lib; print(hybridrl_lib.__file__)").stdout
    assert str(machine.site) in place


@pytest.mark.slow
def test_all_cells_on_an_older_colab(older_machine):
    """The notebook from its first cell to its last, without a GPU, on Colab's own kernel."""
    before = older_machine.versions()
    said = run_all(older_machine)
    assert "preset tiny" in said and "drive.mount" in said
    only_lacking_was_installed(before, older_machine.versions())
    manifest, = older_machine.content.glob("results/runs/tiny-smoke/rl/seed-0/manifest.json")
    assert json.loads(manifest.read_text())["versions"]["transformers"] == before["transformers"]


@pytest.mark.slow
def test_a_lost_session_resumes_from_drive(machine):
    """A kernel is killed during training and only Drive is left of its machine."""
    machine.new_session()
    before = machine.versions()
    run = machine.mount_drive() / "hybridrl_lib" / "results" / "tiny-smoke" / "rl" / "seed-0"
    settings = "training.epochs=4 training.checkpoint_every=1"
    run_all(machine, settings, until=(run / "checkpoint" / "step-000003").exists)
    assert not (run / "manifest.json").exists()
    machine.new_session()
    assert machine.versions() == before, "the machine is a new one"
    said = run_all(machine, settings)
    assert "Google Drive" in said and re.search(r"checkpoint of step \d", said)
    only_lacking_was_installed(before, machine.versions())
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["complete"] and manifest["resumed_from"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, manifest["steps"] + 1)]
    assert not (machine.content / "results").exists()


def only_lacking_was_installed(before: dict, after: dict) -> None:
    """Nothing that was there has changed; only the library and pinned packages are new."""
    assert before.items() <= after.items()
    new = {canonicalize_name(name): after[name] for name in set(after) - set(before)}
    assert new.pop("hybridrl-lib") and set(new) == {*map(canonicalize_name, LACKING)}
    assert all(colab.pins()[name].endswith(f"=={version}") for name, version in new.items())


def run_all(machine: Colab, settings: str = "", until=None) -> str:
    """Runs all cells of 11_rl in a new kernel and returns the text of their outputs."""
    notebook = read("11_rl")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += f"\nsettings = {settings!r}"
    client = machine.client(notebook)
    if until:
        killer = threading.Thread(target=kill_kernel, args=(client, until), daemon=True)
        killer.start()
        with pytest.raises(DeadKernelError):
            client.execute(env=machine.environment())
        killer.join()
    else:
        client.execute(env=machine.environment())
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text") or output.get("data", {}).get("text/html", "")
                   for output in outputs)


def kill_kernel(client: NotebookClient, until) -> None:
    while not until():
        time.sleep(0.01)
    client.km.provisioner.process.kill()

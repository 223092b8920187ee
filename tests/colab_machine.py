"""A machine that looks like Google Colab: its packages, its variables, its folder, no GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from notebook_files import ROOT, setup_cell
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hybridrl_lib.system.requirements import OURS

# Not the metadata of the installed package, which may be older than the checkout.
NEEDED = [Requirement(line) for line in tomllib.loads(
    (ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]]
# Of our requirements and what they bring: see tests/data/colab.txt.
LACKING = ("math-verify", "latex2sympy2_extended", "papermill")
VARIABLES = {"COLAB_RELEASE_TAG": "release-colab_20260601", "COLAB_GPU": "",
             "COLAB_BACKEND_VERSION": "next", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}


class Colab:
    """A machine in a folder."""

    def __init__(self, folder: Path, older: Path | None = None):
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        (self.site,) = (folder / "venv").glob("lib/python*/site-packages")
        link_packages(folder / "packages")
        (folder / "packages" / "google_colab" / "google" / "colab").mkdir(parents=True)
        (folder / "packages" / "google_colab" / "google" / "colab" / "__init__.py").touch()
        self.before = folder / "before"  # what a test puts here is found first
        self.before.mkdir()
        paths = [self.before, older, folder / "packages", folder / "packages" / "google_colab"]
        (self.site / "colab.pth").write_text(
            "".join(f"{path}\n" for path in paths if path) + "import google.colab\n")
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        for name in (*LACKING, "setuptools"):  # the last builds the library
            pack(name, self.wheels)
        self.source = copy_project(folder / "source")
        self.new_session()

    def new_session(self) -> None:
        """A new machine with an empty /content: of an earlier session only Google Drive is left."""
        self.uninstall(OURS, *LACKING)
        self.content = self.folder / "content"
        for path in self.content.glob("*"):
            if path.name != "drive":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.content.mkdir(exist_ok=True)

    def uninstall(self, *names: str) -> None:
        """Removes packages that pip has installed here."""
        subprocess.run([str(self.python), "-m", "pip", "uninstall", "--quiet", "--yes", *names],
                       check=True, capture_output=True)

    def mount_drive(self) -> Path:
        drive = self.content / "drive" / "MyDrive"
        drive.mkdir(parents=True)
        return drive

    def environment(self, **variables: str) -> dict[str, str]:
        own = {key: value for key, value in os.environ.items()
               if not key.startswith(("PYTHON", "PYTEST", "PIP_", "COLAB", "HYBRIDRL", "CI"))}
        return own | VARIABLES | {
            "HYBRIDRL_SOURCE": str(self.source), "HYBRIDRL_SMOKE": "1", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            **variables}

    def run_setup_cell(self, **variables: str) -> subprocess.CompletedProcess:
        """The cell as the notebooks have it, in a plain Python."""
        return self.run_python(setup_cell("00_start_here"), **variables)

    def run_python(self, program: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run([str(self.python), "-c", program], cwd=self.content,
                              env=self.environment(**variables), capture_output=True, text=True,
                              check=False)

    def client(self, notebook: nbformat.NotebookNode) -> NotebookClient:
        """Runs a notebook in this machine's kernel, from its /content."""
        spec = self.folder / "jupyter" / "kernels" / "colab" / "kernel.json"
        spec.parent.mkdir(parents=True, exist_ok=True)
        spec.write_text(json.dumps({
            "argv": [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Colab", "language": "python"}))
        client = NotebookClient(notebook, kernel_name="colab", timeout=300,
                                resources={"metadata": {"path": str(self.content)}})
        client.create_kernel_manager()
        client.km.kernel_spec_manager.kernel_dirs.insert(0, str(spec.parent.parent))
        return client

    def versions(self) -> dict[str, str]:
        """{package: version} of what Python finds there first."""
        program = ("import json; from importlib.metadata import distributions as d\n"
                   "print(json.dumps({x.name: x.version for x in reversed(list(d()))}))")
        return json.loads(self.run_python(program).stdout)

    def pretend(self, name: str, version: str) -> None:
        """Makes pip and importlib.metadata find another version of a package."""
        info = self.before / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def stop_pretending(self) -> None:
        for info in self.before.iterdir():
            shutil.rmtree(info)


def link_packages(folder: Path) -> None:
    """Links to every package that the library needs, directly or not, except what Colab lacks."""
    folder.mkdir()
    seen = {canonicalize_name(name) for name in (*LACKING, OURS)}
    wanted = [one.name for one in NEEDED]
    wanted += ["antlr4-python3-runtime", "requests", "tenacity", "nbclient", "click", "entrypoints",
               "aiohttp", "tqdm",  # Colab has what the lacking ones need
               "httpx", "typer"]  # and what older hub clients need
    while wanted:
        name = wanted.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if canonicalize_name(name) in seen:
            continue
        seen.add(canonicalize_name(name))
        wanted += [need.name for need in map(Requirement, distribution.requires or ())
                   if need.marker is None or need.marker.evaluate({"extra": ""})]
        tops = {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__", "bin"}
        for top in tops:
            target = Path(distribution.locate_file(top)).resolve()
            if target.exists() and not (folder / top).exists():  # several share a folder
                (folder / top).symlink_to(target)


def pack(name: str, folder: Path) -> Path:
    """The wheel of an installed package."""
    distribution = metadata.distribution(name)
    tag = re.search(r"^Tag: (\S+)", distribution.read_text("WHEEL"), re.MULTILINE)[1]
    path = folder / f"{canonicalize_name(name).replace('-', '_')}-{distribution.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in distribution.files:
            if ".." not in file.parts and file.suffix != ".pyc" and file.locate().is_file():
                wheel.write(file.locate(), str(file))
    return path


def copy_project(folder: Path) -> Path:
    """The working tree's package, to be built: a build leaves files beside its source."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(ROOT / "hybridrl_lib", folder / "hybridrl_lib",
                    ignore=shutil.ignore_patterns("__pycache__", ".ruff_cache"))
    return folder

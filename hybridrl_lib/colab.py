"""Google Colab: what the notebooks' setup cell does after installing the library.

Colab's packages fit each other, and its kernel is built on some of them. So nothing is replaced.
Missing packages are installed at the versions that the library is tested with. Packages that are
too old are named, with advice: upgrading and restarting is left to the user, since an upgrade of
transformers brings its own tokenizers and hub client, which the session may have imported.
"""

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .system.errors import UserError, reason, show_in_one_sentence
from .system.requirements import installed, needed, needed_python, unfit

PINS = Path(__file__).parent / "assets" / "constraints.txt"
# Parts of Colab's image: another version of these needs another runtime.
IMAGE = ("torch", "numpy", "ipython", "ipykernel")
NEWEST = ("choose the newest runtime version under Runtime > Change runtime type and run all cells "
          "again")
# The second is the same: a notebook starts in /content.
DRIVES = (Path("/content/drive/MyDrive"), Path("drive/MyDrive"))
RESULTS = Path("hybridrl_lib") / "results"


def prepare() -> None:
    """Checks versions, installs what is missing, and says where results will go.

    Raises:
        UserError: something is too old, or pip could not install what is missing.
    """
    show_in_one_sentence()
    refuse_unfit(needed())
    refuse_unfit(install_missing())
    print(choose_results())


def refuse_unfit(requirements: Iterable[Requirement]) -> None:
    """Raises one message about everything that is too old for the library.

    Raises:
        UserError: something is too old.
    """
    wrong = {one.name: f"{one.name} {installed(one.name)} (needed: {one.specifier})"
             for one in requirements if unfit(one)}
    upgrade = " ".join(pin for name, pin in pins().items() if name in map(canonicalize_name, wrong))
    python, pythons = platform.python_version(), needed_python()
    if not pythons.contains(python, prereleases=True):
        wrong = {"python": f"Python {python} (needed: {pythons})"} | wrong
    if wrong:
        another = "" if {"python", *IMAGE} & set(wrong) or not upgrade else (
            f", or run '%pip install {upgrade}' in a new cell, restart the session under Runtime "
            "and run all cells again")
        raise UserError("This session cannot run hybridrl_lib: it has "
                        f"{', '.join(wrong.values())}; {NEWEST}{another}.")


def install_missing() -> list[Requirement]:
    """Installs the required packages that are missing, without changing others.

    pip must not resolve requirements itself, because it would replace packages.

    Returns:
        What the new packages require.

    Raises:
        UserError: pip failed.
    """
    wanted, brought, pinned = needed(), [], pins()
    while missing := {canonicalize_name(one.name): str(one) for one in wanted
                      if not installed(one.name)}:
        packages = [pinned.get(name, requirement) for name, requirement in missing.items()]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *packages],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        importlib.invalidate_caches()
        if done.returncode or not all(map(installed, missing)):
            said = done.stdout.splitlines()
            errors = [line for line in said if line.startswith("ERROR:")]
            raise UserError(f"pip could not install {' '.join(packages)} "
                            f"({reason(Exception(*errors[-1:] or said[-1:]))}); check the "
                            f"connection and run this cell again, or {NEWEST}.")
        wanted = [need for name in missing for need in needed(name)]
        brought += wanted
    return brought


def pins() -> dict[str, str]:
    """{package: `name==version`} of the versions that the library is tested with."""
    lines = PINS.read_text(encoding="utf-8").split("\n")
    return {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}


def choose_results() -> str:
    """Sends new results and checkpoints to Google Drive if it is mounted; prints where they go.

    HYBRIDRL_RESULTS_DIR has precedence.
    """
    drive = next((place.resolve() for place in DRIVES if place.is_dir()), None)
    folder = drive / RESULTS if drive else None
    chosen = os.environ.get("HYBRIDRL_RESULTS_DIR")
    if folder and chosen in (None, "", str(folder)):
        os.environ["HYBRIDRL_RESULTS_DIR"] = str(folder)
        return (f"Results and checkpoints go to Google Drive, MyDrive/{RESULTS.as_posix()}: after "
                "a lost session, run all cells again to resume.")
    if chosen:
        return "Results and checkpoints go to the folder that HYBRIDRL_RESULTS_DIR names."
    return ("Results and checkpoints are lost with this session; to keep them on Google Drive, run "
            "'from google.colab import drive; drive.mount(\"/content/drive\")' in a new cell, then "
            "this cell again.")

"""Google Colab: what the notebooks' setup cell does once the library itself is there.

Colab's packages fit each other, and its kernel is built on some of them. So nothing that it has is
replaced: what is missing is put beside it at the versions the library is tested with, and what is
too old is named, with what to do. An upgrade of transformers would suit the library, but it brings
its own tokenizers and hub client, which the session may have imported: so whether to do that and to
restart is left to the user.
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
# Parts of Colab's own image: another version of them is another runtime, not a package to install.
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
    """Names everything that is too old for the library, and what to do, in one sentence.

    Raises:
        UserError: something is.
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
        raise UserError("This session does not suit hybridrl_lib: it has "
                        f"{', '.join(wrong.values())}; {NEWEST}{another}.")


def install_missing() -> list[Requirement]:
    """Installs the required packages that are not there; nothing that is there is changed.

    pip is not left to follow requirements by itself: it would replace what it does not like.

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
    """Sends new results and checkpoints to Google Drive if it is mounted; says where they go.

    A folder that HYBRIDRL_RESULTS_DIR names comes first.
    """
    drive = next((place.resolve() for place in DRIVES if place.is_dir()), None)
    folder = drive / RESULTS if drive else None
    chosen = os.environ.get("HYBRIDRL_RESULTS_DIR")
    if folder and chosen in (None, "", str(folder)):
        os.environ["HYBRIDRL_RESULTS_DIR"] = str(folder)
        return (f"Results and checkpoints go to Google Drive, MyDrive/{RESULTS.as_posix()}: after "
                "a lost session run all cells again, and they go on from there.")
    if chosen:
        return "Results and checkpoints go to the folder that HYBRIDRL_RESULTS_DIR names."
    return ("Results and checkpoints are lost with this session; to keep them on Google Drive, run "
            "'from google.colab import drive; drive.mount(\"/content/drive\")' in a new cell, then "
            "this cell again.")

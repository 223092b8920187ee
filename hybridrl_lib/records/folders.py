"""Where results are, and which names are allowed."""

import os
import re
from pathlib import Path

from ..system.errors import UserError
from ..system.paths import PACKAGE

PLAIN_NAME = re.compile(r"\w[\w.+-]*")


def results_folder() -> Path:
    """Where new runs go: `HYBRIDRL_RESULTS_DIR`, or else `results/runs` of the checkout."""
    chosen = os.environ.get("HYBRIDRL_RESULTS_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return project_folder() / "results" / "runs"


def project_folder() -> Path:
    """The checkout that contains the current folder, or the current folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "hybridrl_lib").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    return here


def from_here(path: Path) -> Path:
    """A path inside the checkout relative to the current folder; others unchanged."""
    inside = path.resolve().is_relative_to(project_folder().resolve())
    return Path(os.path.relpath(path)) if inside else path


def experiment_folder(experiment: str) -> Path:
    """The folder of an experiment's new runs.

    Raises:
        UserError: the name would leave the results folder.
    """
    if not is_plain_name(experiment):
        raise UserError(f"The experiment name {experiment!r} is not a plain folder name; use "
                        "letters, digits, '-', '_', and '.', beginning with a letter or digit.")
    return results_folder() / experiment


def is_plain_name(name: object) -> bool:
    """Whether a text is safe as a folder name on every system, in a shell, and on a page."""
    return isinstance(name, str) and len(name) <= 100 and bool(PLAIN_NAME.fullmatch(name))


def published_folder() -> Path:
    """The committed results of the current checkout, or else of the package's."""
    here = project_folder() / "results" / "published"
    return here if here.is_dir() else PACKAGE.parent / "results" / "published"

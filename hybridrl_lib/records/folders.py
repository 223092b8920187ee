"""Where results are, and which names they may have."""

import os
import re
from pathlib import Path

from ..system.errors import UserError
from ..system.paths import PACKAGE

PLAIN_NAME = re.compile(r"\w[\w.+-]*")


def results_folder() -> Path:
    """Where new runs go: `HYBRIDRL_RESULTS_DIR`, or `results/runs` of the nearest checkout.

    A notebook runs in `notebooks/`, a command anywhere: the folder above that holds the project's
    `pyproject.toml` is taken, and the current one if there is none.
    """
    chosen = os.environ.get("HYBRIDRL_RESULTS_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return project_folder() / "results" / "runs"


def project_folder() -> Path:
    """The checkout that the current folder lies in, or the current folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "hybridrl_lib").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    return here


def from_here(path: Path) -> Path:
    """A path inside the checkout as it is written from the current folder; others as they are."""
    inside = path.resolve().is_relative_to(project_folder().resolve())
    return Path(os.path.relpath(path)) if inside else path


def experiment_folder(experiment: str) -> Path:
    """The folder of an experiment's new runs.

    Raises:
        UserError: the name would leave the results folder.
    """
    if not is_plain_name(experiment):
        raise UserError(f"The experiment name {experiment!r} is not a plain folder name; use a "
                        "text of letters, digits, '-', '_' and '.' that begins with a letter or "
                        "digit.")
    return results_folder() / experiment


def is_plain_name(name: object) -> bool:
    """Whether a text is a folder's name on every system and nothing else to a shell or a page."""
    return isinstance(name, str) and len(name) <= 100 and bool(PLAIN_NAME.fullmatch(name))


def published_folder() -> Path:
    """The committed results: of the checkout the current folder lies in, else of the package's."""
    here = project_folder() / "results" / "published"
    return here if here.is_dir() else PACKAGE.parent / "results" / "published"

"""Paths of the package and of the user. No run writes the name of a home folder."""

import os
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent  # the folder hybridrl_lib


def tiny_model_folder() -> Path:
    """The folder of the tiny base model that ships with the package."""
    return PACKAGE / "assets" / "tiny"


def home_folder() -> str:
    """The user's home folder; empty if it is a root folder or does not exist."""
    home = os.path.expanduser("~").rstrip("/\\")
    return home if len(Path(home).parts) > 1 else ""


def is_place(path: str) -> bool:
    """Whether a model's path can only be a file or folder, not a hub name."""
    place = Path(path).expanduser()
    return (place.is_absolute() or path.startswith((".", "~")) or place.suffix.lower() == ".gguf")


def is_missing(path: str) -> bool:
    """Whether a model's path can only be a file or folder, and does not exist."""
    return is_place(path) and not Path(path).expanduser().exists()


def without_home(path: str) -> str:
    """A path below the user's home folder as `~/...`, so that a recorded setting works for others
    too.
    """
    home = home_folder()
    inside = home and path.startswith((home + "/", home + os.sep))
    return "~" + path[len(home):] if inside else path


def hide_home(path: Path) -> None:
    """Replaces the home folder by `~` in a text file, such as an executed notebook.

    papermill, PEFT, and Python's tracebacks write full paths.
    """
    home = home_folder()
    if not home or not path.is_file():
        return
    spellings = {home, home.replace("\\", "\\\\"), home.replace("\\", "/")}  # JSON, file://
    # A figure is a long base64 text, which may contain a short path by chance.
    pattern = (r"(?<![A-Za-z0-9+/]{9})(?:" + "|".join(map(re.escape, spellings))
               + r")(?![\w-]|\.\w)")
    text = path.read_bytes()
    hidden = re.sub(pattern.encode(), b"~", text)
    if hidden != text:
        path.write_bytes(hidden)

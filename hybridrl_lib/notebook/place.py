"""Where a notebook runs: its preset, whether anyone watches, and the files it writes."""

import os
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from IPython import get_ipython

from ..config.presets import (
    default_experiment,
    difference,
    load_settings,
    resolve_preset,
    smoke_from_environment,
)
from ..records.folders import experiment_folder, from_here, project_folder
from ..records.run_folder import RunFolder
from ..report.style import RC
from ..system.errors import printable, show_in_one_sentence


def is_headless() -> bool:
    """Whether nobody watches, so that plain lines replace the live view.

    `HYBRIDRL_HEADLESS` decides if it is set (0: somebody watches). Otherwise tests, CI jobs, and
    Python outside a notebook count as headless.
    """
    said = os.environ.get("HYBRIDRL_HEADLESS", "")
    if said:
        return said != "0"
    if os.environ.get("CI") or os.environ.get("PYTEST_CURRENT_TEST"):
        return True
    return not hasattr(get_ipython(), "kernel")


def begin(preset: str, seed: int, experiment: str, settings: str) -> str:
    """Prints what the parameters mean and returns the preset's resolved name.

    It also shows a `UserError` as one sentence, gives figures the report's style, and hides the
    progress bars of model loading.

    Raises:
        UsageError: an unknown preset or setting.
    """
    show_in_one_sentence()
    _quiet_model_loading()
    matplotlib.rcParams.update({key: value for key, value in RC.items() if key != "savefig.dpi"})
    name = resolve_preset(preset)
    chosen = load_settings(name, settings)
    why = {"colab": " (auto: there is a GPU)", "tiny": " (auto: there is no GPU)"}
    print(f"preset {name}{why.get(name, '') if preset == 'auto' else ''}, seed {seed}, "
          f"model {chosen.model.path}, benchmarks {' and '.join(chosen.data.benchmarks)}")
    changes = difference(load_settings(name), chosen)
    if changes:
        print("changed: " + "; ".join(changes))
    if smoke_from_environment():
        print("HYBRIDRL_SMOKE is set: budgets are tiny and scores mean nothing.")
    print(f"new records go to {readable(experiment_path(name, experiment))}")
    return name


def experiment_path(preset: str, experiment: str = "") -> Path:
    """The folder of an experiment's new runs, relative to here if that is shorter."""
    return from_here(experiment_folder(experiment or default_experiment(preset)))


def readable(path: Path) -> str:
    """A path relative to the project's folder, without folders of this machine."""
    full = path.resolve()
    for root, name in ((project_folder(), ""),
                       (Path(os.environ.get("HYBRIDRL_RESULTS_DIR") or "/nowhere").expanduser(),
                        "$HYBRIDRL_RESULTS_DIR")):
        if full.is_relative_to(root.resolve()):
            return (Path(name) / full.relative_to(root.resolve())).as_posix()
    return full.name


def list_files(*where: RunFolder | Path | Iterable[Path]) -> None:
    """Lists the files that a notebook wrote, with their sizes."""
    files: list[Path] = []
    for place in where:
        if isinstance(place, RunFolder | Path):
            root = place.path if isinstance(place, RunFolder) else place
            files += sorted(path for path in root.rglob("*")
                            if path.is_file() and not path.name.startswith("."))
        else:
            files += sorted(place)
    for path in files:
        print(f"{printable(readable(path))}  ({path.stat().st_size / 1000:,.1f} kB)")


def _quiet_model_loading() -> None:
    """Hides the progress bars of loading; those of downloads stay if somebody watches."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of both libraries
    if not is_headless():
        enable_progress_bars()

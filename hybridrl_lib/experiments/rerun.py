"""Runs a recorded run again and compares the answers."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..config.presets import describe, settings_from_dict
from ..records.files import log_bytes
from ..records.folders import experiment_folder
from ..records.run_folder import ANSWERS, RunFolder, run_folder
from ..system.errors import UserError
from .run import run


def rerun(manifest: Path, experiment: str | None = None, settings: Sequence[str] = ()) -> int:
    """Runs a recorded run again into a new experiment and says whether the answers are the same.

    Settings, seed, and number of threads are the record's. Code, versions, and machine are the
    present ones; differences are printed.

    Args:
        manifest: manifest.json or config.json of a run, or its folder.
        experiment: where the second run goes; default: the first one's name with `-rerun`.
        settings: differences from the recorded ones, such as `model.path` if the model's file is
            somewhere else now.

    Returns:
        0 if the file of answers is identical, 1 if not.

    Raises:
        UserError: there is no such record, or it is not finished.
    """
    first = RunFolder(manifest.parent if manifest.suffix == ".json" else manifest)
    config, record = first.read("config.json"), first.read("manifest.json")
    if not config or not record or log_bytes(first.path / ANSWERS) is None:
        raise UserError(f"There is no finished run in {first.path} (config.json, manifest.json, "
                        f"and {ANSWERS}); name the manifest.json of one.")
    missing = [name for name in ("setup", "preset", "seed", "experiment", "settings")
               if name not in config]
    threads = record.get("threads")
    if missing or not (threads is None or isinstance(threads, int) and 1 <= threads <= 1024):
        raise UserError(f"The record in {first.path} is damaged ("
                        + (f"config.json lacks {', '.join(missing)}" if missing else
                           f"threads cannot be {threads!r}") + "); restore it from its source.")
    # With micro_batch_tokens=0, the first run's choice: another size adds in another order.
    chosen = config.get("micro_batch_tokens")
    overrides = [*(f"{key}={value}" for key, value, _ in
                   describe(settings_from_dict(config["settings"]))),
                 *([f"training.micro_batch_tokens={chosen}"] if isinstance(chosen, int) else ()),
                 *settings]
    experiment = experiment or f"{config['experiment']}-rerun"
    # These names come from somebody's record: none of them may lead out of the results folder.
    second = run_folder(experiment_folder(experiment), config["setup"], config["seed"])
    if second.path.resolve() == first.path.resolve():
        raise UserError("The second run would overwrite the first one; choose another "
                        "--experiment.")
    torch.set_num_threads(threads or torch.get_num_threads())
    return compare_answers(first, run(config["setup"], config["preset"], config["seed"],
                                      experiment, overrides))


def compare_answers(first: RunFolder, second: RunFolder) -> int:
    """Says whether two runs' answers are the same; if not, what else differs between the runs."""
    if log_bytes(first.path / ANSWERS) == log_bytes(second.path / ANSWERS):
        print(f"{ANSWERS} is identical: {second.path} has the same answers as {first.path}")
        return 0
    mine, theirs = first.lines(ANSWERS), second.lines(ANSWERS)
    changed = sum(one != other for one, other in zip(mine, theirs, strict=False))
    changed += abs(len(mine) - len(theirs))
    print(f"{ANSWERS} differs in {changed} of {len(mine)} lines")
    for name, before, after in differences(first, second):
        print(f"  {name}: {before} -> {after}")
    return 1


def differences(first: RunFolder, second: RunFolder) -> list[tuple[str, str, str]]:
    """(what, first, second) for each circumstance in which two runs differ."""
    one, other = first.read("manifest.json") or {}, second.read("manifest.json") or {}
    names = ("git_commit", "git_dirty", "numerics_version", "versions", "device", "precision",
             "threads", "model", "data")
    return [(name, str(one.get(name)), str(other.get(name))) for name in names
            if one.get(name) != other.get(name)]

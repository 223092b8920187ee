"""The same run again, and whether it gave the same answers."""

from collections.abc import Sequence
from pathlib import Path

from ..config.presets import describe, settings_from_dict
from ..records.files import log_bytes
from ..records.folders import experiment_folder
from ..records.run_folder import ANSWERS, RunFolder, run_folder
from ..system.errors import UserError


def rerun(manifest: Path, experiment: str | None = None, settings: Sequence[str] = ()) -> int:
    """Runs a recorded run again into an experiment of its own and says if the answers are the same.

    Settings, seed and number of threads are the record's; code, versions and machine are those at
    hand, and where they differ it is said.

    Args:
        manifest: manifest.json or config.json of a run, or its folder.
        experiment: where the second run goes; the first one's name with `-rerun` unless given.
        settings: differences from the recorded ones, above all `model.path` where the model's
            file lies elsewhere now.

    Returns:
        0 if the file of answers is the same to the byte, 1 if not.

    Raises:
        UserError: there is no such record, or it is not finished.
    """
    first = RunFolder(manifest.parent if manifest.suffix == ".json" else manifest)
    config, record = first.read("config.json"), first.read("manifest.json")
    if not config or not record or log_bytes(first.path / ANSWERS) is None:
        raise UserError(f"There is no finished run in {first.path} (config.json, manifest.json and "
                        f"{ANSWERS}); name the manifest.json of one.")
    missing = [name for name in ("setup", "preset", "seed", "experiment", "settings")
               if name not in config]
    threads = record.get("threads")
    if missing or not (threads is None or isinstance(threads, int) and 1 <= threads <= 1024):
        raise UserError(f"The record in {first.path} is damaged ("
                        + (f"config.json lacks {', '.join(missing)}" if missing else
                           f"threads cannot be {threads!r}") + "); get it back from where it came.")
    # Of micro_batch_tokens=0 what the first run made: another size adds in another order.
    chosen = config.get("micro_batch_tokens")
    overrides = [*(f"{key}={value}" for key, value, _ in
                   describe(settings_from_dict(config["settings"]))),
                 *([f"training.micro_batch_tokens={chosen}"] if isinstance(chosen, int) else ()),
                 *settings]
    experiment = experiment or f"{config['experiment']}-rerun"
    # Somebody's record names these: none of them may lead out of the results.
    second = run_folder(experiment_folder(experiment), config["setup"], config["seed"])
    if second.path.resolve() == first.path.resolve():
        raise UserError("The second run would be the first one itself; choose another "
                        "--experiment.")

    import torch

    from .run import run

    torch.set_num_threads(threads or torch.get_num_threads())
    return compare(first, run(config["setup"], config["preset"], config["seed"], experiment,
                              overrides))


def compare(first: RunFolder, second: RunFolder) -> int:
    """Says if two runs' answers are the same; if not, what else differs between the two."""
    if log_bytes(first.path / ANSWERS) == log_bytes(second.path / ANSWERS):
        print(f"{ANSWERS} is identical: every answer of {second.path} is that of {first.path}")
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

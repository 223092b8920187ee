"""Claims a run's folder, or refuses one that holds another run."""

from ..config.presets import MEMORY_ALONE, difference, settings_from_dict
from ..config.settings import Settings
from ..machine.memory import with_micro_batches
from ..records.run_folder import RunFolder
from ..system.errors import UserError


def claim(folder: RunFolder, config: dict, settings: Settings) -> None:
    """Writes config.json, or refuses a folder that holds a run with other settings.

    A run that left nothing, for example because of a misspelled model.path, does not count. One
    that ran out of memory may resume with other memory settings, which config.json then has.
    """
    before = folder.read("config.json")
    if before is None or not folder.has_begun:
        folder.write("config.json", config)
        return
    run = (f"The run {folder.path.parent.name}/{folder.path.name} of experiment "
           f"{config['experiment']}")
    old = settings_from_dict(before["settings"])
    if others := difference(old, settings, ignored=MEMORY_ALONE):
        raise UserError(f"{run} was made with other settings ({'; '.join(others)}); choose "
                        "another --experiment or delete its folder.")
    folder.refuse_other_numerics(config["experiment"])
    if (changes := difference(old, settings)) and not folder.is_complete:
        after = before | {"settings": config["settings"],
                          "memory_changes": [*before.get("memory_changes", ()), *changes]}
        if any(change.startswith("training.micro_batch_tokens") for change in changes):
            after.pop("micro_batch_tokens", None)  # the run's own choice
        folder.write("config.json", after)


def refuse_altered(folder: RunFolder) -> None:
    """Refuses a finished run whose files were changed."""
    if altered := folder.altered():
        raise UserError(f"{altered[0]} of the finished run {folder.path.parent.name}/"
                        f"{folder.path.name} is damaged or was changed (its checksum differs); "
                        "restore it from a copy, or delete the run's folder and run it again.")


def with_kept_micro_batches(settings: Settings, folder: RunFolder) -> Settings:
    """Keeps the micro-batches of a resumed run, whatever memory is free now."""
    kept = folder.read("config.json").get("micro_batch_tokens")
    known = isinstance(kept, int) and kept > 0 and folder.has_begun
    return settings if settings.training.micro_batch_tokens or not known else with_micro_batches(
        settings, kept)

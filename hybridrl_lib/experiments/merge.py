"""Merges the adapter of a LoRA run into its base model."""

from pathlib import Path

from ..config.sections import ModelSettings
from ..policy.adapters import CONFIG
from ..policy.loading import load_policy
from ..records.files import write_folder
from ..report.card import merged_card
from ..system.errors import UserError


def merge(run: Path, out: Path) -> Path:
    """Writes the whole model of a LoRA run: its adapter merged into the base weights, in fp32.

    Args:
        run: a run's folder, or an adapter folder.
        out: a new folder.

    Returns:
        The adapter folder.

    Raises:
        UserError: there is no adapter, its base model is missing, or `out` exists.
    """
    folder = next((f for f in (run, run / "checkpoint" / "final") if (f / CONFIG).is_file()), None)
    if folder is None:
        whole = run / "checkpoint" / "final"
        raise UserError(
            f"{whole} already holds a whole model; use that folder as it is."
            if (whole / "config.json").is_file() else
            f"There is no adapter in {run}; name the folder of a finished run with "
            "model.adapter=lora, or of an adapter.")
    if out.exists():
        raise UserError(f"{out} exists; choose a new folder.")
    policy = load_policy(ModelSettings(path=str(folder), device="cpu", precision="fp32"))

    def save(final: Path) -> None:
        policy.save(final)
        card = folder / "README.md"
        if card.is_file():
            (final / "README.md").write_text(merged_card(card.read_text(encoding="utf-8")),
                                             encoding="utf-8")

    write_folder(out, save)
    return folder

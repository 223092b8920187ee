"""The model card of a trained model, from its manifest: what it is, its data, its scores."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..config.presets import describe, difference, load_settings, settings_from_dict
from ..setups import SETUPS
from ..system.errors import UserError, printable
from .statistics import mean_interval

# Of the presets' models; for others the license is read from their model cards.
LICENSES = {"Qwen/Qwen2.5-0.5B": "apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
            "tiny": "mit"}
OF_PEFT, OF_TRANSFORMERS = "library_name: peft", "library_name: transformers"
APART = ", as a LoRA adapter: `hybridrl merge` adds it into the weights."


def write_card(folder: Path, manifest: dict, config: dict, rows: Sequence[dict]) -> None:
    """Writes README.md into the folder of a saved model.

    Args:
        manifest, config: of the run.
        rows: of its eval.jsonl.
    """
    (folder / "README.md").write_text(card(manifest, config, rows), encoding="utf-8")


def card(manifest: dict, config: dict, rows: Sequence[dict]) -> str:
    """The text of the card."""
    settings, setup = settings_from_dict(config["settings"]), SETUPS[config["setup"]]
    model, path = manifest["model"], Path(settings.model.path).expanduser()
    base = model["name"] if path.exists() else settings.model.path
    license = license_of(settings.model.path)
    adapter = settings.model.adapter == "lora" and setup.method != "bridge"  # saved as a whole
    head = ["---", f"license: {license}", OF_PEFT if adapter else OF_TRANSFORMERS]
    if base == settings.model.path != "tiny":
        head.append(f"base_model: {base}")
    changed = changes(config["preset"], settings, setup, base)
    commit = manifest["git_commit"] or "unknown"
    lines = [
        *head, "---", "", f"# {model['name']}, {setup.title}", "",
        f"{model['name']} {f'trained by {setup.title}' if setup.stages else 'as it is'} (setup "
        f"`{setup.name}`, preset `{config['preset']}`, seed {config['seed']}) with hybridrl_lib"
        + (APART if adapter else "."),
        "", "| | |", "| --- | --- |",
        f"| base model | {cell(base)}, sha256 {model['sha256']} |",
        f"| weights | {model['parameters']:,}, of which "
        f"{model['trained_parameters'] if setup.stages else 0:,} were trained |",
        f"| license | {'that of the base model: ' if license != 'unknown' else ''}{license} |",
        *(f"| data: {cell(name)} | {cell(entry['problems'])}, revision "
          f"{cell(entry['revision'] or 'none')} |" for name, entry in manifest["data"].items()),
        f"| trained | {manifest['steps']} steps, {sum(manifest['tokens'].values()):,} tokens, "
        f"{manifest['precision']}, {manifest['seconds/wall'] / 60:.1f} min on "
        f"{cell(manifest['device'])} |",
        f"| commit | {commit}{' with changes' if manifest['git_dirty'] else ''} |",
        "", "## Scores", "",
        "Exact match of one greedy answer on test problems in percent [95 % interval over the "
        "problems].", "", "| benchmark | problems | exact match |", "| --- | ---: | ---: |",
        *score_lines(rows), "", "## Settings that differ from the preset", "",
        *([f"* `{printable(line).replace('`', ' ')}`" for line in changed] or ["None."]), ""]
    return "\n".join(lines)


def merged_card(text: str) -> str:
    """The card of a LoRA run for the merged model."""
    return text.replace(OF_PEFT, OF_TRANSFORMERS).replace(
        APART, ", as a LoRA adapter that was merged into the weights.")


def changes(preset: str, settings, setup, base: str) -> list[str]:
    """`key: value of the preset -> value of the run`; all settings if the preset is gone."""
    try:
        lines = difference(load_settings(preset, smoke=False, setup=setup), settings)
    except UserError:
        lines = [f"{key}: {value}" for key, value, _ in describe(settings)]
    return [line.replace(settings.model.path, base) if line.startswith("model.path") else line
            for line in lines]


def score_lines(rows: Sequence[dict]) -> list[str]:
    """A line of the table per benchmark."""
    right: dict[str, list[bool]] = {}
    for row in rows:
        if row["part"] == "test" and row["checkpoint"] == "last":
            right.setdefault(row["benchmark"], []).append(bool(row["greedy"]["strict"]))
    lines = []
    for name, values in right.items():
        found = mean_interval([[float(value) for value in values]])
        lines.append(f"| {cell(name)} | {len(values)} | {100 * found.mean:.1f} "
                     f"[{100 * found.low:.1f}, {100 * found.high:.1f}] |")
    return lines


def license_of(path: str) -> str:
    """The license stated by a base model's card, or `unknown`."""
    if path in LICENSES:
        return LICENSES[path]
    try:
        text = (Path(path).expanduser() / "README.md").read_text(encoding="utf-8")[:20_000]
    except (OSError, ValueError):
        return "unknown"
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license: *([\w.+-]{1,60}) *$", front[1], re.MULTILINE) if front else None
    return found[1] if found else "unknown"


def cell(value: object) -> str:
    """A value for a table cell: `{train: 4}` becomes `train 4`."""
    if isinstance(value, dict):
        value = ", ".join(f"{key} {count}" for key, count in value.items())
    return re.sub(r"[|`<>\n]", " ", printable(value))

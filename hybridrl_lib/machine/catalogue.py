"""What can be run and what it costs: `hybridrl list`. No torch needed.

Steps and samples follow from the settings. Minutes are those of published runs, with their device.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config.methods import METHODS
from ..config.presets import PRESET_FOLDER, load_settings, preset_names
from ..config.settings import Settings
from ..problems.tiny import SYMBOLIC_COUNT, WORD_COUNT
from ..records.folders import published_folder
from ..report.text import plain_table
from ..setups import SETUPS, Setup

NOT_MEASURED = "not measured"
ROWS = {"gsm8k": 8792, "math500": 500,  # training and test files together
        "tiny_word": WORD_COUNT, "tiny_symbolic": SYMBOLIC_COUNT}


@dataclass(frozen=True)
class Measured:
    """The mean time of published runs of a setup at a preset.

    Attributes:
        device: the machine, in words.
        runs: number of runs.
        minutes: wall time of a run, including evaluation.
    """

    device: str
    runs: int
    minutes: float


@dataclass(frozen=True)
class Cost:
    """What one run of a setup at a preset costs.

    Attributes:
        steps: of the training loop.
        demonstrations: reference solutions learned from, counted in each epoch; None = as needed.
        rollouts: answers sampled to learn from.
        measured: time of published runs, if there are any.
    """

    steps: int
    demonstrations: int | None
    rollouts: int
    measured: tuple[Measured, ...]


def training_problems(settings: Settings) -> int:
    """Maximum number of training problems, before repeated and over-long ones are left out."""
    data, total = settings.data, 0
    for position, name in enumerate(data.benchmarks):
        training = round(data.train_fraction * ROWS[name])
        training -= round(data.validation_fraction * training)
        total += min(training, data.train_limits[position]) if data.train_limits else training
    return total


def cost(setup: Setup, settings: Settings, measured: tuple[Measured, ...] = ()) -> Cost:
    """The cost of a run of the setup with these settings."""
    problems, method = training_problems(settings), settings.method
    steps = demonstrations = rollouts = 0
    for name, epochs in method.stages(setup, settings.training.epochs):
        batch = settings.sft.batch_size if name == "sft" else settings.rl.prompts_per_step
        steps += epochs * math.ceil(problems / batch)
        if name == "sft" or method.demonstrations == "every step":
            demonstrations += epochs * problems
        if name == "rl":
            rollouts += epochs * problems * settings.rl.group_size
    return Cost(steps, None if method.demonstrations == "as needed" else demonstrations, rollouts,
                measured)


def read_measured(published: Path) -> dict[tuple[str, str], tuple[Measured, ...]]:
    """{(preset, setup): time of its published runs}, without interrupted runs.

    Only the experiment named like the preset has its settings.
    """
    minutes: dict[tuple[str, str, str], list[float]] = {}
    for path in sorted(path for name in preset_names()
                       for path in published.glob(f"{name}/*/seed-*/manifest.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            preset, setup = path.parts[-4:-2]
            if manifest["complete"] and not manifest["resumed_from"]:
                minutes.setdefault((preset, setup, str(manifest["device"])), []).append(
                    float(manifest["seconds/wall"]) / 60)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the report names broken records; here they do not count
    found: dict[tuple[str, str], tuple[Measured, ...]] = {}
    for (preset, setup, device), values in minutes.items():
        found[preset, setup] = (*found.get((preset, setup), ()), Measured(
            device, len(values), round(sum(values) / len(values), 2)))
    return found


def preset_description(name: str) -> str:
    """The comment at the top of a preset's file."""
    lines = (PRESET_FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment)


def catalogue() -> dict:
    """Setups, methods, and presets as plain data, for `hybridrl list --json`."""
    measured = read_measured(published_folder())
    presets = []
    for name in preset_names():
        settings = load_settings(name, smoke=False)
        presets.append({
            "name": name, "description": preset_description(name), "model": settings.model.path,
            "benchmarks": list(settings.data.benchmarks),
            "training_problems": training_problems(settings), "epochs": settings.training.epochs,
            "costs": {setup.name: asdict(cost(
                setup, load_settings(name, smoke=False, setup=setup),
                measured.get((name, setup.name), ()))) for setup in SETUPS.values()}})
    return {
        "setups": [{"name": setup.name, "title": setup.title, "method": setup.method,
                    "stages": list(setup.stages), "entropy": setup.entropy,
                    "notebook": f"notebooks/{setup.notebook}.ipynb" if setup.notebook else None,
                    "paper": setup.paper} for setup in SETUPS.values()],
        "methods": [{"name": name, "description": (cls.__doc__ or "").strip().split("\n")[0]}
                    for name, cls in METHODS.items()], "presets": presets}


def render(listing: dict) -> str:
    """The catalogue as text for the terminal."""
    setups = [[row["name"], row["title"], row["method"],
               " then ".join(row["stages"]) or "evaluated only", row["notebook"] or "-"]
              for row in listing["setups"]]
    parts = ["Setups (hybridrl run SETUP)\n",
             plain_table(["setup", "in tables", "method", "stages", "notebook"], setups, ()),
             "\nMethods\n",
             plain_table(["method", "what it is"],
                     [[row["name"], row["description"]] for row in listing["methods"]], ()),
             "\nPresets (--preset NAME), with what one run of a setup costs at most"]
    for preset in listing["presets"]:
        rows = [[name, f"{entry['steps']:,}",
                 "as needed" if entry["demonstrations"] is None else f"{entry['demonstrations']:,}",
                 f"{entry['rollouts']:,}", minutes(entry["measured"])]
                for name, entry in preset["costs"].items()]
        parts += [f"\n{preset['name']}: {preset['description']}",
                  f"  model {preset['model']}, {' + '.join(preset['benchmarks'])}, "
                  f"{preset['training_problems']:,} training problems, {preset['epochs']} epochs\n",
                  plain_table(["setup", "steps", "demonstrations", "sampled answers", "wall time"],
                          rows, right=(1, 2, 3))]
    return "\n".join(parts)


def minutes(measured: list[dict] | tuple[dict, ...]) -> str:
    """`1.4 min (CPU: ..., 5 runs)`, or that it was not measured."""
    return "; ".join(f"{entry['minutes']:.1f} min ({entry['device']}, "
                     f"{entry['runs']} run{'s' if entry['runs'] > 1 else ''})"
                     for entry in measured) or NOT_MEASURED

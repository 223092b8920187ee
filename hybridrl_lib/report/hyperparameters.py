"""The table of everything needed to repeat the runs, out of their config.json."""

import math
from collections.abc import Iterable
from typing import Any

from ..config.fields import show
from ..config.presets import describe, load_settings, parse_overrides, settings_from_dict
from ..setups import SETUPS
from ..system.errors import UserError
from .loading import Experiment, Run, setup_title
from .text import NOTHING, bullets, code_span, literal, markdown_table

# the paper's symbol, what it is, the settings that hold it
SYMBOLS = (
    ("ε", "clip range of the ratio", ("rl.epsilon_low", "rl.epsilon_high")),
    ("β", "weight of the KL divergence", ("rl.beta", "rl.kl_anchor")),
    ("γ in SFT", "weight of the entropy (setups with entropy regularization; 0 in the others)",
     ("sft.gamma",)),
    ("γ in RL", "weight of the entropy (setups with entropy regularization; 0 in the others)",
     ("rl.gamma",)),
    ("learning_rate in SFT", "before decay and warm-up, see below", ("sft.learning_rate",)),
    ("learning_rate in RL", "before decay and warm-up, see below", ("rl.learning_rate",)),
    ("batch_size in SFT", "reference solutions a step, which is one optimizer update",
     ("sft.batch_size",)),
    ("batch_size in RL", "problems a step, and the optimizer updates that consume its rollouts",
     ("rl.prompts_per_step", "rl.updates_per_rollout")),
    ("k, G", "completions a problem", ("rl.group_size",)),
    ("sft_epochs, rl_epochs", "epochs in all; two stages share them", ("training.epochs",)),
    ("T", "longest completion (tokens)", ("rl.max_new_tokens",)),
)

ADVANTAGE_EPSILON = 1e-4
ADAM_EPSILON = 1e-8
LARGEST_LOG_RATIO = 20.0
# no settings: what it is, its value; tests hold them against the code, which needs torch
FIXED = (
    ("reward of a completion", "1 if it is right by the strict rule, 0 otherwise"),
    ("advantage", f"(reward − mean) / (deviation of the group, G − 1 in its denominator, + "
                  f"{ADVANTAGE_EPSILON:g}); `rl.advantage_scale=none` leaves out the division"),
    ("largest absolute log ratio before exp (ratio and KL)", f"{LARGEST_LOG_RATIO:g}"),
    ("optimizer", f"AdamW with ε = {ADAM_EPSILON:g}, a fresh one in each stage"),
    ("learning rate at step s = 0 … S − 1 of a stage",
     "learning_rate · min(1, (s + 1) / w) · (f + (1 − f)(1 − s / S)) with w = "
     "`training.warmup_steps` (1 for 0) and f = `training.final_learning_rate_fraction`; the same "
     "in all updates of a step"),
)
STEPS = (("reward where `rl.reward=answer_and_steps`",
          "1 if, besides, no written equation is false and, where the reference solution reaches "
          "its answer by an equation, so does the completion"),)


def hyperparameters_markdown(experiment: Experiment) -> str:
    """λ by setup, the paper's symbols with their values, and every setting with its meaning."""
    configs = [run.config for run in experiment.runs if run.config.get("settings")]
    parts = [f"# Settings, experiment `{experiment.name}`\n"]
    if not configs:
        return "\n".join([*parts, "No run of this experiment has a config.json.\n"])
    flat = [_flatten(config["settings"]) for config in configs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    values = {key: literal(_one_or_all([entry.get(key) for entry in flat])) for key in keys}
    presets = sorted({literal(config.get("preset")) for config in configs if config.get("preset")})
    if presets:
        parts.append(f"Preset: {', '.join(presets)}. Every value as the runs recorded it.\n")
    parts += ["## Weights of the losses by setup\n", _lambda_table(experiment, values),
              "## The paper's symbols\n", _symbol_table(values),
              "## Fixed in code\n", markdown_table(["what", "value"], [
                  *FIXED, *(STEPS if "answer_and_steps" in values.get("rl.reward", "") else ())]),
              "## All settings\n",
              markdown_table(["setting", "value", "meaning"], _setting_rows(configs[0], values))]
    mixed = [key for key in keys if len({show(entry.get(key)) for entry in flat}) > 1]
    if mixed:
        parts.append(bullets([f"The runs do not agree on {', '.join(map(code_span, mixed))}: "
                              "all their values are shown, and the setups are not compared like "
                              "for like."]))
    return "\n".join(parts)


def _lambda_table(experiment: Experiment, values: dict[str, str]) -> str:
    """λ_SFT and λ_RL in each stage as the step logs recorded them, and γ."""
    rows = []
    for setup in experiment.setups:
        if setup == "base":
            continue
        run = experiment.of(setup)[0]
        stages = list(dict.fromkeys(line["stage"] for line in run.metrics if line.get("stage")))
        known = SETUPS.get(setup)
        for stage in stages:
            lines = [line for line in run.metrics if line.get("stage") == stage]
            entropy = values.get(f"{stage}.gamma", NOTHING) if known and known.entropy else \
                "0" if known else NOTHING
            if any("gamma" in line for line in lines):
                entropy = _lambda(lines, "gamma")
            rows.append([setup_title(setup), stage, _epochs(lines, run.metrics), str(len(lines)),
                         _updates(experiment.of(setup), stage), _lambda(lines, "lambda/sft"),
                         _lambda(lines, "lambda/rl"), entropy])
    header = ["setup", "stage", "epochs", "steps", "optimizer updates", "λ_SFT", "λ_RL", "γ"]
    return markdown_table(header, rows, range(2, 8)) + "\n" + bullets((
        "A step of SFT is one batch and one optimizer update. A step of RL is one batch of "
        "rollouts, consumed in `rl.updates_per_rollout` optimizer updates.",
        "Updates are those that were made, lowest to highest over the seeds: a mini-batch without "
        "a gradient, since each of its groups is all right or all wrong, is left out."))


def _updates(runs: tuple[Run, ...], stage: str) -> str:
    """Optimizer updates of a stage, the range over runs where they differ; a dash if not logged."""
    sums = [sum(line["updates"] for line in lines) for run in runs
            if (lines := [line for line in run.metrics if line.get("stage") == stage])
            and all("updates" in line for line in lines)]
    return " to ".join(map(str, dict.fromkeys((min(sums), max(sums))))) if sums else NOTHING


def _epochs(lines: list[dict[str, Any]], everything: list[dict[str, Any]]) -> str:
    """How many epochs a stage lasted."""
    end = max(line["epoch"] for line in lines)
    first = min(line["step"] for line in lines)
    start = max((line["epoch"] for line in everything if line["step"] < first), default=0.0)
    return f"{end - start:.3g}"


def _lambda(lines: list[dict[str, Any]], key: str) -> str:
    """A weight's value, or its range where a method moves it; 0 where it was not logged."""
    found = [float(line.get(key) or 0.0) for line in lines]
    low, high = min(found), max(found)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _symbol_table(values: dict[str, str]) -> str:
    rows = [[symbol, meaning, ", ".join(f"`{key}` = {values[key]}" for key in keys)]
            for symbol, meaning, keys in SYMBOLS if all(key in values for key in keys)]
    return markdown_table(["paper", "meaning", "here"], rows)


def changes_of(runs: Iterable[Run], tuned: bool = False) -> list[str]:
    """`training.epochs=4 (preset tiny: 10)` of every setting that all runs have otherwise than
    their preset says, but for those whose setup sets it itself or whose method lacks it; nothing
    where a record is of another version.

    Args:
        tuned: leaves out learning rates, which are then shown elsewhere.
    """
    found: dict[str, set[str]] = {}
    for run in runs:
        setup, both = SETUPS.get(run.setup), _beside_preset(run)
        if both is None:
            return []
        fixed = parse_overrides(setup.settings) if setup else {}
        for key, (value, usual) in both.items():
            if key not in fixed and not (tuned and key.endswith("learning_rate")):
                found.setdefault(key, set()).add("" if value == usual else (
                    f"{code_span(f'{key}={value}')} (preset {run.config['preset']}: "
                    f"{code_span(usual)})"))
    return [text for texts in found.values() if len(texts) == 1 for text in texts if text]


def changed(run: Run) -> float:
    """How many settings a run has otherwise than its preset and setup; inf if that is not known."""
    both = _beside_preset(run)
    return math.inf if both is None else sum(value != usual for value, usual in both.values())


def _beside_preset(run: Run) -> dict[str, tuple[str, str]] | None:
    """{key: (value of the run, that of its preset and setup)}; None for another version's."""
    try:
        mine = settings_from_dict(run.config.get("settings") or {})
        usual = load_settings(str(run.config.get("preset")), smoke=False,
                              setup=SETUPS.get(run.setup))
    except UserError:
        return None
    before = {key: value for key, value, _ in describe(usual)}
    return {key: (value, before[key]) for key, value, _ in describe(mine) if key in before}


def own_settings_of(experiment: Experiment, setup: str, baseline: str) -> list[str] | None:
    """Pieces of Markdown: `rl.clip=false` of every setting that a setup has otherwise than the
    baseline, but learning rates and its method's own; None where either has no run."""
    pair = [experiment.of(name) for name in (setup, baseline)]
    if not all(pair):
        return None
    mine, theirs = (_flatten(runs[0].config.get("settings") or {}) for runs in pair)
    entropy = [SETUPS[name].entropy for name in (setup, baseline)]
    return [*(code_span(f"{key}={show(value)}") for key, value in mine.items()
              if key in theirs and value != theirs[key] and not key.endswith("learning_rate")),
            *(("the term −γH",) if entropy == [True, False] else ())]


def _setting_rows(config: dict[str, Any], values: dict[str, str]) -> list[list[str]]:
    """(key, value, meaning); records of another version may hold keys that have no meaning here."""
    meanings: dict[str, str] = {}
    try:
        meanings = {key: meaning
                    for key, _, meaning in describe(settings_from_dict(config["settings"]))}
    except UserError:
        pass
    return [[code_span(key), value, meanings.get(key, NOTHING)] for key, value in values.items()]


def _flatten(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in settings.items()
            for key, value in values.items()}


def _one_or_all(found: list[Any]) -> str:
    return " / ".join(dict.fromkeys(map(show, found)))

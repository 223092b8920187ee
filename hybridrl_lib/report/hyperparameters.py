"""The table of all settings needed to repeat the runs, from their config.json."""

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
    ("γ in SFT", "weight of the entropy (0 in setups without entropy regularization)",
     ("sft.gamma",)),
    ("γ in RL", "weight of the entropy (0 in setups without entropy regularization)",
     ("rl.gamma",)),
    ("learning_rate in SFT", "before decay and warm-up, see below", ("sft.learning_rate",)),
    ("learning_rate in RL", "before decay and warm-up, see below", ("rl.learning_rate",)),
    ("batch_size in SFT", "reference solutions per step (one optimizer update)",
     ("sft.batch_size",)),
    ("batch_size in RL", "problems per step, and optimizer updates on its rollouts",
     ("rl.prompts_per_step", "rl.updates_per_rollout")),
    ("k, G", "completions per problem", ("rl.group_size",)),
    ("sft_epochs, rl_epochs", "all epochs; two stages share them", ("training.epochs",)),
    ("T", "maximum length of a completion in tokens", ("rl.max_new_tokens",)),
)

ADVANTAGE_EPSILON = 1e-4
ADAM_EPSILON = 1e-8
LARGEST_LOG_RATIO = 20.0
# Constants in the code; tests check them against it, since it needs torch.
FIXED = (
    ("reward of a completion", "1 if it is correct by the strict rule, else 0"),
    ("advantage", f"(reward − mean) / (standard deviation of the group with G − 1 + "
                  f"{ADVANTAGE_EPSILON:g}); `rl.advantage_scale=none` omits the division"),
    ("largest absolute log ratio before exp (ratio and KL)", f"{LARGEST_LOG_RATIO:g}"),
    ("optimizer", f"AdamW with ε = {ADAM_EPSILON:g}, a new one in each stage"),
    ("learning rate at step s = 0 … S − 1 of a stage",
     "learning_rate · min(1, (s + 1) / w) · (f + (1 − f)(1 − s / S)) with w = "
     "`training.warmup_steps` (1 for 0) and f = `training.final_learning_rate_fraction`; constant "
     "over the updates of a step"),
)
STEPS = (("reward with `rl.reward=answer_and_steps`",
          "1 if, in addition, no equation in the completion is false, and the completion reaches "
          "its answer by an equation if the reference solution does"),)


def hyperparameters_markdown(experiment: Experiment) -> str:
    """λ per setup, the paper's symbols with their values, and all settings with their meaning."""
    configs = [run.config for run in experiment.runs if run.config.get("settings")]
    parts = [f"# Settings, experiment `{experiment.name}`\n"]
    if not configs:
        return "\n".join([*parts, "No run of this experiment has a config.json.\n"])
    flat = [_flatten(config["settings"]) for config in configs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    values = {key: literal(_one_or_all([entry.get(key) for entry in flat])) for key in keys}
    presets = sorted({literal(config.get("preset")) for config in configs if config.get("preset")})
    if presets:
        parts.append(f"Preset: {', '.join(presets)}. Values as recorded by the runs.\n")
    parts += ["## Loss weights per setup\n", _lambda_table(experiment, values),
              "## The paper's symbols\n", _symbol_table(values),
              "## Constants in the code\n", markdown_table(["constant", "value"], [
                  *FIXED, *(STEPS if "answer_and_steps" in values.get("rl.reward", "") else ())]),
              "## All settings\n",
              markdown_table(["setting", "value", "meaning"], _setting_rows(configs[0], values))]
    mixed = [key for key in keys if len({show(entry.get(key)) for entry in flat}) > 1]
    if mixed:
        parts.append(bullets([f"The runs differ in {', '.join(map(code_span, mixed))}; all values "
                              "are shown. The setups are not directly comparable."]))
    return "\n".join(parts)


def _lambda_table(experiment: Experiment, values: dict[str, str]) -> str:
    """λ_SFT and λ_RL in each stage, from the step logs, and γ."""
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
        "rollouts with `rl.updates_per_rollout` optimizer updates.",
        "Updates are those that were made, lowest to highest over the seeds. A mini-batch without "
        "a gradient, because each of its groups is all correct or all wrong, makes none."))


def _updates(runs: tuple[Run, ...], stage: str) -> str:
    """Optimizer updates of a stage, a range if runs differ; a dash if not logged."""
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
    """A weight's value, or its range if a method changes it; 0 if it was not logged."""
    found = [float(line.get(key) or 0.0) for line in lines]
    low, high = min(found), max(found)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _symbol_table(values: dict[str, str]) -> str:
    rows = [[symbol, meaning, ", ".join(f"`{key}` = {values[key]}" for key in keys)]
            for symbol, meaning, keys in SYMBOLS if all(key in values for key in keys)]
    return markdown_table(["paper", "meaning", "here"], rows)


def changes_of(runs: Iterable[Run], tuned: bool = False) -> list[str]:
    """`training.epochs=4 (preset tiny: 10)` for each setting in which all runs differ from their
    preset. Settings fixed by the setup are left out; nothing if a record cannot be read.

    Args:
        tuned: leave out learning rates, which are shown elsewhere.
    """
    found: dict[str, set[str]] = {}
    for run in runs:
        setup, both = SETUPS.get(run.setup), _and_preset(run)
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
    """In how many settings a run differs from its preset and setup; inf if unknown."""
    both = _and_preset(run)
    return math.inf if both is None else sum(value != usual for value, usual in both.values())


def _and_preset(run: Run) -> dict[str, tuple[str, str]] | None:
    """{key: (value of the run, that of its preset and setup)}; None if it cannot be read."""
    try:
        mine = settings_from_dict(run.config.get("settings") or {})
        usual = load_settings(str(run.config.get("preset")), smoke=False,
                              setup=SETUPS.get(run.setup))
    except UserError:
        return None
    before = {key: value for key, value, _ in describe(usual)}
    return {key: (value, before[key]) for key, value, _ in describe(mine) if key in before}


def own_settings_of(experiment: Experiment, setup: str, baseline: str) -> list[str] | None:
    """`rl.clip=false` for each setting in which a setup differs from the baseline, except learning
    rates and its method's own, as Markdown; None if either has no run."""
    pair = [experiment.of(name) for name in (setup, baseline)]
    if not all(pair):
        return None
    mine, theirs = (_flatten(runs[0].config.get("settings") or {}) for runs in pair)
    entropy = [SETUPS[name].entropy for name in (setup, baseline)]
    return [*(code_span(f"{key}={show(value)}") for key, value in mine.items()
              if key in theirs and value != theirs[key] and not key.endswith("learning_rate")),
            *(("the term −γH",) if entropy == [True, False] else ())]


def _setting_rows(config: dict[str, Any], values: dict[str, str]) -> list[list[str]]:
    """(key, value, meaning); keys of other versions have no meaning here."""
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

"""Loads settings from a preset and overrides, and converts them to and from plain data.

A preset (`presets/<name>.yaml`) holds what differs from the defaults in `sections.py`. On top of it
come the settings of the setup (`setups.py`), then `--set key=value`. The settings of a method
(`methods.py`) are one more section, for setups of that method only.
"""

import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..setups import SETUPS, Setup
from ..system.errors import UsageError, nearest, reason, unknown
from .fields import Section, field_types, parse_text, show
from .methods import METHODS
from .settings import MethodSettings, Settings

PRESET_FOLDER = Path(__file__).parent / "presets"
PRESETS = ("tiny", "smollm2", "colab", "paper")
SECTIONS: dict[str, type[Section]] = {
    entry.name: entry.default_factory for entry in fields(Settings) if entry.name != "method"}
# How much is computed at once: changes results by the rounding of sums at most.
MEMORY_ALONE = ("training.micro_batch_tokens", "training.logit_chunk_tokens",
                "evaluation.batch_size")
KEYS: dict[str, Any] = {f"{section}.{name}": kind for section, cls in SECTIONS.items()
                        for name, kind in field_types(cls).items()}
# Keys in records of numerics version 2: their new names, or None for a setting that is gone.
OLD_KEYS = {
    "sft.loss_normalisation": "sft.loss_normalization",
    "rl.loss_normalisation": "rl.loss_normalization",
    "pear.normalisation": "pear.normalization", "pear.centred": "pear.centered",
    "pear.behaviour": "pear.behavior", "pear.behaviour_epochs": "pear.behavior_epochs",
    "pear.behaviour_rate": "pear.behavior_rate", "relift.gamma": "sft.gamma",
    **dict.fromkeys((
        "entropy_control.coefficient", "relift.capacity", "sasr.warm_norm", "sasr.measure_every",
        "sasr.smoothing", "raft.deduplicate", "raft.most", "switching.loss_patience",
        "switching.kl_patience", "switching.distinct_patience", "switching.entropy_patience"))}


def preset_names() -> tuple[str, ...]:
    """The presets a user can choose from, the default first."""
    return PRESETS


def resolve_preset(name: str) -> str:
    """The preset that `name` stands for; `auto` is `colab` with a GPU and `tiny` without.

    Raises:
        UsageError: there is no such preset.
    """
    if name == "auto":
        import torch  # only here: everything else about settings works without torch

        return "colab" if torch.cuda.is_available() else "tiny"
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return name


def get_setup(name: str) -> Setup:
    """The setup of that name.

    Raises:
        UsageError: it does not exist; the message names the nearest one.
    """
    if not isinstance(name, str) or name not in SETUPS:
        raise unknown("setup", name, SETUPS)
    return SETUPS[name]


def smoke_from_environment() -> bool:
    """Whether HYBRIDRL_SMOKE asks for tiny budgets."""
    return os.environ.get("HYBRIDRL_SMOKE", "") not in ("", "0")


def default_experiment(preset: str) -> str:
    """The preset's name; a smoke run gets an experiment of its own."""
    return f"{preset}-smoke" if smoke_from_environment() else preset


def load_settings(preset: str, overrides: Sequence[str] | str = (), smoke: bool | None = None,
                  setup: Setup | None = None) -> Settings:
    """The settings of a preset with some of them changed.

    Args:
        preset: a name of `preset_names()`, or `auto`.
        overrides: `section.key=value`, one per item, or all in one text as in `--set`.
        smoke: shrink every budget so that a run takes seconds with any preset; `overrides` have
            precedence. None asks HYBRIDRL_SMOKE.
        setup: adds the settings of the setup and of its method.

    Raises:
        UsageError: an unknown preset or key, an impossible value, or another method's setting.
    """
    values = dict(read_preset(resolve_preset(preset)))
    method = setup.method if setup else None
    values |= parse_overrides(setup.settings if setup else ())
    if smoke_from_environment() if smoke is None else smoke:
        values |= read_preset("smoke")
    # A preset has lines for every method; those of other methods are ignored.
    values = {key: value for key, value in values.items()
              if key.partition(".")[0] not in METHODS or key.startswith(f"{method}.")}
    given = parse_overrides(split_overrides(overrides))
    for section in {key.partition(".")[0] for key in given} & set(METHODS) - {method}:
        if setup:
            raise UsageError(f"The setup {setup.name} has no settings {section}.*; they belong to "
                             f"the method {section}.")
        METHODS[section](**{key.partition(".")[2]: given.pop(key) for key in list(given)
                            if key.startswith(f"{section}.")})  # checked, then ignored
    if "model.path" in given:  # the preset's revision is one of the preset's model
        values["model.revision"] = None
    settings = build(values | given, method)
    if (setup and setup.entropy and "rl" in setup.stages and settings.rl.gamma > 0
            and settings.entropy_control.kind == "adaptive"):
        settings.entropy_control.refuse("kind", f"the setup {setup.name} has an entropy term "
                                        "already; set rl.gamma=0 to replace it")
    return settings


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """{section.key: value} of texts `section.key=value`, every key checked."""
    values = {}
    for text in overrides:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UsageError(f"{text!r} is not a setting; write section.key=value, such as "
                             "rl.group_size=16.")
        known_key(key)
        section, _, name = key.partition(".")
        kind = KEYS[key] if key in KEYS else field_types(METHODS[section])[name]
        values[key] = parse_text(key, kind, value)
    return values


def split_overrides(overrides: Sequence[str] | str) -> list[str]:
    """The single `key=value` texts of what stands after `--set`."""
    if not isinstance(overrides, str):
        return list(overrides)
    try:
        return shlex.split(overrides)
    except ValueError:
        raise UsageError(f"The settings {overrides!r} have an open quote; close it.") from None


@cache
def read_preset(name: str) -> dict[str, Any]:
    """What a preset's file says, by dotted key."""
    path = PRESET_FOLDER / f"{name}.yaml"
    try:
        nested = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"The preset file {path.name} cannot be read ({reason(error)}); get it "
                         "back from the package.") from None
    return flatten(nested)


def flatten(nested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{section: {key: value}} as {section.key: value}, every key checked."""
    flat = {}
    if not isinstance(nested, dict) or not all(isinstance(values, dict | None)
                                               for values in nested.values()):
        raise UsageError("Settings are sections of keys and values, such as rl: {group_size: 8}.")
    for section, values in nested.items():
        if section not in SECTIONS and section not in METHODS:
            raise unknown("section of settings", str(section), SECTIONS)
        flat |= {f"{section}.{name}": value for name, value in (values or {}).items()}
    for key in flat:
        if key.partition(".")[0] not in METHODS:  # those are checked once their method is chosen
            known_key(key)
    return flat


def known_key(key: str) -> None:
    """Refuses a key that no section has, with the nearest one."""
    if key in KEYS:
        return
    section = key.partition(".")[0]
    if names := [f"{section}.{name}" for name in field_types(METHODS[section])] if (
            section in METHODS) else []:
        if key not in names:
            raise unknown("setting", key, names)
        return
    guess = nearest(key, KEYS)
    if guess or section in SECTIONS:
        raise unknown("setting", key, [guess] if guess else
                      [name for name in KEYS if name.startswith(section + ".")])
    raise UsageError(f"There is no setting {key!r}; a setting is section.key with a section out of "
                     f"{', '.join(SECTIONS)}.")


def build(values: dict[str, Any], method: str | None = None) -> Settings:
    """Settings from {section.key: value}; missing ones have their defaults.

    Args:
        method: whose settings to include; default: the method that `values` has settings of.
    """
    method = method or next((key.partition(".")[0] for key in values
                             if key.partition(".")[0] in METHODS), None)
    own = METHODS[method] if method else MethodSettings
    grouped: dict[str, dict[str, Any]] = {section: {} for section in (*SECTIONS, own.section)}
    for key, value in values.items():
        known_key(key)
        section, _, name = key.partition(".")
        grouped[section][name] = value
    return Settings(**{section: SECTIONS[section](**grouped[section]) for section in SECTIONS},
                    method=own(**grouped[own.section]))


def sections_of(settings: Settings) -> list[Section]:
    """The sections of settings; the last one is that of the run's method, if it has settings."""
    sections = [getattr(settings, section) for section in SECTIONS]
    return [*sections, settings.method] if fields(settings.method) else sections


def settings_to_dict(settings: Settings) -> dict[str, dict[str, Any]]:
    """{section: {key: value}} that JSON represents without loss."""
    return {section.section: {name: list(value) if isinstance(value, tuple) else value
                              for name, value in asdict(section).items()}
            for section in sections_of(settings)}


def settings_from_dict(values: dict[str, dict[str, Any]]) -> Settings:
    """The inverse of `settings_to_dict`; also reads the keys of older records.

    Raises:
        UsageError: an unknown section or key, or an impossible value.
    """
    return build(flatten(current_keys(values)))


def current_keys(values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Recorded settings with today's keys, without those that are gone; else as they are."""
    if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
        return values
    known: dict[str, dict[str, Any]] = {section: {} for section in values}
    for section, entries in values.items():
        for name, value in entries.items():
            place, _, new = (OLD_KEYS.get(f"{section}.{name}", f"{section}.{name}")
                             or ".").partition(".")
            if new:
                known.setdefault(place, {})[new] = value
    return known


def describe(settings: Settings) -> list[tuple[str, str, str]]:
    """(key, value, meaning and source) of every setting, for the hyperparameter table."""
    rows = []
    for section in sections_of(settings):
        for entry in fields(section):
            meaning = f"{entry.metadata['meaning']} ({entry.metadata['source']})"
            rows.append((f"{section.section}.{entry.name}", show(getattr(section, entry.name)),
                         meaning))
    return rows


def difference(one: Settings, other: Settings, ignored: Collection[str] = ()) -> list[str]:
    """`key: value -> value` for each setting in which two differ; `absent` is one that only the
    other has, as its method's own.

    Args:
        ignored: keys that may differ, such as `MEMORY_ALONE`.
    """
    before, after = ({key: value for key, value, _ in describe(s)} for s in (one, other))
    return [f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
            for key in {**before, **after}
            if before.get(key) != after.get(key) and key not in ignored]

"""Settings: defaults, presets, overrides, and errors that name what is wrong."""

import dataclasses
import json
import math
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hybridrl_lib.config.fields import show
from hybridrl_lib.config.methods import METHODS
from hybridrl_lib.config.presets import (
    KEYS,
    OLD_KEYS,
    PRESET_FOLDER,
    SECTIONS,
    describe,
    difference,
    load_settings,
    preset_names,
    read_preset,
    resolve_preset,
    settings_from_dict,
    settings_to_dict,
    split_overrides,
)
from hybridrl_lib.config.settings import Settings
from hybridrl_lib.setups import SETUPS
from hybridrl_lib.system.errors import UsageError

# Everything that depends on the model: a preset without one would change with a retuned default.
MODEL_DEPENDENT = {
    "model.path", "data.benchmarks", "data.max_prompt_tokens", "data.max_demonstration_tokens",
    "training.epochs", "training.warmup_steps", "training.micro_batch_tokens", "sft.batch_size",
    "sft.learning_rate", "sft.gamma", "rl.prompts_per_step", "rl.group_size", "rl.learning_rate",
    "rl.gamma", "rl.beta", "rl.max_new_tokens", "evaluation.samples", "evaluation.train_samples",
    "evaluation.max_new_tokens", "evaluation.batch_size", "probe.every", "probe.prompts"}
# Their defaults were chosen for the tiny world: a real model needs its own value of each.
OF_A_REAL_MODEL = {"training.betas", "training.weight_decay", "training.gradient_clip",
                   "training.final_learning_rate_fraction", "rl.updates_per_rollout",
                   "rl.epsilon_low", "rl.epsilon_high", "rl.temperature", "rl.advantage_scale"}


@pytest.fixture(autouse=True)
def no_smoke(monkeypatch):
    """These tests read full budgets, even if the suite itself runs with HYBRIDRL_SMOKE."""
    monkeypatch.delenv("HYBRIDRL_SMOKE", raising=False)


def test_every_preset_and_setup_survives_json():
    """A record's config.json gives back the settings that made it."""
    wrong = []
    for preset in preset_names():
        for smoke in (False, True):
            for setup in (None, *SETUPS.values()):
                settings = load_settings(preset, smoke=smoke, setup=setup)
                plain = json.loads(json.dumps(settings_to_dict(settings)))
                read = settings_from_dict(plain)
                if difference(settings, read) or settings_to_dict(read) != plain:
                    wrong.append((preset, smoke, setup and setup.name))
                if setup is None and read != settings:
                    wrong.append((preset, smoke))
    assert not wrong


def test_keys_of_older_records_are_read():
    """Records of numerics version 2 have British keys and settings that are gone."""
    wrong = []
    for old, new in OLD_KEYS.items():
        section, _, name = old.partition(".")
        value = "token_mean" if "normali" in name else None
        if old in KEYS or new and new.partition(".")[0] not in (*SECTIONS, *METHODS):
            wrong.append(old)
        elif new is None and settings_from_dict({section: {name: value}}) != settings_from_dict(
                {section: {}}):
            wrong.append(old)
    assert not wrong
    read = settings_from_dict({"rl": {"loss_normalisation": "token_mean", "beta": 0.5},
                               "entropy_control": {"coefficient": 0.1}})
    assert (read.rl.loss_normalization, read.rl.beta) == ("token_mean", 0.5)


def test_every_preset_states_what_depends_on_the_model():
    """Tuning the tiny world moves no other preset, because none relies on its defaults."""
    missing = {}
    for preset in preset_names():
        wanted = MODEL_DEPENDENT | (OF_A_REAL_MODEL if preset in ("colab", "paper") else set()) | (
            {"model.lora_targets"} if preset == "colab" else set())
        missing[preset] = sorted(wanted - set(read_preset(preset)))
    assert not any(missing.values()), missing
    settings = load_settings("paper")
    problems = sum(round(0.6 * total) - round(0.1 * round(0.6 * total)) for total in (7473 + 1319,
                                                                                     500))
    warm, epochs = settings.training.warmup_steps, settings.training.epochs
    text = (PRESET_FOLDER / "paper.yaml").read_text(encoding="utf-8")
    for batch, steps in ((settings.sft.batch_size, 1570), (settings.rl.prompts_per_step, 790)):
        assert epochs * math.ceil(problems / batch) == pytest.approx(steps, rel=0.01)
        assert re.search(rf"\b{steps:,}\b|\b{steps}\b", text)
        assert warm / steps in (pytest.approx(0.025, abs=0.001), pytest.approx(0.05, abs=0.001))


def test_every_preset_value_has_its_reason():
    """Presets hold data only, no key twice, and a reason for every value."""
    paths = sorted(PRESET_FOLDER.glob("*.yaml"))
    bare = [(path.name, line) for path in paths
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.startswith("  ") and "#" not in line]
    assert not bare
    assert {path.stem for path in paths} == {*preset_names(), "smoke"}
    class Strict(yaml.SafeLoader):
        """A loader that refuses a repeated key, which YAML itself accepts."""

        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value]
            assert len(names) == len(set(names)), names
            return super().construct_mapping(node, deep)

    for path in PRESET_FOLDER.glob("*.yaml"):
        assert yaml.load(path.read_text(encoding="utf-8"), Loader=Strict)


def test_tiny_is_a_real_workload():
    """`tiny` keeps the paper's epochs, G, and m; defaults are those that the docs list."""
    settings = load_settings("tiny")
    assert (settings.training.epochs, settings.rl.group_size) == (10, 8)
    assert settings.evaluation.samples == 16
    assert settings.data.train_limits == settings.data.test_limits == ()
    assert settings.evaluation.pass_at == (1, 2, 4, 8)
    settings = Settings()
    assert (settings.rl.kl_anchor, settings.rl.advantage_scale) == ("old", "group_std")
    assert (settings.sft.loss_normalization, settings.rl.loss_normalization) == (
        "token_mean", "sequence_mean")
    assert (settings.rl.updates_per_rollout, settings.training.entropy) == (2, "vocabulary")
    assert (settings.data.split, settings.data.train_fraction) == ("paper", 0.6)
    assert settings.data.validation_fraction == 0.1 and settings.rl.beta > 0


def test_smoke_shrinks_every_budget_but_keeps_the_method(monkeypatch):
    """HYBRIDRL_SMOKE=1 trains the same way, only less."""
    monkeypatch.setenv("HYBRIDRL_SMOKE", "1")
    small, full = load_settings("paper"), load_settings("paper", smoke=False)
    changed = {line.split(":")[0] for line in difference(full, small)}
    assert changed and not changed & {"rl.beta", "rl.gamma", "rl.learning_rate", "model.path"}
    rollouts = sum(small.data.train_limits) // small.rl.prompts_per_step * small.training.epochs
    assert 4 <= rollouts * small.rl.updates_per_rollout <= 40
    monkeypatch.setenv("HYBRIDRL_SMOKE", "0")
    assert load_settings("paper") == full
    assert load_settings("tiny", "rl.group_size=6", smoke=True).rl.group_size == 6


def test_overrides_are_cast_to_the_field():
    """Each common notation of a value gives the type that the code computes with."""
    settings = load_settings("tiny", (
        "data.benchmarks=gsm8k,math500 data.train_limits=[10,20] data.max_level=3 "
        "sft.learning_rate=1e-4 rl.beta=0 model.gradient_checkpointing=true "
        "evaluation.pass_at=(1,2) data.test_limits=7 model.path='my folder/a:b#c.gguf'"))
    assert settings.data.benchmarks == ("gsm8k", "math500")
    assert settings.data.train_limits == (10, 20) and settings.data.test_limits == (7, 7)
    assert settings.sft.learning_rate == 1e-4 and isinstance(settings.rl.beta, float)
    assert settings.model.gradient_checkpointing is True and settings.data.max_level == 3
    assert settings.evaluation.pass_at == (1, 2)
    assert settings.model.path == "my folder/a:b#c.gguf"
    unchanged = load_settings("tiny", ["data.train_limits=()", "data.max_level=none"])
    assert unchanged == load_settings("tiny")
    for preset in ("colab", "paper", "smollm2"):
        assert len(load_settings(preset).model.revision) == 40
        assert load_settings(preset, "model.path=someone/else").model.revision is None
        assert load_settings(
            preset, "model.path=someone/else model.revision=v1").model.revision == "v1"


# What a refused override's message has to name.
WRONG_OVERRIDES = {
    "rl.groupsize=4": ["rl.groupsize", "rl.group_size"],
    "group_size=4": ["rl.group_size"],
    "reward.beta=1": ["reward.beta", "rl.beta"],
    "zzz=1": ["zzz", *SECTIONS],
    "rl.group_size": ["section.key=value"],
    "rl.group_size=1": ["rl.group_size", "'1'", "2"],
    "rl.group_size=8.5": ["rl.group_size", "'8.5'"],
    "rl.group_size=true": ["rl.group_size", "'true'"],
    "rl.beta=nan": ["rl.beta", "nan", "0"],
    "rl.beta=inf": ["rl.beta", "inf"],
    "rl.epsilon_low=1": ["rl.epsilon_low", "'1'", "0"],
    "model.precision=bf32": ["model.precision", "fp32"],
    "data.benchmarks=gsm8k,math": ["data.benchmarks", "math500"],
    "data.benchmarks=gsm8k,gsm8k": ["data.benchmarks", "gsm8k,gsm8k"],
    "data.benchmarks=()": ["data.benchmarks", "()"],
    "data.train_limits=1,2,3": ["data.train_limits", "2"],
    "data.train_limits=0": ["data.train_limits"],
    "training.betas=0.9": ["training.betas", "0.9"],
    "training.epochs=1": ["training.epochs", "2"],
    "rl.updates_per_rollout=3": ["rl.prompts_per_step"],
    "evaluation.samples=4": ["Pass@8"],
    "model.path=": ["model.path"],
    "sft.gamma=[1": ["sft.gamma", "[1"],
    "model.gradient_checkpointing=2": ["model.gradient_checkpointing", "true", "false"],
    "rl.beta='1": ["rl.beta='1"],
}


def test_a_wrong_override_is_refused_in_one_sentence():
    """Nothing impossible starts a run, and the error names the key and what it accepts."""
    wrong = []
    for override, words in WRONG_OVERRIDES.items():
        with pytest.raises(UsageError) as caught:
            load_settings("tiny", override if "'" in override else [override])
            pytest.fail(f"{override} was accepted")
        message = str(caught.value)
        if "\n" in message or caught.value.exit_code != 2 or not all(
                word in message for word in words):
            wrong.append((override, words, message))
    assert not wrong
    with pytest.raises(UsageError, match="tiny"):
        load_settings("tinny")
    with pytest.raises(UsageError, match="smoke"):
        load_settings("smoke")
    with pytest.raises(UsageError, match="trainign"):
        settings_from_dict({"trainign": {}})
    with pytest.raises(UsageError, match="rl.group_size"):
        settings_from_dict({"rl": {"group_sise": 3}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().rl.beta = 1.0
    with pytest.raises(UsageError, match="rl.group_size"):
        dataclasses.replace(Settings().rl, group_size=1)


def test_auto_preset_follows_the_machine(monkeypatch):
    """`auto` never chooses a preset for a GPU on a machine without one."""
    torch = pytest.importorskip("torch")
    for gpu, name in ((True, "colab"), (False, "tiny")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert resolve_preset("auto") == name


def test_describe_explains_every_setting():
    """The hyperparameter table is complete: each key once, with meaning and source."""
    rows = describe(load_settings("paper"))
    assert [key for key, _, _ in rows] == list(KEYS)
    bare = [key for key, value, meaning in rows
            if not (value and meaning.endswith(")") and len(meaning) > 20)]
    assert not bare
    # A step may have several optimizer updates, so no meaning may confuse the two.
    assert not [key for key, _, meaning in rows if "optimizer step" in meaning]
    one, other = load_settings("tiny"), load_settings("tiny", "rl.beta=0.5 data.max_level=2")
    assert difference(one, other) == ["data.max_level: none -> 2", "rl.beta: 0.02 -> 0.5"]
    assert difference(one, one) == []


@given(st.integers(2, 10**9), st.floats(0, 1e6), st.booleans())
def test_shown_values_can_be_typed_again(group_size, beta, checkpointing):
    """What a table or an error shows can be passed to `--set`."""
    settings = load_settings("tiny", [
        f"rl.group_size={show(group_size)}", f"rl.beta={show(beta)}",
        f"model.gradient_checkpointing={show(checkpointing)}"], smoke=False)
    assert settings.rl.group_size == group_size and settings.rl.beta == beta
    assert settings.model.gradient_checkpointing is checkpointing


@given(st.text(max_size=30))
def test_any_text_after_set_is_read_or_refused(text):
    """No override, however odd, causes a traceback."""
    try:
        assert all(isinstance(item, str) for item in split_overrides(text))
        load_settings("tiny", text, smoke=False)
        load_settings("tiny", [f"rl.beta={text}"], smoke=False)
    except UsageError as error:
        assert str(error)

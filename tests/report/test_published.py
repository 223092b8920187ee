"""The committed results: tables are what their records say, and the records are whole."""

import csv
import json
from pathlib import Path

import pytest

from hybridrl_lib.config.presets import load_settings
from hybridrl_lib.experiments.compare import choose_arms
from hybridrl_lib.experiments.publish import tables_of
from hybridrl_lib.experiments.tuning import learning_rates
from hybridrl_lib.records.run_folder import NUMERICS_VERSION, RunFolder
from hybridrl_lib.setups import paper_setups

PUBLISHED = Path(__file__).parents[2] / "results" / "published"
COMPARISONS = sorted(path.parent for path in PUBLISHED.glob("*/comparison.csv"))
SWEEPED = sorted(path.parent for path in PUBLISHED.glob("*/sweep.csv"))
EXPERIMENTS = sorted(path.parent for path in PUBLISHED.glob("*/table2.csv"))


def test_something_is_published():
    """Protects the tests below from passing because they found nothing."""
    assert {folder.name for folder in EXPERIMENTS} >= {"smollm2", "tiny"}
    assert any((folder / "tuning.csv").is_file() for folder in COMPARISONS)


@pytest.mark.parametrize("folder", [*EXPERIMENTS, *COMPARISONS, *SWEEPED],
                         ids=lambda folder: folder.name)
def test_published_tables_are_rebuilt_from_the_records_to_the_letter(folder):
    """Protects against a table that was edited, or a report that changed and was not made again."""
    texts = tables_of(folder, folder.name)
    assert texts
    for name, text in texts.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"{name} differs: make it again"


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_published_runs_are_complete_and_from_committed_code(folder):
    """Protects the claim that every number has its manifest and the code that made it."""
    manifests = sorted(folder.glob("*/seed-*/manifest.json"))
    setups = {"base"} if folder.name.startswith("base-") else set(paper_setups())
    assert {path.parent.parent.name for path in manifests} == setups
    for path in manifests:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert manifest["complete"] and manifest["git_commit"] and manifest["git_dirty"] is False
        assert manifest["numerics_version"] == NUMERICS_VERSION, (
            f"{path} was made by other arithmetic: run the experiment again")


@pytest.mark.parametrize("folder", COMPARISONS, ids=lambda folder: folder.name)
def test_a_published_comparison_is_fair(folder):
    """Protects its promises: five seeds an arm, the rates that tuning chose, committed code. One at
    the preset's own rates, all alike, has three seeds or more."""
    tuning, chosen = folder / "tuning.csv", {}
    if tuning.is_file():
        chosen = {row["setup"]: float(row["rate_factor"]) for row in csv.DictReader(
            tuning.open(encoding="utf-8")) if row["chosen"] == "1"}
    for arm in choose_arms(()):
        runs = [RunFolder(path) for path in (folder / arm.name).glob("seed-*")]
        assert len(runs) >= ((5 if chosen else 3) if arm.stages else 1), arm.name
        for run in runs:
            config, manifest = run.read("config.json"), run.read("manifest.json")
            rates = learning_rates(load_settings(config["preset"], setup=arm, smoke=False))
            for key, rate in rates.items() if arm.stages else ():
                section, _, name = key.partition(".")
                assert config["settings"][section][name] == pytest.approx(
                    rate * (chosen[arm.name] if chosen else 1.0)), run.path
            assert manifest["complete"] and manifest["git_dirty"] is False
            assert manifest["numerics_version"] == NUMERICS_VERSION


def test_the_published_real_run_has_the_promised_workload():
    """Protects the real table: two epochs of each stage, 100 + 50 real problems, signal of base."""
    for run in (PUBLISHED / "smollm2").glob("*/seed-*"):
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        data = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["data"]
        tests = {name: entry["problems"]["test"] for name, entry in data.items()}
        assert config["settings"]["training"]["epochs"] >= 4  # 2 + 2 in the two-stage setups
        assert tests["gsm8k"] >= 100 and tests["math500"] >= 50
    assert (PUBLISHED / "smollm2" / "signal.csv").is_file()


def test_the_larger_real_run_is_larger_and_was_sampled():
    """Protects "a larger budget, Pass@k included" of the second real table."""
    def problems(run):
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        return sum(entry["problems"]["train"] for entry in manifest["data"].values())

    for run in (PUBLISHED / "smollm2-larger").glob("*/seed-*"):
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
        assert problems(run) > 2 * problems(PUBLISHED / "smollm2" / run.parent.name / run.name)
        assert settings["evaluation"]["samples"] >= 4
    assert "Pass@4" in (PUBLISHED / "smollm2-larger" / "table2.md").read_text(encoding="utf-8")


def test_base_models_are_scored_on_official_rows():
    """Protects the comparison with the accuracies that the models' makers publish."""
    found = sorted(PUBLISHED.glob("base-*/base/seed-*"))
    assert len(found) >= 2
    for run in found:
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
        data = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["data"]
        tests = {name: entry["problems"]["test"] for name, entry in data.items()}
        assert settings["data"]["split"] == "official"
        assert tests["gsm8k"] >= 300 and tests["math500"] >= 150


def test_the_published_tiny_run_has_the_promised_workload():
    """Protects the default's size: 10 epochs, 400 + 320 problems, G = 8, 16 samples, 5 seeds."""
    runs = sorted((PUBLISHED / "tiny").glob("*/seed-*"))
    for setup in paper_setups():
        assert sum(run.parent.name == setup for run in runs) >= 5
    for run in runs:
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
        counts = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["data"].values()
        assert settings["training"]["epochs"] == 10
        assert settings["rl"]["group_size"] == 8
        assert settings["evaluation"]["samples"] == 16
        assert sum(c["problems"]["train"] for c in counts) >= 400
        assert sum(c["problems"]["test"] for c in counts) >= 320
        assert (run / "probe.jsonl").stat().st_size > 0

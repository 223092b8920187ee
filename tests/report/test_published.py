"""The committed results: tables follow from their records, and the records are complete."""

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

pytestmark = pytest.mark.xdist_group("published")  # one process makes the tables
PUBLISHED = Path(__file__).parents[2] / "results" / "published"
COMPARISONS = sorted(path.parent for path in PUBLISHED.glob("*/comparison.csv"))
SWEEPED = sorted(path.parent for path in PUBLISHED.glob("*/sweep.csv"))
EXPERIMENTS = sorted(path.parent for path in PUBLISHED.glob("*/table2.csv"))


def test_something_is_published():
    """Protects the tests below from passing because they found nothing."""
    assert {folder.name for folder in EXPERIMENTS} >= {"smollm2", "tiny"}
    assert any((folder / "tuning.csv").is_file() for folder in COMPARISONS) and SWEEPED


@pytest.fixture(scope="module")
def tables() -> list[tuple[str, str, str, str]]:
    """(experiment, file, its text, what the records give) of every published table."""
    found = []
    for folder in (*EXPERIMENTS, *COMPARISONS, *SWEEPED):
        texts = tables_of(folder, folder.name)
        assert texts, folder.name
        found += [(folder.name, name, (folder / name).read_text(encoding="utf-8"), text)
                  for name, text in texts.items()]
    return found


def test_published_numbers_are_those_of_the_records(tables):
    """Protects against a number that was edited, whatever the wording around the tables."""
    differ = [(folder, name) for folder, name, old, new in tables
              if name.endswith(".csv") and old != new]
    assert not differ


def test_published_tables_are_rebuilt_from_the_records_to_the_letter(tables):
    """Protects against a page that was edited, or a report that changed and was not run again."""
    differ = [(folder, name) for folder, name, old, new in tables if old != new]
    assert not differ


def test_published_runs_are_complete_and_from_committed_code():
    """Protects the claim that every number has its manifest and the code that produced it."""
    wrong = []
    for folder in EXPERIMENTS:
        manifests = sorted(folder.glob("*/seed-*/manifest.json"))
        setups = {"base"} if folder.name.startswith("base-") else set(paper_setups())
        assert {path.parent.parent.name for path in manifests} == setups, folder.name
        for path in manifests:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if not (manifest["complete"] and manifest["git_commit"]
                    and manifest["git_dirty"] is False
                    and manifest["numerics_version"] == NUMERICS_VERSION):
                wrong.append(path.relative_to(PUBLISHED).as_posix())
    assert not wrong


def test_a_published_comparison_is_fair():
    """Protects its promises: five seeds per arm, the rates that tuning chose, committed code. One
    with the preset's own rates for all arms has at least three seeds."""
    wrong = []
    for folder in COMPARISONS:
        tuning, chosen = folder / "tuning.csv", {}
        if tuning.is_file():
            chosen = {row["setup"]: float(row["rate_factor"]) for row in csv.DictReader(
                tuning.open(encoding="utf-8")) if row["chosen"] == "1"}
        for arm in choose_arms(()):
            runs = [RunFolder(path) for path in (folder / arm.name).glob("seed-*")]
            if len(runs) < ((5 if chosen else 3) if arm.stages else 1):
                wrong.append((folder.name, arm.name, len(runs)))
            for run in runs:
                config, manifest = run.read("config.json"), run.read("manifest.json")
                rates = learning_rates(load_settings(config["preset"], setup=arm, smoke=False))
                for key, rate in rates.items() if arm.stages else ():
                    section, _, name = key.partition(".")
                    if config["settings"][section][name] != pytest.approx(
                            rate * (chosen[arm.name] if chosen else 1.0)):
                        wrong.append((run.path, key))
                if not (manifest["complete"] and manifest["git_dirty"] is False
                        and manifest["numerics_version"] == NUMERICS_VERSION):
                    wrong.append(run.path)
    assert not wrong


def test_the_published_real_run_has_the_promised_workload():
    """Protects the real table: two epochs per stage, 100 + 50 real problems, the base's signal."""
    for run in (PUBLISHED / "smollm2").glob("*/seed-*"):
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        data = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["data"]
        tests = {name: entry["problems"]["test"] for name, entry in data.items()}
        assert config["settings"]["training"]["epochs"] >= 4  # 2 + 2 in the two-stage setups
        assert tests["gsm8k"] >= 100 and tests["math500"] >= 50
    assert (PUBLISHED / "smollm2" / "signal.csv").is_file()


def test_the_larger_real_run_is_larger_and_was_sampled():
    """Protects the second real table: a larger budget, and Pass@k."""
    def problems(run):
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        return sum(entry["problems"]["train"] for entry in manifest["data"].values())

    for run in (PUBLISHED / "smollm2-larger").glob("*/seed-*"):
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
        assert problems(run) > 2 * problems(PUBLISHED / "smollm2" / run.parent.name / run.name)
        assert settings["evaluation"]["samples"] >= 4
    assert "Pass@4" in (PUBLISHED / "smollm2-larger" / "table2.md").read_text(encoding="utf-8")


def test_base_models_are_scored_on_official_rows():
    """Protects the comparison with the accuracies that the models' authors publish."""
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

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


def test_published_tables_are_rebuilt_from_the_records_to_the_letter(tables):
    """Protects against a page that was edited, or a report that changed and was not run again."""
    differ = [(folder, name) for folder, name, old, new in tables if old != new]
    assert not differ
    assert {folder.name for folder in EXPERIMENTS} >= {"smollm2", "tiny"}
    assert any((folder / "tuning.csv").is_file() for folder in COMPARISONS) and SWEEPED


def test_published_runs_are_complete_and_from_committed_code():
    """Every number has its manifest, committed code, five seeds, and the rates of its tuning."""
    wrong = []
    for folder in EXPERIMENTS:
        manifests = sorted(folder.glob("*/seed-*/manifest.json"))
        setups = {"base"} if folder.name.startswith("base-") else set(paper_setups())
        assert {path.parent.parent.name for path in manifests} == setups, folder.name
        for path in manifests:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if not (manifest["complete"] and manifest["git_commit"] and manifest["git_dirty"]
                    is False and manifest["numerics_version"] == NUMERICS_VERSION):
                wrong.append(path.relative_to(PUBLISHED).as_posix())
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


def facts_of(pattern: str) -> list[tuple]:
    """(setup/seed-n, settings, {(benchmark, part): problems}) of published runs."""
    return [("/".join(run.parts[-2:]), RunFolder(run).read("config.json")["settings"], {
        (name, part): count for name, entry in RunFolder(run).read("manifest.json")["data"].items()
        for part, count in entry["problems"].items()}) for run in sorted(PUBLISHED.glob(pattern))]


def total(counts: dict, part: str) -> int:
    return sum(count for (_, name), count in counts.items() if name == part)


def test_published_runs_have_the_promised_workload():
    """Ten epochs of the default; real tables of real problems, one larger; official test rows."""
    tiny, small = facts_of("tiny/*/seed-*"), facts_of("smollm2/*/seed-*")
    for setup in paper_setups():
        assert sum(place.startswith(f"{setup}/") for place, *_ in tiny) >= 5
    for place, settings, counts in tiny:
        assert (settings["training"]["epochs"], settings["rl"]["group_size"],
                settings["evaluation"]["samples"]) == (10, 8, 16)
        assert total(counts, "train") >= 400 and total(counts, "test") >= 320
        assert (PUBLISHED / "tiny" / place / "probe.jsonl").stat().st_size > 0
    for _, settings, counts in small:
        assert settings["training"]["epochs"] >= 4  # 2 + 2 in the two-stage setups
        assert counts["gsm8k", "test"] >= 100 and counts["math500", "test"] >= 50
    assert (PUBLISHED / "smollm2" / "signal.csv").is_file()
    trained = {place: total(counts, "train") for place, _, counts in small}
    for place, settings, counts in facts_of("smollm2-larger/*/seed-*"):
        assert total(counts, "train") > 2 * trained[place]
        assert settings["evaluation"]["samples"] >= 4
    assert "Pass@4" in (PUBLISHED / "smollm2-larger" / "table2.md").read_text(encoding="utf-8")
    base = facts_of("base-*/base/seed-*")
    assert len(base) >= 2
    for _, settings, counts in base:
        assert settings["data"]["split"] == "official"
        assert counts["gsm8k", "test"] >= 300 and counts["math500", "test"] >= 150

"""The numbers of a reference run of three steps per stage, kept in data/numerics.json.

A change that moves them makes new results incomparable with published ones. If it is intended:
raise NUMERICS_VERSION in hybridrl_lib/records/run_folder.py, write the numbers again with
`python tests/training/test_numerics.py`, and make the published records again.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from hybridrl_lib.config.presets import load_settings, settings_to_dict
from hybridrl_lib.experiments.run import run
from hybridrl_lib.records.run_folder import NUMERICS_VERSION
from hybridrl_lib.training.observer import Observer

sys.path.append(str(Path(__file__).parents[1]))  # as a program
from small_training import as_overrides  # noqa: E402

FILE = Path(__file__).parents[1] / "data" / "numerics.json"
PUBLISHED = Path(__file__).parents[2] / "results" / "published"
# Another order of sums moves the numbers by less than 1e-5; beta_2 = 0.951 instead of 0.95 moves
# them by more than this.
TOLERANCE = 1e-4
# What a new file is made with; an existing one keeps its own settings, whatever the preset becomes.
REFERENCE = ("model.device=cpu", "model.precision=fp32", "data.train_limits=[6,6]",
             "data.validation_limits=[2,2]", "data.test_limits=[4,4]", "training.epochs=6",
             "training.warmup_steps=1", "sft.batch_size=12", "rl.prompts_per_step=12",
             "rl.group_size=4", "probe.every=3", "probe.prompts=4", "probe.samples=4",
             "evaluation.samples=4", "evaluation.train_samples=4", "evaluation.pass_at=[1,2,4]",
             "evaluation.train_limit=2")


def reference_run(settings: dict) -> dict[str, list]:
    """The numbers of three SFT and three RL steps with entropy term, and of their evaluation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        folder = run("sft_then_rl_entropy", "tiny", 0, "numerics", as_overrides(settings),
                     Observer())
    finally:
        torch.set_num_threads(threads)
    logs = {name: [{key: value for key, value in row.items() if not key.startswith("seconds")}
                   for row in folder.lines(f"{name}.jsonl")]
            for name in ("metrics", "probe", "validation")}
    scores = [{"id": row["id"], "checkpoint": row["checkpoint"], "part": row["part"],
               "strict": row["greedy"]["strict"], "tokens": row["greedy"]["tokens"],
               **({"samples": row["samples"]} if "samples" in row else {})}
              for row in folder.lines("eval.jsonl")]
    return {**logs, "eval": scores}


def differences(kept, found, place="") -> list[str]:
    """Where numbers moved, as `place: kept -> found`; a new column is no difference."""
    if isinstance(kept, dict) and isinstance(found, dict):
        return [line for key in kept
                for line in differences(kept[key], found.get(key), f"{place}/{key}")]
    if isinstance(kept, list) and isinstance(found, list) and len(kept) == len(found):
        return [line for i, pair in enumerate(zip(kept, found, strict=True))
                for line in differences(*pair, f"{place}/{i}")]
    number = all(isinstance(v, float | int) and not isinstance(v, bool) for v in (kept, found))
    same = (found == pytest.approx(kept, rel=TOLERANCE, abs=1e-6) if number else found == kept)
    return [] if same else [f"{place}: {kept} -> {found}"]


def test_the_reference_run_gives_the_numbers_of_its_version():
    """No change to sampler, losses, data, rewards or loop goes unnoticed."""
    kept = json.loads(FILE.read_text())
    assert kept["numerics_version"] == NUMERICS_VERSION, (
        f"NUMERICS_VERSION is {NUMERICS_VERSION}, the kept numbers are of version "
        f"{kept['numerics_version']}; see the top of this file")
    moved = differences(kept["numbers"], reference_run(kept["settings"]))
    assert not moved, (f"{len(moved)} numbers moved; if that is intended, see the top of this "
                       "file:\n" + "\n".join(moved[:20]))


def test_the_reference_run_sees_what_it_should():
    """It is worth comparing: rewards with signal, a second mini-batch off-policy, both stages."""
    rows = json.loads(FILE.read_text())["numbers"]["metrics"]
    assert [row["stage"] for row in rows] == ["sft"] * 3 + ["rl"] * 3
    last = rows[3:]
    assert all(0 < row["reward"] < 1 and row["kl/old"] > 0 and row["gamma"] > 0 for row in last)
    assert all(row["frac_reward_zero_std"] < 1 and row["kl/reference"] > 0 for row in last)


def test_a_small_change_is_seen():
    """The comparison sees a number that moved by half a percent, a flag, a missing row."""
    kept = {"metrics": [{"loss": 1.0, "right": True}, {"loss": 2.0}]}
    assert not differences(kept, {"metrics": [{"loss": 1.0001, "right": True}, {"loss": 2.0}]})
    for found in ([{"loss": 1.005, "right": True}, {"loss": 2.0}],
                  [{"loss": 1.0, "right": False}, {"loss": 2.0}],
                  [{"loss": 1.0, "right": True}], [{"loss": 1.0}, {"loss": 2.0}]):
        assert differences(kept, {"metrics": found})


def test_published_records_are_of_this_numerics_version():
    """What the README quotes was made by code that gives these numbers."""
    others = [str(path.relative_to(PUBLISHED)) for path in PUBLISHED.rglob("manifest.json")
              if json.loads(path.read_text()).get("numerics_version") != NUMERICS_VERSION]
    assert not others, f"made under another numerics version, make them again: {others[:5]}"


def write() -> None:
    """Writes the numbers of the code as it is, for a NUMERICS_VERSION that has none yet."""
    kept = json.loads(FILE.read_text()) if FILE.exists() else None
    if kept and kept["numerics_version"] == NUMERICS_VERSION and "--again" not in sys.argv:
        sys.exit(f"{FILE.name} has the numbers of version {NUMERICS_VERSION}; raise "
                 "NUMERICS_VERSION in hybridrl_lib/records/run_folder.py first.")
    settings = kept["settings"] if kept else settings_to_dict(
        load_settings("tiny", REFERENCE, smoke=False))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HYBRIDRL_RESULTS_DIR"] = folder
        numbers = reference_run(settings)
    FILE.write_text(json.dumps({"numerics_version": NUMERICS_VERSION, "settings": settings,
                                "numbers": numbers}, indent=1) + "\n")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    write()

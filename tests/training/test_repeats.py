"""The same code, seed, and machine give the same bytes, however a run is started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridrl_lib.experiments.run import run
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.training.observer import Observer

ROOT = Path(__file__).parents[2]
SETUPS = ("rl", "sft_entropy")


def recorded_bytes(folder: RunFolder) -> dict[str, bytes]:
    """All of a record that has no times in it, and metrics.jsonl without its columns of time."""
    names = ("eval.jsonl", "probe.jsonl", "validation.jsonl", "samples.jsonl")
    files = {name: (folder.path / name).read_bytes() for name in names
             if (folder.path / name).exists()}
    rows = [{key: value for key, value in row.items() if not key.startswith("seconds")}
            for row in folder.lines("metrics.jsonl")]
    weights = (folder.path / "checkpoint" / "final" / "model.safetensors").read_bytes()
    assert rows and files["eval.jsonl"] and files["probe.jsonl"]
    return files | {"metrics.jsonl": json.dumps(rows).encode(), "weights": weights}


@pytest.mark.slow
@pytest.mark.xdist_group("papermill")
def test_one_seed_gives_the_same_bytes_every_way(results, monkeypatch):
    """In this process, and through papermill one at a time or two side by side."""
    for name, value in {"HYBRIDRL_SMOKE": "1", "OMP_NUM_THREADS": "1",
                        "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(1)
    here = {setup: recorded_bytes(run(setup, seed=0, experiment="here", observer=Observer()))
            for setup in SETUPS}
    for jobs in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "hybridrl_lib.cli", "reproduce", "--setups", ",".join(SETUPS),
             "--seeds", "1", "--jobs", jobs, "--experiment", f"jobs-{jobs}"],
            cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        for setup, kept in here.items():
            found = recorded_bytes(RunFolder(results / f"jobs-{jobs}" / setup / "seed-0"))
            assert [name for name in kept if found.get(name) != kept[name]] == []
            assert set(found) == set(kept)

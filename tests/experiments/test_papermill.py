"""Setup notebooks through papermill itself, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("papermill")
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.mark.parametrize(("notebook", "setup"), [
    ("10_sft", "sft"), pytest.param("12_sft_then_rl", "sft_then_rl", marks=pytest.mark.slow)])
def test_papermill_trains(notebook, setup, tmp_path):
    """Protects batch reproduction: the records have new optimizer steps of this interpreter."""
    results = tmp_path / "results"
    done = subprocess.run(
        [sys.executable, "-m", "papermill", f"{notebook}.ipynb", str(tmp_path / "out.ipynb"),
         "-p", "preset", "tiny", "-p", "seed", "3", "-p", "settings", "rl.beta=0.03",
         "--no-progress-bar"], cwd=NOTEBOOKS, capture_output=True, text=True, check=False,
        env={**os.environ, "HYBRIDRL_SMOKE": "1", "HYBRIDRL_RESULTS_DIR": str(results),
             "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    folder = results / "tiny-smoke" / setup / "seed-3"
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["rl"]["beta"] == 0.03
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(step["updates"] for step in steps) > 0
    assert any(step["grad_norm"] > 0 for step in steps)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"] and manifest["steps"] == len(steps)
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))

"""The method in CONTRIBUTING.md, added as described there and trained by its notebook."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks():
    """The four fenced blocks of the paragraph on methods: file, settings class, line, notebook."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    part = text.split("**A method.**")[1].split("**Notebooks.**")[0]
    return re.findall(r"```(\w+)\n(.*?)```", part, re.DOTALL)


def insert_before(path, mark, text):
    """Inserts a text before the first `mark`."""
    before, found, after = path.read_text(encoding="utf-8").partition(mark)
    assert found
    path.write_text(before + text + found + after, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.xdist_group("papermill")
def test_the_method_can_be_added_as_it_says(tmp_path):
    """Protects whoever adds a method from an example that does not run."""
    (kinds, texts) = zip(*blocks(), strict=True)
    assert kinds == ("python", "python", "python", "sh")
    assert sum(bool(line) for line in texts[0].splitlines()) <= 10, "a method takes ten lines"
    package = tmp_path / "hybridrl_lib"
    shutil.copytree(ROOT / "hybridrl_lib", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "11_rl.ipynb", tmp_path / "notebooks")
    (package / "methods" / "alternate.py").write_text(texts[0], encoding="utf-8")
    insert_before(package / "config" / "methods.py", "METHODS: dict", texts[1])
    insert_before(package / "setups.py", "    )\n}\n", texts[2])
    subprocess.run(["sh", "-c", texts[3]], cwd=tmp_path, check=True)

    results = tmp_path / "results"
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "11_alternate.ipynb", str(tmp_path / "out.ipynb"),
         "-p", "preset", "tiny", "--no-progress-bar"], cwd=tmp_path / "notebooks",
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HYBRIDRL_SMOKE": "1",
             "HYBRIDRL_RESULTS_DIR": str(results), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = results / "tiny-smoke" / "alternate" / "seed-0"
    assert json.loads((folder / "manifest.json").read_text())["complete"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["lambda/sft"] for step in steps] == [float(i % 2 == 0) for i in range(len(steps))]
    assert len(steps) > 3 and any(step["updates"] for step in steps)

"""Every kind of fault once; `python tests/faults` runs more, and says what a trial is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
@pytest.mark.skipif(sys.platform != "linux", reason="forks, mounts and /proc")
def test_every_kind_of_fault_loses_nothing():
    """A run that was hit by a fault ends with the record of one that was not."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "faults"), "--each-once"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "lost: nothing" in done.stdout, done.stdout + done.stderr

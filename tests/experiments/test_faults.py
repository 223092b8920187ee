"""Every kind of fault once; `python tests/faults` is the long form, and says what a trial is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, mounts and /proc")
def test_every_kind_of_fault_loses_nothing():
    """A run that was struck ends with the record of one that was not, whatever struck it."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "faults"), "--each-once"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "lost: nothing" in done.stdout, done.stdout + done.stderr

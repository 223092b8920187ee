"""`python tests/faults`: see the package's docstring."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OWN_MOUNTS = "HYBRIDRL_FAULTS_OWN_MOUNTS"


def enter_own_mounts() -> None:
    """Starts this program again where it may mount, if the system lets it."""
    if OWN_MOUNTS in os.environ:
        return
    for options in (["--mount"], ["--map-root-user", "--mount"]):
        way = ["unshare", *options]
        try:
            allowed = not subprocess.run(
                [*way, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode
        except OSError:
            break
        if allowed:
            os.environ[OWN_MOUNTS] = "1"
            os.execvp(way[0], [*way, sys.executable, str(HERE), *sys.argv[1:]])
    os.environ[OWN_MOUNTS] = ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/faults")
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each-once", action="store_true", help="one trial of each kind")
    parser.add_argument("--only", default="", help="names of kinds, separated by commas")
    parser.add_argument("--keep", type=Path, help="folder for all trials; default: removed")
    arguments = parser.parse_args()
    enter_own_mounts()
    os.environ |= {"OMP_NUM_THREADS": "1", "HYBRIDRL_SMOKE": "1", "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "false"}
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
    import tempfile

    from faults.trials import run_trials

    memory = Path("/dev/shm")  # there a sync waits for nobody else's writing
    folder = arguments.keep or Path(tempfile.mkdtemp(
        prefix="faults-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        return run_trials(folder, arguments.trials, arguments.seed,
                          [name for name in arguments.only.split(",") if name],
                          arguments.each_once, may_mount=bool(os.environ[OWN_MOUNTS]))
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

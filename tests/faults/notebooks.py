"""Notebooks in kernels of their own, cell by cell or through papermill."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from .runs import Trial, start

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300


def environment(trial: Trial) -> dict[str, str]:
    """As `hybridrl reproduce` sets it: this interpreter and this package, whatever is installed."""
    from hybridrl_lib.experiments.reproduce import write_kernel

    jupyter = trial.folder / "jupyter"
    if not jupyter.exists():
        write_kernel(jupyter)
    return {**os.environ, "HYBRIDRL_RESULTS_DIR": str(trial.results), "PYTHONPATH": str(ROOT),
            "JUPYTER_PATH": str(jupyter), "IPYTHONDIR": str(trial.folder / "ipython"),
            "JUPYTER_RUNTIME_DIR": str(trial.folder / "runtime"), "HYBRIDRL_HEADLESS": "1",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def start_papermill(trial: Trial, name: str) -> subprocess.Popen:
    command = trial.command
    with (trial.folder / f"papermill-{name}.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "papermill", f"{command.notebook}.ipynb",
             str(trial.folder / f"{name}.ipynb"), "-k", "python3", "-r", "preset", "tiny",
             "-p", "seed", "0", "-r", "settings", shlex.join(command.settings),
             "--no-progress-bar"], cwd=ROOT / "notebooks", env=environment(trial), stdout=log,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)


def wait_for_papermill(trial: Trial, process: subprocess.Popen) -> bool:
    """Waits until the run has begun; False if it ended before."""
    while process.poll() is None:
        if (trial.run.path / "config.json").exists():
            return True
        time.sleep(0.02)
    return False


def run_in_kernel(trial: Trial) -> int:
    """Runs a notebook's cells, restarts the kernel on the way, runs them all again."""
    hit = trial.folder / "hit"

    def drive() -> int:
        os.environ.update(environment(trial))
        os.chdir(ROOT / "notebooks")
        import nbformat
        from jupyter_client.manager import start_new_kernel

        cells = [cell for cell in nbformat.read(f"{trial.command.notebook}.ipynb", 4).cells
                 if cell.cell_type == "code"]
        sources = ["preset, seed, experiment = 'tiny', 0, ''\n"
                   f"settings = {shlex.join(trial.command.settings)!r}"
                   if "parameters" in cell.metadata.get("tags", ()) else cell.source
                   for cell in cells]
        manager, client = start_new_kernel(startup_timeout=PATIENCE, kernel_name="python3")
        try:
            for source in sources:
                client.execute(source)
            until = time.monotonic() + PATIENCE
            while not (trial.run.path / "config.json").exists() and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(0.7 * trial.some_seconds())
            if not trial.run.is_complete:
                hit.touch()
            manager.restart_kernel(now=True)
            client.wait_for_ready(timeout=PATIENCE)
            for source in sources:
                reply = client.execute(source, reply=True, timeout=PATIENCE)
                if reply["content"]["status"] != "ok":
                    print(reply["content"])
                    return 1
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
        return 0

    code = start(trial.command, trial.results, body=drive).wait()
    trial.was_hit = hit.exists()
    return code

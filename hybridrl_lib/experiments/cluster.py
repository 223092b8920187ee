"""Runs jobs on the nodes of a Ray cluster; jobs of a node that dies resume elsewhere.

Every job is a Ray task that starts this module as a program on its node; the program runs the job's
command and watches it. All nodes see the same folders under the same paths and have this Python, so
a job leaves its log, record, and checkpoints where it would leave them here. Ray restarts a task
whose node is gone, and the run resumes from its checkpoint.

A job is stopped through a file next to its log, which it finds wherever it runs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from ..records.locks import is_locked
from ..system.errors import UsageError, UserError, reason
from .jobs import Job
from .process import JobProcess

RETRIES = 10  # nodes that a job may lose
SECONDS_FOR_LOCK = 300.0  # that a run's lock may outlive the node that held it
SECONDS_BETWEEN_LOOKS = 0.2


def connect(executor: str) -> "Cluster | None":
    """The cluster that `--executor` names; None for `local`.

    Args:
        executor: `local`; `ray` for the cluster in RAY_ADDRESS, or the one that this machine is a
            node of; `ray:ADDRESS`.

    Raises:
        UsageError: it is none of these, or Ray is not installed.
        UserError: no cluster answers.
    """
    if executor == "local":
        return None
    kind, _, address = executor.partition(":")
    if kind != "ray":
        raise UsageError(f"There is no executor {executor!r}; choose local, ray, or ray:ADDRESS.")
    if not find_spec("ray"):
        raise UsageError("The executor ray needs the package ray; install it with "
                         "'pip install hybridrl_lib[cluster]' or omit --executor.")
    return Cluster(address or os.environ.get("RAY_ADDRESS") or "auto")


class Cluster:
    """A Ray cluster.

    Attributes:
        cpus, gpus, nodes: as they were when the cluster was reached.
    """

    def __init__(self, address: str):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # of whatever type Ray has for it
            raise UserError(
                f"No Ray cluster answers at {'this machine' if address == 'auto' else address} "
                f"({reason(error)}); start one with 'ray start --head' and 'ray start "
                "--address=...' on the other machines, or omit --executor.") from error
        found = ray.cluster_resources()
        self.cpus, self.gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
        self.nodes = ray.nodes()

    def slots(self, threads: int) -> int:
        """How many jobs fit at a time, with one GPU or `threads` CPU threads each."""
        return max(1, self.gpus or self.cpus // fitting(threads, self.nodes))

    def start(self, job: Job, environment: dict[str, str], slot: int) -> "RemoteProcess":
        """Submits a job to the cluster, which chooses the place (`slot` is not used)."""
        import ray

        def on_node(command: list[str], environment: dict[str, str]) -> int:
            # Pickled by value, since a node may have another package folder: its own imports.
            import os
            import subprocess

            gpus = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",)
                    if name in os.environ and environment.pop("ON_GPU", "")}
            return subprocess.run(command, env=environment | gpus, check=False).returncode

        job.log.write_bytes(b"")  # every start of the job appends to it
        stop_file(job.log).unlink(missing_ok=True)
        given = json.dumps({"command": job.command, "folder": str(job.folder), "log": str(job.log),
                            "record": None if job.record is None else str(job.record.path)})
        threads = fitting(int(environment["OMP_NUM_THREADS"]), ray.nodes())
        task = ray.remote(num_cpus=threads, num_gpus=1 if self.gpus else 0,
                          max_retries=RETRIES)(on_node)
        environment = {k: v for k, v in environment.items() if not k.startswith("RAY_")} | {
            "OMP_NUM_THREADS": str(threads)}
        return RemoteProcess(job.log, task.options(name=job.name).remote(
            [sys.executable, "-m", "hybridrl_lib.experiments.cluster", given],
            environment | ({"ON_GPU": "1"} if self.gpus else {})))


def fitting(threads: int, nodes: list[dict]) -> int:
    """At most `threads`, and at most what the largest node has per job: Ray would wait for more.

    Args:
        nodes: from `ray.nodes()`. A node with GPUs has an equal share of its CPUs for each; if
            there are such nodes, only they take jobs.
    """
    found = [(int(there.get("CPU", 0)), int(there.get("GPU", 0)))
             for there in (node["Resources"] for node in nodes if node["Alive"])]
    shares = [cpus // gpus for cpus, gpus in found if gpus] or [cpus for cpus, _ in found]
    return max(1, min(threads, max(shares, default=0) or threads))


class RemoteProcess:
    """A job on the cluster, with the interface of `jobs.Process`."""

    def __init__(self, log: Path, task):
        self.log, self.task = log, task
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code; None while the job waits, runs, or restarts."""
        import ray

        if self.returncode is None and ray.wait([self.task], timeout=0)[0]:
            try:
                self.returncode = ray.get(self.task)
            except ray.exceptions.TaskCancelledError:
                self.returncode = 130
            except Exception as error:  # Ray has many types for what may happen to a task
                with self.log.open("a", encoding="utf-8") as stream:
                    stream.write(f"the cluster lost the job: {reason(error)}\n")
                self.returncode = 1
            stop_file(self.log).unlink(missing_ok=True)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return self.returncode

    def interrupt(self) -> None:
        """Asks it to finish its step and write a checkpoint."""
        import ray

        stop_file(self.log).touch()
        if not self.log.stat().st_size:  # it still waits for a node
            ray.cancel(self.task)

    def end(self) -> None:
        """Ends it at once."""
        import ray

        ray.cancel(self.task, force=True)
        self.wait()


def stop_file(log: Path) -> Path:
    """While this file exists, the job with that log is to stop."""
    return log.with_suffix(".stop")


# On the node ------------------------------------------------------------------------------------


def main() -> int:
    """Runs a job's command until it ends or is asked to stop; returns its exit code."""
    die_with_parent()
    given = json.loads(sys.argv[1])
    log = Path(given["log"])
    if stop_file(log).exists():
        return 130
    if given["record"]:
        wait_for_lock(Path(given["record"]))
    with log.open("ab") as stream:
        process = JobProcess(given["command"], cwd=given["folder"], stdout=stream,
                             stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                             start_new_session=True, preexec_fn=die_with_parent)
        asked = False
        while process.poll() is None:
            if not asked and stop_file(log).exists():
                asked = True
                process.interrupt()
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return process.returncode


def die_with_parent() -> None:
    """When a node's Ray ends, nothing that it started may keep writing (Linux only)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def wait_for_lock(folder: Path) -> None:
    """Waits until no other process writes a run, such as one on a node that was lost."""
    until = time.monotonic() + SECONDS_FOR_LOCK
    while is_locked(folder) and time.monotonic() < until:
        time.sleep(SECONDS_BETWEEN_LOOKS)


if __name__ == "__main__":
    sys.exit(main())

"""`--executor ray`: the same records from the nodes of a cluster, one of which dies."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hybridrl_lib.cli import main
from hybridrl_lib.experiments import cluster
from hybridrl_lib.records import locks
from hybridrl_lib.records.locks import is_locked, only_writer
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.system.errors import UsageError

pytestmark = pytest.mark.xdist_group("ray")
ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "hybridrl_lib.cli", "reproduce", "--setups", "sft,rl",
           "--set", "training.epochs=4", "training.checkpoint_every=3")


@pytest.fixture()
def nodes(monkeypatch):
    """A cluster on this machine."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")  # a busy machine is slow, not broken
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20})
    found = SimpleNamespace(cluster=made, workers=[], join=lambda: found.workers.extend(
        made.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(2)))
    try:
        yield found
    finally:
        made.shutdown()


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process: subprocess.Popen, what) -> None:
    """Waits until something holds; a busy machine is slow, not hung."""
    until = time.monotonic() + 600
    while not what():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)


def node_of(nodes, words: str):
    """The node one of whose processes has these words in its command."""
    for node in nodes.workers:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for child in raylet.children(recursive=True):
            try:
                if words in " ".join(child.cmdline()):
                    return node
            except psutil.Error:  # it has just ended
                continue
    raise AssertionError(f"no node works on {words}")


@pytest.mark.slow
def test_the_runs_of_a_dead_node_resume_elsewhere_and_the_table_is_the_same(
        nodes, results, monkeypatch):
    """They are not lost, resume from their checkpoints, and leave the same record."""
    environment = os.environ | {"HYBRIDRL_SMOKE": "1", "OMP_NUM_THREADS": "1",
                                "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*COMMAND, "--experiment", "cluster", "--jobs", "2", "--executor",
                                f"ray:{nodes.cluster.address}"], cwd=ROOT, env=environment,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for(process, lambda: any((results / "cluster" / "notebooks").glob("*.log")))
        nodes.join()
        log = results / "cluster" / "rl" / "seed-0" / "metrics.jsonl"
        wait_for(process, lambda: lines_of(log) >= 7)  # after the second checkpoint
        nodes.cluster.remove_node(node_of(nodes, "11_rl"), allow_graceful=False)
        said, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, said
    local = subprocess.run([*COMMAND, "--experiment", "local", "--jobs", "2"], cwd=ROOT,
                           env=environment, text=True, capture_output=True, check=False)
    assert local.returncode == 0, local.stdout + local.stderr

    manifests = {name: RunFolder(results / name / "rl" / "seed-0").read("manifest.json")
                 for name in ("cluster", "local")}
    assert manifests["cluster"]["resumed_from"] and not manifests["local"]["resumed_from"]
    for place in ("table2.csv", "rl/seed-0/eval.jsonl", "sft/seed-0/eval.jsonl",
                  "rl/seed-0/probe.jsonl"):
        assert (results / "cluster" / place).read_bytes() == (
            results / "local" / place).read_bytes(), place


def test_an_executor_that_is_not_available_is_an_error(monkeypatch, capsys):
    """An unknown executor, a missing package, and a cluster that does not answer."""
    assert cluster.connect("local") is None
    assert main(["reproduce", "--executor", "slurm"]) == 2
    said = capsys.readouterr().err
    assert "'slurm'" in said and "ray:ADDRESS" in said
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"hybridrl_lib\[cluster\]"):
        cluster.connect("ray")

    def unreachable(**arguments):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(cluster, "find_spec", lambda name: "found")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(
        is_initialized=lambda: False, init=unreachable))
    assert main(["reproduce", "--executor", "ray:10.0.0.9:6379"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "10.0.0.9:6379" in said and "nobody there" in said


def test_jobs_fill_the_cluster():
    """One job per GPU; without GPUs, as many as the threads allow."""
    found = object.__new__(cluster.Cluster)
    found.cpus, found.gpus, found.nodes = 16, 0, []
    assert found.slots(1) == 16 and found.slots(4) == 4 and found.slots(32) == 1
    found.nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}] * 4
    assert found.slots(16) == 4, "a job of 16 threads gets 4, so four run at a time"
    found.gpus = 2
    assert found.slots(1) == 2
    gone, wrong = {"Alive": False, "Resources": {"CPU": 1000.0}}, []
    for threads, nodes, fits in (
            (16, [{"CPU": 4.0}, {"CPU": 8.0}], 8),  # Ray would wait forever for a node of 16
            (2, [{"CPU": 4.0}, {"CPU": 8.0}], 2),
            (16, [{"CPU": 64.0}, {"CPU": 8.0, "GPU": 2.0}], 4),  # the 64 have no GPUs
            (3, [{"CPU": 0.0}], 3),  # others may still join
            (3, [{}], 3), (3, [], 3),
            (4, [{"GPU": 1.0}], 4)):
        found = cluster.fitting(threads, [*({"Alive": True, "Resources": node}
                                            for node in nodes), gone])
        if found != fits:
            wrong.append((threads, nodes, found, fits))
    assert not wrong


def keep(tmp_path, program: str, record: Path | None = None) -> subprocess.Popen:
    """The program that runs a job on a node; here the job is a short Python program."""
    given = {"command": [sys.executable, "-c", program], "folder": str(tmp_path),
             "log": str(tmp_path / "job.log"), "record": record and str(record)}
    return subprocess.Popen([sys.executable, "-m", "hybridrl_lib.experiments.cluster",
                             json.dumps(given)], env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_job_on_a_node_can_be_asked_to_stop(tmp_path):
    """The stop file is seen, the job gets its signal, and its exit code is returned."""
    program = ("import signal, sys, time\n"
               "signal.signal(signal.SIGTERM, lambda *_: (print('kept', flush=True), sys.exit(7)))"
               "\nprint('begun', flush=True)\ntime.sleep(600)")
    process, log = keep(tmp_path, program), tmp_path / "job.log"
    try:
        wait_for(process, lambda: log.exists() and b"begun" in log.read_bytes())
        cluster.stop_file(log).touch()
        assert process.wait(timeout=600) == 7
    finally:
        process.kill()
    assert log.read_text().split() == ["begun", "kept"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_nothing_keeps_writing_after_a_nodes_ray_has_ended(tmp_path):
    """Otherwise, two processes would write one record after the job is started elsewhere."""
    process = keep(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    log = tmp_path / "job.log"
    wait_for(process, lambda: log.exists() and log.read_bytes().endswith(b"\n"))
    job = psutil.Process(int(log.read_text()))
    process.kill()
    process.wait()
    job.wait(timeout=60)


def test_a_job_waits_for_the_lock_of_its_run(tmp_path, monkeypatch):
    """A lock may outlive its node for a moment, so the job waits instead of failing."""
    record = tmp_path / "run"
    assert not is_locked(record)
    with only_writer(record, "It"):
        assert is_locked(record)
        process = keep(tmp_path, "print('begun', flush=True)", record)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        assert not (tmp_path / "job.log").exists()
    assert process.wait(timeout=600) == 0 and not is_locked(record)
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / ".lock").touch()
    looking = (tmp_path / ".lock").open("r+")
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: looking.close())
    with only_writer(tmp_path, "It"):
        assert is_locked(tmp_path)


def test_a_job_that_the_cluster_lost_has_failed(tmp_path, monkeypatch):
    """After too many dead nodes, the reason is in the log, where the summary looks for it."""
    def lost(task):
        raise RuntimeError("the node died")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(
        wait=lambda tasks, timeout: (tasks, []), get=lost,
        exceptions=SimpleNamespace(TaskCancelledError=KeyError)))
    log = tmp_path / "job.log"
    process = cluster.RemoteProcess(log, "task")
    assert process.poll() == 1 and "the node died" in log.read_text()
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(
        wait=lambda tasks, timeout: (tasks, []), get=lambda task: 130))
    log = tmp_path / "job.log"
    log.write_text("begun\n")
    process = cluster.RemoteProcess(log, "task")
    process.interrupt()
    assert cluster.stop_file(log).exists()
    assert process.poll() == 130 and not cluster.stop_file(log).exists()

"""`hybridrl reproduce`: notebooks x seeds through papermill, with small notebooks made here."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from synthetic_records import build_experiment

from hybridrl_lib.experiments import jobs, reproduce
from hybridrl_lib.experiments import plan as plan_module
from hybridrl_lib.experiments.jobs import Clock, Job, Queue, Running
from hybridrl_lib.records.locks import only_writer
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.setups import SETUPS, Setup, paper_setups, setups_with_notebook
from hybridrl_lib.system.errors import UserError

ROOT = Path(__file__).parents[2]

# A setup's notebook that leaves a made-up record, and beside it what it was given. No torch.
SETUP_CELL = f"""
import json, os, sys
sys.path.append({str(ROOT / "tests")!r})
from pathlib import Path
from synthetic_records import build_experiment
from hybridrl_lib.errors import UserError
from hybridrl_lib.records import RunFolder, experiment_folder
folder = experiment_folder(experiment)
run = folder / SETUP / f"seed-{{seed}}"
if SETUP == "rl":
    raise UserError("The gold answer of problem 7 cannot be parsed; mend it.")
if not run.exists():
    build_experiment(folder, [SETUP], [seed], {{"tiny_word": 6}}, {{"tiny_word": 4}}, epochs=2)
RunFolder(run).write("given.json", {{
    "parameters": [preset, seed, experiment, settings], "python": sys.executable,
    "folder": os.getcwd(), "environment": dict(os.environ)}})
"""

# A notebook that trains until it is asked to stop, and then keeps a checkpoint.
ENDLESS_CELL = """
import time
from hybridrl_lib.errors import Stopped
from hybridrl_lib.interrupt import Interrupt
from hybridrl_lib.records import RunFolder, experiment_folder
run = RunFolder(experiment_folder(experiment) / SETUP / f"seed-{seed}")
with Interrupt() as interrupt:
    run.write("begun.json", {})
    while not interrupt.asked:
        time.sleep(0.02)
    run.write("kept.json", {})
    raise Stopped("Stopped by you after step 3; the checkpoint is written.")
"""


def write_notebook(path: Path, cell: str) -> None:
    """A notebook with a cell of parameters, as the project's have, and one more cell."""
    parameters = nbformat.v4.new_code_cell(
        'preset = "auto"\nseed = 0\nexperiment = ""\nsettings = ""',
        metadata={"tags": ["parameters"]})
    setup = next((s.name for s in SETUPS.values() if s.notebook == path.stem), "")
    notebook = nbformat.v4.new_notebook(
        cells=[parameters, nbformat.v4.new_code_cell(f"SETUP = {setup!r}\n{cell}")],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3",
                                 "language": "python"}})
    nbformat.write(notebook, path)


@pytest.fixture()
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout with notebooks that take seconds; it is the current folder."""
    folder = tmp_path / "checkout"
    for name in ("notebooks", "hybridrl_lib"):
        (folder / name).mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    for name in setups_with_notebook():
        write_notebook(folder / "notebooks" / f"{SETUPS[name].notebook}.ipynb", SETUP_CELL)
    for name in reproduce.REPORT_NOTEBOOKS:
        write_notebook(folder / "notebooks" / f"{name}.ipynb", "print(experiment)")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return folder


@pytest.fixture()
def fast(monkeypatch):
    """No GPU is looked for: torch stays out of this process."""
    monkeypatch.setitem(sys.modules, "torch", type("torch", (), {
        "Tensor": type("Tensor", (), {}),  # scipy asks for it where a torch is loaded
        "cuda": type("cuda", (), {"device_count": staticmethod(lambda: 0)})}))


def job(name: str, weight: float = 1.0, **fields) -> Job:
    folder = fields.pop("folder", Path("."))
    return Job(name=name, command=fields.pop("command", (sys.executable, "-c", "pass")),
               folder=folder, output=folder / f"{name}.ipynb", log=folder / f"{name}.log",
               weight=weight, **fields)


# The whole -------------------------------------------------------------------------------------


def test_a_setup_without_notebook_is_left_to_hybridrl_run(checkout, fast, results, monkeypatch):
    """A line added to setups.py breaks no `hybridrl reproduce`; asked for by name, it says so."""
    monkeypatch.setitem(SETUPS, "blended", Setup("blended", "Blended", ("rl",)))
    planned = []
    monkeypatch.setattr(reproduce, "setup_job", lambda plan, setup, seed: planned.append(setup.name)
                        or job(setup.name, seed=seed))
    monkeypatch.setattr(reproduce.Queue, "run", lambda self: {})
    reproduce.reproduce("tiny", say=lambda line: None)
    assert planned == list(setups_with_notebook())
    monkeypatch.undo()
    plan = SimpleNamespace(folder=checkout, notebooks=checkout / "notebooks")
    with pytest.raises(UserError, match="blended has no notebook; train it with 'hybridrl run"):
        reproduce.setup_job(plan, Setup("blended", "Blended", ("rl",)), 0)


def test_notebooks_run_and_failures_are_told_at_the_end(checkout, fast, results, monkeypatch):
    """One failure keeps no other notebook from running, and the report is made of the rest.

    Every notebook gets its parameters as they are (an experiment called 2025 stays a text), this
    interpreter, this package and one thread, whatever number of jobs.
    """
    monkeypatch.setenv("HYBRIDRL_SMOKE", "1")
    monkeypatch.setenv("HYBRIDRL_RESULTS_DIR", "new")
    monkeypatch.setenv("HYBRIDRL_DATA_DIR", "../data")
    (checkout / "model").mkdir()
    lines = []
    with pytest.raises(UserError) as caught:
        reproduce.reproduce("tiny", seeds=(0,), setups=("sft", "rl"), jobs=2, experiment="2025",
                            settings=["rl.beta=0.5", "model.path=model"], say=lines.append)
    assert "1 of 2 notebooks failed (rl seed 0)" in str(caught.value)
    text = "\n".join(lines)
    assert "* rl seed 0: The gold answer of problem 7 cannot be parsed; mend it. (log: " in text
    assert lines.index("started rl seed 0") < lines.index("started sft seed 0")
    assert "20_table2" in text and "left out" in text
    folder = checkout / "new" / "2025"
    assert (folder / "table2.csv").is_file() and (folder / "figures").is_dir()
    assert (folder / "notebooks" / "10_sft-seed-0.ipynb").is_file()
    assert not (folder / ".lock").exists()

    given = RunFolder(folder / "sft" / "seed-0").read("given.json")
    model = os.path.relpath(checkout / "model", checkout / "notebooks")
    assert given["parameters"] == ["tiny", 0, "2025", f"rl.beta=0.5 model.path={model}"]
    assert given["python"] == sys.executable
    assert given["folder"] == str(checkout / "notebooks")
    environment = given["environment"]
    assert environment["OMP_NUM_THREADS"] == "1" and environment["HYBRIDRL_SMOKE"] == "1"
    assert environment["HYBRIDRL_RESULTS_DIR"] == str(checkout / "new")
    assert Path(environment["HYBRIDRL_DATA_DIR"]).is_absolute()


def test_report_notebooks_get_a_seed_that_every_setup_has(checkout, fast, results):
    """Alone they train what is missing, so here they wait until nothing is."""
    build_experiment(results / "full", test={"tiny_word": 2}, train={}, seeds=(3, 5), epochs=2)
    (results / "full" / "base" / "seed-0").rename(results / "full" / "base" / "seed-5")
    plan, lines = reproduce.make_plan("tiny", "full", (), None, 1), []
    pages = reproduce.report_jobs(plan, [3, 5], lines.append)
    assert [page.name for page in pages] == list(reproduce.REPORT_NOTEBOOKS)
    assert all(page.seed == 5 and "seed 5" in " ".join(page.command) for page in pages)
    assert not lines and not reproduce.report_jobs(plan, [3], lines.append)
    assert "left out" in lines[0]


def hear_interrupts():
    """What a shell starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_lets_every_kernel_keep_its_checkpoint(checkout, results):
    """The signal reaches the kernels, not papermill, which would kill them."""
    for name in ("rl", "sft"):
        write_notebook(checkout / "notebooks" / f"{SETUPS[name].notebook}.ipynb", ENDLESS_CELL)
    process = subprocess.Popen(
        [sys.executable, "-m", "hybridrl_lib.cli", "reproduce", "--setups", "rl,sft", "--jobs",
         "2"], cwd=checkout, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, preexec_fn=hear_interrupts)
    places = [results / "tiny" / name / "seed-0" for name in ("rl", "sft")]
    try:
        until = time.monotonic() + 600  # a busy machine is slow, not hung
        while not all((place / "begun.json").exists() for place in places):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.count("\n") == 1 and "goes on from the checkpoints" in errors
    assert all((place / "kept.json").exists() for place in places)


# What is refused -------------------------------------------------------------------------------


def test_a_second_process_is_refused(checkout, fast, results):
    """Two of them would write the same records; the sentence names the one at work."""
    with only_writer(results / "tiny", "The experiment tiny"):
        with pytest.raises(UserError, match=f"number {os.getpid()}"):
            reproduce.reproduce("tiny", say=lambda line: None)


def test_a_lock_left_behind_keeps_nobody_out(tmp_path):
    """A process that was killed leaves its file; the system has given the lock back."""
    program = ("import os, sys; from pathlib import Path\n"
               "from hybridrl_lib.records.locks import only_writer\n"
               "with only_writer(Path(sys.argv[1]), 'It'): os._exit(1)")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, cwd=ROOT)
    assert (tmp_path / ".lock").is_file()
    with only_writer(tmp_path, "It"):
        with pytest.raises(UserError), only_writer(tmp_path, "It"):
            pass
    assert not (tmp_path / ".lock").exists()


def test_without_notebooks_it_says_where_to_run(tmp_path, fast, monkeypatch):
    """A missing notebook is named before anything starts."""
    monkeypatch.setattr(reproduce, "project_folder", lambda: tmp_path)
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks" / "10_sft.ipynb", "")
    with pytest.raises(UserError, match="11_rl.ipynb is missing"):
        reproduce.reproduce("tiny", setups=["rl"], say=lambda line: None)


# The plan --------------------------------------------------------------------------------------


def test_the_longest_come_first_and_finished_ones_last(tmp_path):
    """Setups side by side end together when the long ones start first."""
    names = sorted(paper_setups(), key=lambda name: -plan_module.relative_cost(SETUPS[name]))
    assert names == ["rl_entropy", "rl", "sft_then_rl_entropy", "sft_then_rl", "sft_entropy", "sft",
                     "base"]


def test_jobs_follow_the_machine(monkeypatch):
    """One a GPU; on a CPU one a core, as long as each has the memory that its preset needs."""
    monkeypatch.setattr(reproduce, "usable_cores", lambda: 8)
    monkeypatch.setattr(reproduce, "main_memory", lambda: 16.0)
    assert plan_module.default_jobs("tiny", 7, 0) == 7
    assert plan_module.default_jobs("tiny", 70, 0) == 8
    assert plan_module.default_jobs("smollm2", 7, 0) == 2
    assert plan_module.default_jobs("paper", 7, 4) == 4
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert plan_module.gpus_for("smollm2", ()) == plan_module.gpus_for(
        "tiny", ["model.device=auto"]) == 4
    assert plan_module.gpus_for("tiny", ()) == 0  # it trains on the CPU, so GPUs are no bound
    assert plan_module.threads_for("tiny", 1) == plan_module.threads_for("tiny", 8) == 1
    assert plan_module.threads_for("smollm2", 2) == 4


def test_settings_survive_the_way_through_papermill(tmp_path):
    """A path with a space is one setting still when a notebook has split the text."""
    import shlex

    from hybridrl_lib.config.presets import split_overrides

    settings = ["model.path=/a b/c.gguf", "rl.beta=0.5"]
    assert split_overrides(shlex.join(settings)) == settings


# The queue -------------------------------------------------------------------------------------


def test_a_notebook_without_a_finished_run_has_failed(tmp_path):
    """A notebook that ran to its end and trained nothing is no success."""
    failures = Queue([job("empty", folder=tmp_path, record=RunFolder(tmp_path / "run")),
                      job("fine", folder=tmp_path)], 2, dict(os.environ), lambda line: None).run()
    (failed, reason), = failures.items()
    assert failed.name == "empty" and "no finished run" in reason


def test_reason_is_the_notebooks_sentence_or_the_logs_last_line(tmp_path):
    """Our own errors are told as they are, others with their type, a crash by its log."""
    def notebook(name, text):
        return {"cells": [{"outputs": []}, {"outputs": [
            {"output_type": "error", "ename": name, "evalue": text}]}]}

    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(notebook("UserError", "Do this.")))
    assert jobs.error_in_notebook(path) == "Do this."
    path.write_text(json.dumps(notebook("ValueError", "no\nsecond line")))
    assert jobs.error_in_notebook(path) == "ValueError: no"
    path.write_text("{")
    assert jobs.error_in_notebook(path) == ""
    program = "import sys; print('going'); sys.exit('Killed: 9')"
    crashed = job("crashed", folder=tmp_path, command=(sys.executable, "-c", program))
    assert list(Queue([crashed], 1, dict(os.environ), lambda line: None).run().values()) == [
        "Killed: 9"]


@pytest.mark.parametrize(("bad_starts", "lost"), [(1, False), (2, False), (9, True)])
def test_a_kernel_that_did_not_come_up_is_started_again(tmp_path, bad_starts, lost):
    """Two kernels that start at once may be given one port: zmq says `Address already in use`, and
    nothing has run. One that never comes up ends all the same."""
    program = ("import pathlib, sys; tries = pathlib.Path('tries'); "
               "tries.write_text((tries.read_text() if tries.exists() else '') + 'x'); "
               f"len(tries.read_text()) > {bad_starts} or "
               "sys.exit('RuntimeError: Kernel died before replying to kernel_info')")
    lines = []
    failures = Queue([job("one", folder=tmp_path, command=(sys.executable, "-c", program))], 1,
                     dict(os.environ), lines.append).run()
    assert list(failures.values()) == (
        ["RuntimeError: Kernel died before replying to kernel_info"] if lost else [])
    tries = min(bad_starts + 1, jobs.MOST_STARTS)
    assert len((tmp_path / "tries").read_text()) == tries
    assert sum("its kernel did not come up" in line for line in lines) == tries - 1
    assert "(1 of 1)" in lines[-1]


def test_each_slot_has_its_own_gpu(tmp_path):
    """Two jobs at a time on two GPUs never share one."""
    program = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    two = [job(name, folder=tmp_path, command=(sys.executable, "-c", program))
           for name in ("a", "b")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "4,7"}
    assert Queue(two, 2, environment, lambda line: None, gpus=2).run() == {}
    assert {one.log.read_text().strip() for one in two} == {"4", "7"}


def test_time_left_follows_what_is_done(tmp_path, monkeypatch):
    """The estimate counts finished jobs and the steps of running ones."""
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    long, short = job("long", 9.0, folder=tmp_path), job("short", 1.0, folder=tmp_path)
    clock = Clock([long, short], slots=1)
    running = Running(long, None, 0, began=0.0)
    assert clock.left([running]) == ""
    long.log.write_text("rl seed 0: step 7/10 (rl)\nrl seed 0: step 10/20 (rl)\n")
    assert clock.left([running]) == ", about 3 min left"
    clock.finished(running)
    assert clock.left([]) == ", about 11 s left"

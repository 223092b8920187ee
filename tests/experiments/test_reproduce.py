"""`hybridrl reproduce`: notebooks x seeds through papermill, with small notebooks written here."""

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
from facts import lines_with
from synthetic_records import build_experiment

from hybridrl_lib.experiments import jobs, reproduce
from hybridrl_lib.experiments import plan as plan_module
from hybridrl_lib.experiments.jobs import Job, Queue, Running, TimeLeft
from hybridrl_lib.experiments.process import start_here
from hybridrl_lib.records.locks import only_writer
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.setups import SETUPS, Setup, paper_setups, setups_with_notebook
from hybridrl_lib.system.errors import UserError

ROOT = Path(__file__).parents[2]
# A setup's notebook that leaves a made-up record and what it was given. No torch.
SETUP_CELL = f"""
import json, os, sys
sys.path.append({str(ROOT / "tests")!r})
from pathlib import Path
from synthetic_records import build_experiment
from hybridrl_lib.records.folders import experiment_folder
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.system.errors import UserError
folder = experiment_folder(experiment)
run = folder / SETUP / f"seed-{{seed}}"
if SETUP == "rl":
    raise UserError("The gold answer of problem 7 cannot be parsed; correct it.")
if not run.exists():
    build_experiment(folder, [SETUP], [seed], {{"tiny_word": 6}}, {{"tiny_word": 4}}, epochs=2)
RunFolder(run).write("given.json", {{
    "parameters": [preset, seed, experiment, settings], "python": sys.executable,
    "folder": os.getcwd(), "environment": dict(os.environ)}})
"""
# A notebook that trains until it is asked to stop, and then writes a checkpoint.
ENDLESS_CELL = """
import time
from hybridrl_lib.records.folders import experiment_folder
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.system.errors import Stopped
from hybridrl_lib.system.interrupt import Interrupt
run = RunFolder(experiment_folder(experiment) / SETUP / f"seed-{seed}")
with Interrupt() as interrupt:
    run.write("begun.json", {})
    while not interrupt.asked:
        time.sleep(0.02)
    run.write("kept.json", {})
    raise Stopped("Stopped by you after step 3; the checkpoint is written.")
"""


def write_notebook(path: Path, cell: str) -> None:
    """A notebook with a cell of parameters, like the project's, and one more cell."""
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
    """The current folder is a checkout with notebooks that take seconds."""
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
    """No GPU is looked for: torch is not imported in this process."""
    monkeypatch.setitem(sys.modules, "torch", type("torch", (), {
        "Tensor": type("Tensor", (), {}),  # scipy asks for it where a torch is loaded
        "cuda": type("cuda", (), {"device_count": staticmethod(lambda: 0)})}))


def job(name: str, weight: float = 1.0, **fields) -> Job:
    folder = fields.pop("folder", Path("."))
    return Job(name=name, command=fields.pop("command", (sys.executable, "-c", "pass")),
               folder=folder, output=folder / f"{name}.ipynb", log=folder / f"{name}.log",
               weight=weight, **fields)


def run_queue(waiting: list[Job], slots: int = 1, say=lambda line: None, gpus: int = 0,
              environment=None) -> dict[Job, str]:
    """The failures of jobs that run on this machine."""
    return Queue(waiting, slots, environment or dict(os.environ), say, start_here(gpus)).run()


def test_a_setup_without_notebook_is_left_to_hybridrl_run(checkout, fast, results, monkeypatch):
    """A new line in setups.py does not break `hybridrl reproduce`."""
    monkeypatch.setitem(SETUPS, "blended", Setup("blended", "Blended", ("rl",)))
    planned = []
    monkeypatch.setattr(reproduce, "setup_job", lambda plan, setup, seed: planned.append(setup.name)
                        or job(setup.name, seed=seed))
    monkeypatch.setattr(reproduce.Queue, "run", lambda self: {})
    reproduce.reproduce("tiny", say=lambda line: None)
    assert planned == list(setups_with_notebook())
    monkeypatch.undo()
    plan = SimpleNamespace(folder=checkout, notebooks=checkout / "notebooks")
    with pytest.raises(UserError, match="hybridrl run blended"):
        reproduce.setup_job(plan, Setup("blended", "Blended", ("rl",)), 0)


@pytest.mark.xdist_group("papermill")
def test_notebooks_run_and_failures_are_listed_at_the_end(checkout, fast, results, monkeypatch):
    """One failure does not stop the other notebooks, and the report covers the rest."""
    monkeypatch.setenv("HYBRIDRL_SMOKE", "1")
    monkeypatch.setenv("HYBRIDRL_RESULTS_DIR", "new")
    monkeypatch.setenv("HYBRIDRL_DATA_DIR", "../data")
    (checkout / "model").mkdir()
    lines = []
    with pytest.raises(UserError) as caught:
        reproduce.reproduce("tiny", seeds=(0,), setups=("sft", "rl"), jobs=2, experiment="2025",
                            settings=["rl.beta=0.5", "model.path=model"], say=lines.append)
    assert lines_with(str(caught.value), 1, 2, "rl seed 0")
    text = "\n".join(lines)
    sentence = "The gold answer of problem 7 cannot be parsed; correct it."
    assert [line for line in lines_with(text, "rl seed 0") if sentence in line and ".log" in line]
    first, second = (next(n for n, line in enumerate(lines) if line.endswith(f"{name} seed 0"))
                     for name in ("rl", "sft"))
    assert first < second, "the longest starts first"
    assert lines_with(text, *reproduce.REPORT_NOTEBOOKS), "skipped, because rl is not finished"
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
    """On their own they train what is missing, so here they wait until nothing is."""
    build_experiment(results / "full", test={"tiny_word": 2}, train={}, seeds=(3, 5), epochs=2)
    (results / "full" / "base" / "seed-0").rename(results / "full" / "base" / "seed-5")
    plan, lines = reproduce.make_plan("tiny", "full", (), None, 1), []
    pages = reproduce.report_jobs(plan, [3, 5], lines.append)
    assert [page.name for page in pages] == list(reproduce.REPORT_NOTEBOOKS)
    assert all(page.seed == 5 and "seed 5" in " ".join(page.command) for page in pages)
    assert not lines and not reproduce.report_jobs(plan, [3], lines.append)
    assert lines_with(lines[0], *reproduce.REPORT_NOTEBOOKS)
    with only_writer(results / "tiny", "The experiment tiny"):
        with pytest.raises(UserError, match=rf"\b{os.getpid()}\b"):
            reproduce.reproduce("tiny", say=lambda line: None)


def hear_interrupts():
    """What a shell starts in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.xdist_group("papermill")
def test_ctrl_c_lets_every_kernel_write_its_checkpoint(checkout, results):
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
    assert errors.count("\n") == 1 and lines_with(errors, 0, 2), "0 of 2 are finished"
    assert all((place / "kept.json").exists() for place in places)


def test_a_lock_file_of_a_killed_process_blocks_nobody(tmp_path):
    """A process that was killed leaves its file; the system has released the lock."""
    program = ("import os, sys; from pathlib import Path\n"
               "from hybridrl_lib.records.locks import only_writer\n"
               "with only_writer(Path(sys.argv[1]), 'It'): os._exit(1)")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, cwd=ROOT)
    assert (tmp_path / ".lock").is_file()
    with only_writer(tmp_path, "It"):
        with pytest.raises(UserError), only_writer(tmp_path, "It"):
            pass
    assert not (tmp_path / ".lock").exists()
    import shlex

    from hybridrl_lib.config.presets import split_overrides

    settings = ["model.path=/a b/c.gguf", "rl.beta=0.5"]
    assert split_overrides(shlex.join(settings)) == settings


def test_a_missing_notebook_is_named(tmp_path, fast, monkeypatch):
    """Before anything starts."""
    monkeypatch.setattr(reproduce, "project_folder", lambda: tmp_path)
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks" / "10_sft.ipynb", "")
    with pytest.raises(UserError, match="11_rl.ipynb"):
        reproduce.reproduce("tiny", setups=["rl"], say=lambda line: None)


def test_jobs_follow_the_machine(monkeypatch, tmp_path):
    """One job per GPU or per core with memory; the longest setups come first."""
    monkeypatch.setattr(plan_module, "usable_cores", lambda: 8)
    monkeypatch.setattr(plan_module, "main_memory", lambda: 16.0)
    assert plan_module.default_jobs("tiny", 7, 0) == 7
    assert plan_module.default_jobs("tiny", 70, 0) == 8
    assert plan_module.default_jobs("smollm2", 7, 0) == 2
    assert plan_module.default_jobs("paper", 7, 4) == 4
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert plan_module.gpus_for("smollm2", ()) == plan_module.gpus_for(
        "tiny", ["model.device=auto"]) == 4
    assert plan_module.gpus_for("tiny", ()) == 0  # it trains on the CPU
    assert plan_module.threads_for("tiny", 1) == plan_module.threads_for("tiny", 8) == 1
    assert plan_module.threads_for("smollm2", 2) == 4
    names = sorted(paper_setups(), key=lambda name: -plan_module.relative_cost(SETUPS[name]))
    assert names == ["rl_entropy", "rl", "sft_then_rl_entropy", "sft_then_rl", "sft_entropy", "sft",
                     "base"]


def test_a_notebook_without_a_finished_run_has_failed(tmp_path):
    """A notebook that trained nothing has failed; a reason is our sentence, a type, a last line."""
    failures = run_queue([job("empty", folder=tmp_path, record=RunFolder(tmp_path / "run")),
                          job("fine", folder=tmp_path)], 2)
    assert [failed.name for failed in failures] == ["empty"] and all(failures.values())
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
    assert list(run_queue([crashed]).values()) == ["Killed: 9"]


def test_a_kernel_that_did_not_start_is_started_again(tmp_path):
    """Two kernels that start together may get the same port."""
    death = "RuntimeError: Kernel died before replying to kernel_info"
    for bad_starts, lost in ((1, False), (2, False), (9, True)):
        folder = tmp_path / str(bad_starts)
        folder.mkdir()
        program = ("import pathlib, sys; tries = pathlib.Path('tries'); "
                   "tries.write_text((tries.read_text() if tries.exists() else '') + 'x'); "
                   f"len(tries.read_text()) > {bad_starts} or sys.exit({death!r})")
        lines = []
        failures = run_queue([job("one", folder=folder, command=(sys.executable, "-c", program))],
                             say=lines.append)
        assert list(failures.values()) == ([death] if lost else [])
        tries = min(bad_starts + 1, jobs.MOST_STARTS)
        assert len((folder / "tries").read_text()) == tries
        assert len(lines) == 2 * tries, "each start, each restart, and the end have a line"
        assert lines_with(lines[-1], "one", 1)


def test_each_slot_has_its_own_gpu(tmp_path, monkeypatch):
    """Two jobs on two GPUs never share one."""
    program = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    two = [job(name, folder=tmp_path, command=(sys.executable, "-c", program))
           for name in ("a", "b")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "4,7"}
    assert run_queue(two, 2, gpus=2, environment=environment) == {}
    assert {one.log.read_text().strip() for one in two} == {"4", "7"}
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    long, short = job("long", 9.0, folder=tmp_path), job("short", 1.0, folder=tmp_path)
    estimate = TimeLeft([long, short], slots=1)
    running = Running(long, None, 0, began=0.0)
    assert estimate.text([running]) == ""
    long.log.write_text("rl seed 0: step 7/10 (rl)\nrl seed 0: step 10/20 (rl)\n")
    assert lines_with(estimate.text([running]), 3, "min")
    estimate.finished(running)
    assert lines_with(estimate.text([]), 11, "s")

"""What goes wrong in ordinary use: one sentence, the right exit code, and nothing lost."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from facts import lines_with
from safetensors.torch import save_file

from hybridrl_lib.cli import main
from hybridrl_lib.records import files
from hybridrl_lib.records import run_folder as records
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.system.errors import UserError
from hybridrl_lib.training.checkpoints import Checkpoints

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def smoke(monkeypatch):
    """Runs take about a second."""
    monkeypatch.setenv("HYBRIDRL_SMOKE", "1")


@pytest.fixture()
def model(model_folders) -> str:
    """The setting that names a small random model."""
    return f"model.path={model_folders['qwen2']}"


@pytest.fixture()
def data_folder(tmp_path, monkeypatch) -> Path:
    """Invented rows in the format of the real ones, named by HYBRIDRL_DATA_DIR."""
    folder = tmp_path / "data"
    shutil.copytree(ROOT / "tests" / "data", folder)
    monkeypatch.setenv("HYBRIDRL_DATA_DIR", str(folder))
    return folder


@pytest.fixture()
def refused(capsys):
    """refused(words, code) runs a command that must fail; returns its one sentence."""
    def run(words: list[str], code: int = 1) -> str:
        capsys.readouterr()
        assert main(words) == code
        return one_sentence(capsys.readouterr().err)

    return run


def one_sentence(text: str) -> str:
    """The text on stderr, which must be one of our sentences and nothing else."""
    assert text.startswith("hybridrl: ") and text.count("\n") == 1, text
    assert "Traceback" not in text and "HYBRIDRL_DEBUG" not in text  # of unexpected errors
    assert text.rstrip().endswith((".", "?"))
    return text


def test_unknown_words_name_the_nearest(refused, results, model):
    """Setup, preset, key, value, and experiment are refused before anything is written."""
    for words, nearest in (
            (["run", "sft_than_rl"], "'sft_then_rl'"),
            (["run", "rl", "--preset", "smolm"], "'smollm2'"),
            (["run", "rl", "--set", "rl.groupsize=4"], "'rl.group_size'"),
            (["run", "rl", "--set", "rl.kl_anchor=ol"], "old"),
            (["run", "rl", "--set", "data.benchmarks=gsm9k"], "gsm8k"),
            (["run", "rl", "--set", "rl.group_size=1"], "rl.group_size"),
            (["run", "rl", "--set", "rl.group_size"], "section.key=value"),
            (["reproduce", "--set", "rl.bta=0"], "'rl.beta'")):
        assert nearest in refused(words, 2), words
    assert not results.exists()
    assert "../up" in refused(["run", "sft", "--experiment", "../up", "--set", model])
    assert not results.exists()


REAL = ["run", "sft", "--preset", "smollm2", "--set"]


def test_rows_without_a_usable_answer(refused, data_folder, model, monkeypatch, tmp_path):
    """The row, problem, or file is named; a gold that cannot be parsed is never a reward of 0."""
    smallest = ["data.train_limits=()", "data.validation_limits=()", "data.test_limits=()"]
    for file, value, named in (
            ("gsm8k/train.jsonl", "no last line", (3, "train.jsonl")),
            ("math500/test.jsonl", "", (3, "test.jsonl")),
            ("math500/test.jsonl", "\\frac{", ("math500/test",))):
        before = (data_folder / file).read_text()
        lines = before.splitlines()
        lines[2] = json.dumps({**json.loads(lines[2]), "answer": value})
        (data_folder / file).write_text("\n".join(lines) + "\n")
        assert lines_with(refused([*REAL, model, *smallest]), *named), (file, value)
        (data_folder / file).write_text(before)
    monkeypatch.setenv("HYBRIDRL_DATA_DIR", str(tmp_path / "nowhere"))
    assert "gsm8k/train.jsonl" in refused([*REAL, model])


def test_models_that_cannot_be_read(refused, tmp_path, model_folders):
    """No tokenizer, half of the weights, no GGUF, no such path: each is named."""
    shutil.copytree(model_folders["qwen2"], tmp_path / "model",
                    ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer" in refused(["run", "sft", "--set", f"model.path={tmp_path / 'model'}"])
    shutil.copytree(model_folders["qwen2"], tmp_path / "model", dirs_exist_ok=True)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert lines_with(refused(["run", "sft", "--set", f"model.path={tmp_path / 'model'}"]), "model")
    file = tmp_path / "half.gguf"
    for content in (b"GGUF\x03\x00\x00\x00", b"", b"<html>not found</html>" * 9):
        file.write_bytes(content)
        assert "half.gguf" in refused(["run", "sft", "--set", f"model.path={file}"]), content
    for name in ("folder", "file.gguf"):
        said = refused(["run", "sft", "--set", f"model.path={tmp_path / name}"])
        assert str(tmp_path / name) in said and "HF_HUB_OFFLINE" not in said


def test_unreachable_hub(refused, monkeypatch):
    """Without the hub, the error suggests a folder, for the model and for the data."""
    monkeypatch.delenv("HYBRIDRL_DATA_DIR", raising=False)
    said = refused(["run", "sft", "--set", "model.path=nobody/no-model"])
    assert "nobody/no-model" in said and "model.path" in said and "GGUF" in said
    assert "HYBRIDRL_DATA_DIR" in refused(["run", "sft", "--preset", "smollm2"])
    from huggingface_hub import constants

    from hybridrl_lib.system import hub

    program = ("from hybridrl_lib.system import hub\n"
               "from huggingface_hub import constants, get_session\n"
               "with hub.cache_only_if_unreachable(): assert constants.HF_HUB_OFFLINE\n"
               "assert not constants.HF_HUB_OFFLINE\nhub.ask = lambda *_: ''\n"
               "with hub.cache_only_if_unreachable(): assert not constants.HF_HUB_OFFLINE\n")
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | closed,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    with hub.cache_only_if_unreachable():
        assert constants.HF_HUB_OFFLINE  # the tests' own choice, which is kept
    assert constants.HF_HUB_OFFLINE


def test_run_made_with_other_settings(refused, results, model):
    """The difference is shown, and the record is not changed."""
    assert main(["run", "sft", "--set", model]) == 0
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    message = refused(["run", "sft", "--set", model, "sft.learning_rate=0.5", "sft.gamma=0"])
    assert "sft.learning_rate: 0.0002 -> 0.5" in message and "sft.gamma: 0.1 -> 0" in message
    assert "--experiment" in message
    assert before == {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert main(["run", "sft", "--set", model]) == 0
    (results / "tiny-smoke" / "sft" / "seed-0" / "config.json").write_text('{"setup"')
    assert "config.json" in refused(["run", "sft", "--set", model])


def test_a_run_that_another_process_writes(refused, results, model):
    """Two processes in one folder would mix their logs."""
    from hybridrl_lib.records.locks import only_writer

    with only_writer(results / "tiny-smoke" / "sft" / "seed-0", "The run"):
        assert str(os.getpid()) in refused(["run", "sft", "--set", model])
    refused(["run", "sft", "--set", "model.path=/no/such/model"])
    assert main(["run", "sft", "--set", model]) == 0


@contextmanager
def small_files(size):
    """Inside, no file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_checkpoint_on_a_full_disk(tmp_path):
    """Whichever library reaches the end of the disk, the older checkpoint remains and is found."""
    checkpoints = Checkpoints(RunFolder(tmp_path / "run"))
    checkpoints.save(5, lambda folder: (folder / "state.json").write_text("{}"))
    for write in (lambda folder: save_file({"w": torch.zeros(100_000)}, folder / "w.safetensors"),
                  lambda folder: torch.save(torch.zeros(100_000), folder / "w.pt"),
                  lambda folder: files.write_whole(folder / "w.json", "0" * 400_000)):
        with small_files(10_000), pytest.raises(UserError, match="HYBRIDRL_RESULTS_DIR") as caught:
            checkpoints.save(10, write)
        assert "\n" not in str(caught.value)
        assert checkpoints.resume(pytest.fail) == (5, checkpoints.root / "step-000005")
        assert [path.name for path in checkpoints.root.iterdir()] == ["step-000005"]


def test_disk_full_in_the_middle_of_a_run(refused, results, model, monkeypatch):
    """The run stops with one sentence and resumes from the checkpoint before."""
    words = ["run", "rl", "--set", model]
    replace = os.replace

    def full(source, target):
        if str(target).endswith("step-000010"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(records.os, "replace", full)
        message = refused(words)
    assert "No space left" in message and "HYBRIDRL_RESULTS_DIR" in message
    run = RunFolder(results / "tiny-smoke" / "rl" / "seed-0")
    assert main(words) == 0 and run.is_complete
    assert run.read("manifest.json")["resumed_from"] == [5]
    steps = [row["step"] for row in run.lines("metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    words = ["run", "base", "--set", model]
    with small_files(20_000):
        message = refused(words)
    assert "HYBRIDRL_RESULTS_DIR" in message
    assert main(words) == 0


def test_ctrl_c_writes_a_checkpoint_and_the_same_command_resumes(results, model):
    """The step is finished, the checkpoint is written, and no step is lost or taken twice."""
    words = ["run", "sft", "--set", model, "training.epochs=20", "training.checkpoint_every=9999",
             "training.validate_every=9999", "probe.every=9999"]
    process = subprocess.Popen([sys.executable, "-m", "hybridrl_lib.cli", *words], cwd=ROOT,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run = RunFolder(results / "tiny-smoke" / "sft" / "seed-0")
    try:
        until = time.monotonic() + 600  # a busy machine is slow, not hung
        while len(run.lines("metrics.jsonl")) < 2:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    kept = Checkpoints(run).found()[0][0]
    assert lines_with(one_sentence(errors), kept), "the step is named"
    assert kept == len(run.lines("metrics.jsonl")) > 1

    assert main(words) == 0 and run.is_complete
    assert run.read("manifest.json")["resumed_from"] == [kept]
    steps = [row["step"] for row in run.lines("metrics.jsonl")]
    assert steps == list(range(1, 20 * 3 + 1))

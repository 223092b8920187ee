"""What goes wrong in ordinary use: one sentence each, the right exit code, and nothing lost."""

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
    """Runs are cut down to about a second."""
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
    """What stands on stderr, if it is one of our sentences and nothing else."""
    assert text.startswith("hybridrl: ") and text.count("\n") == 1, text
    assert "Traceback" not in text and "Unexpected error" not in text
    assert text.rstrip().endswith((".", "?"))
    return text


# Wrong words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "nearest"), [
    (["run", "sft_than_rl"], "'sft_then_rl'"),
    (["run", "rl", "--preset", "smolm"], "'smollm2'"),
    (["run", "rl", "--set", "rl.groupsize=4"], "'rl.group_size'"),
    (["run", "rl", "--set", "rl.kl_anchor=ol"], "did you mean old"),
    (["run", "rl", "--set", "data.benchmarks=gsm9k"], "gsm8k"),
    (["run", "rl", "--set", "rl.group_size=1"], "at least 2"),
    (["run", "rl", "--set", "rl.group_size"], "section.key=value"),
    (["reproduce", "--set", "rl.bta=0"], "'rl.beta'"),
])
def test_unknown_words_name_the_nearest(refused, results, words, nearest):
    """Setup, preset, key and value: the call is refused before anything is written."""
    assert nearest in refused(words, 2)
    assert not results.exists()


def test_experiment_cannot_leave_the_results(refused, results, model):
    """A name is a folder's name, never a path."""
    assert "folder name" in refused(["run", "sft", "--experiment", "../up", "--set", model])
    assert not results.exists()


# Data ------------------------------------------------------------------------------------------


REAL = ["run", "sft", "--preset", "smollm2", "--set"]


def test_missing_data_folder(refused, monkeypatch, tmp_path, model):
    """The sentence says which files the folder should hold."""
    monkeypatch.setenv("HYBRIDRL_DATA_DIR", str(tmp_path / "nowhere"))
    assert "gsm8k/train.jsonl" in refused([*REAL, model])


@pytest.mark.parametrize(("file", "column", "value", "named"), [
    ("gsm8k/train.jsonl", "answer", "no last line", "line 3 of"),
    ("math500/test.jsonl", "answer", "", "line 3 of"),
    ("math500/test.jsonl", "answer", "\\frac{", "math500/test/"),
])
def test_rows_without_a_usable_answer(refused, data_folder, model, file, column, value, named):
    """The row or the problem is named; a gold that cannot be parsed never becomes a reward of 0."""
    lines = (data_folder / file).read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), column: value})
    (data_folder / file).write_text("\n".join(lines) + "\n")
    smallest = ["data.train_limits=()", "data.validation_limits=()", "data.test_limits=()"]
    assert named in refused([*REAL, model, *smallest])


# Models ----------------------------------------------------------------------------------------


def test_model_folder_without_tokenizer(refused, tmp_path, model_folders):
    """transformers would make one up, and train on nonsense."""
    shutil.copytree(model_folders["qwen2"], tmp_path / "model",
                    ignore=shutil.ignore_patterns("tokenizer*"))
    assert "no tokenizer" in refused(["run", "sft", "--set", f"model.path={tmp_path / 'model'}"])


def test_model_folder_with_cut_off_weights(refused, tmp_path, model_folders):
    """A download that broke off is named with its folder."""
    shutil.copytree(model_folders["qwen2"], tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "cannot be loaded" in refused(
        ["run", "sft", "--set", f"model.path={tmp_path / 'model'}"])


@pytest.mark.parametrize("content", [b"GGUF\x03\x00\x00\x00", b"", b"<html>not found</html>" * 9])
def test_gguf_that_is_cut_off(refused, tmp_path, content):
    """Half a file, an empty one and a web page saved under its name."""
    file = tmp_path / "half.gguf"
    file.write_bytes(content)
    assert "may be cut off" in refused(["run", "sft", "--set", f"model.path={file}"])


def test_model_path_that_is_not_there(refused, tmp_path):
    """A path is never taken for a hub name."""
    for name in ("folder", "file.gguf"):
        assert "There is no" in refused(["run", "sft", "--set", f"model.path={tmp_path / name}"])


def test_unreachable_hub(refused, monkeypatch):
    """Without a hub the way out is a folder, for the model and for the data."""
    monkeypatch.delenv("HYBRIDRL_DATA_DIR", raising=False)
    assert "local folder or GGUF file" in refused(
        ["run", "sft", "--set", "model.path=nobody/no-model"])
    assert "HYBRIDRL_DATA_DIR" in refused(["run", "sft", "--preset", "smollm2"])


def test_unreachable_hub_is_asked_once():
    """The hub's libraries would try again for most of a minute, with a line each time."""
    from huggingface_hub import constants

    from hybridrl_lib.system import hub

    program = (
        "from hybridrl_lib import hub\n"
        "from huggingface_hub import constants, get_session\n"
        "with hub.cache_only_if_unreachable(): assert constants.HF_HUB_OFFLINE\n"
        "assert not constants.HF_HUB_OFFLINE\n"
        "hub.ask = lambda *_: ''\n"
        "with hub.cache_only_if_unreachable(): assert not constants.HF_HUB_OFFLINE\n")
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | closed,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    with hub.cache_only_if_unreachable():
        assert constants.HF_HUB_OFFLINE  # the tests' own choice, which stays as it is
    assert constants.HF_HUB_OFFLINE


# A folder that is taken ------------------------------------------------------------------------


def test_run_made_with_other_settings(refused, results, model):
    """The difference is shown, and the record stays as it was."""
    assert main(["run", "sft", "--set", model]) == 0
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    message = refused(["run", "sft", "--set", model, "sft.learning_rate=0.5", "sft.gamma=0"])
    assert "sft.learning_rate: 0.0002 -> 0.5" in message and "sft.gamma: 0.1 -> 0" in message
    assert "--experiment" in message
    assert before == {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}


def test_a_run_that_never_began_binds_nobody(refused, results, model):
    """After a misspelled model path the corrected command works."""
    refused(["run", "sft", "--set", "model.path=/no/such/model"])
    assert main(["run", "sft", "--set", model]) == 0


def test_a_run_that_another_process_writes(refused, results, model):
    """Two processes in one folder would mix their logs."""
    from hybridrl_lib.records.locks import only_writer

    with only_writer(results / "tiny-smoke" / "sft" / "seed-0", "The run"):
        assert str(os.getpid()) in refused(["run", "sft", "--set", model])


def test_damaged_record(refused, results, model):
    """A config.json that somebody has cut off is named."""
    assert main(["run", "sft", "--set", model]) == 0
    (results / "tiny-smoke" / "sft" / "seed-0" / "config.json").write_text('{"setup"')
    assert "config.json" in refused(["run", "sft", "--set", model])


# A full disk -----------------------------------------------------------------------------------


@contextmanager
def small_files(size):
    """Inside, no file can grow beyond `size` bytes.

    No longer than the call under test: the limit holds for the whole process, also for the file
    that pytest's own output may go to.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", [
    lambda folder: save_file({"w": torch.zeros(100_000)}, folder / "w.safetensors"),
    lambda folder: torch.save(torch.zeros(100_000), folder / "w.pt"),
    lambda folder: files.write_whole(folder / "w.json", "0" * 400_000),
], ids=["safetensors", "torch", "text"])
def test_checkpoint_on_a_full_disk(tmp_path, write):
    """Whichever library hits the end of the disk, the older checkpoint stays and is found."""
    checkpoints = Checkpoints(RunFolder(tmp_path / "run"))
    checkpoints.save(5, lambda folder: (folder / "state.json").write_text("{}"))
    with small_files(10_000), pytest.raises(UserError, match="free some space") as caught:
        checkpoints.save(10, write)
    assert "\n" not in str(caught.value)
    assert checkpoints.resume(pytest.fail) == (5, checkpoints.root / "step-000005")
    assert [path.name for path in checkpoints.root.iterdir()] == ["step-000005"]


def test_disk_full_in_the_middle_of_a_run(refused, results, model, monkeypatch):
    """The run stops in one sentence and goes on from the checkpoint before."""
    words = ["run", "rl", "--set", model]
    replace = os.replace

    def full(source, target):
        if str(target).endswith("step-000010"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(records.os, "replace", full)
        message = refused(words)
    assert "No space left" in message and "goes on from the last checkpoint" in message
    run = RunFolder(results / "tiny-smoke" / "rl" / "seed-0")
    assert main(words) == 0 and run.is_complete
    assert run.read("manifest.json")["resumed_from"] == [5]
    steps = [row["step"] for row in run.lines("metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_disk_full_for_the_final_model(refused, results, model):
    """Even the last file of a run is written later without training again."""
    words = ["run", "base", "--set", model]
    with small_files(20_000):
        message = refused(words)
    assert "free some space" in message
    assert main(words) == 0


# Ctrl-C ----------------------------------------------------------------------------------------


def test_ctrl_c_keeps_a_checkpoint_and_the_same_command_goes_on(results, model):
    """The step is finished, the checkpoint written, and no step is lost or taken twice."""
    words = ["run", "sft", "--set", model, "training.epochs=40", "training.checkpoint_every=9999",
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
    assert "goes on from there" in one_sentence(errors)
    kept = Checkpoints(run).found()[0][0]
    assert kept == len(run.lines("metrics.jsonl")) > 1

    assert main(words) == 0 and run.is_complete
    assert run.read("manifest.json")["resumed_from"] == [kept]
    steps = [row["step"] for row in run.lines("metrics.jsonl")]
    assert steps == list(range(1, 40 * 3 + 1))

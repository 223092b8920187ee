"""Several processes train as one does; here two of them on the CPU, with gloo."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from several_processes import start

from hybridrl_lib.experiments.run import run
from hybridrl_lib.learning import sharing
from hybridrl_lib.policy.packing import PromptCompletion
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.system import processes
from hybridrl_lib.system.errors import UsageError

pytestmark = pytest.mark.xdist_group("processes")
TESTS = Path(__file__).parents[1]
LOGS = ("metrics.jsonl", "probe.jsonl", "validation.jsonl", "samples.jsonl", "eval.jsonl")
# Both stages with every term of the loss; a method that keeps its own numbers; one that draws each
# step's loss by a norm it measures; an adapter, a reference in the loss, several updates per
# batch, and dynamic sampling.
FULL = {"setup": "sft_then_rl_entropy"}
CASES = (FULL, {"setup": "chord_phi"},
         {"setup": "sasr", "settings": ["sasr.gamma=0.5", "evaluation.samples=0",
                                        "evaluation.train_samples=0"]},
         {"setup": "rl", "settings": [
             "model.adapter=lora", "rl.kl_anchor=reference", "rl.updates_per_rollout=2",
             "rl.dynamic_sampling_rounds=2"]})
SETUPS = [case["setup"] for case in CASES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the same runs by one process and by two; one is stopped and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    place = {"HYBRIDRL_RESULTS_DIR": str(folder)}
    start([{**case, "experiment": "one"} for case in CASES], processes=1, **place)
    start([{**FULL, "experiment": "two", "stop": [5, 1]},
           *({**case, "experiment": "two"} for case in CASES)], **place)
    return folder


def record(runs: Path, experiment: str, setup: str) -> dict[str, list]:
    folder = RunFolder(runs / experiment / setup / "seed-0")
    return {name: folder.lines(name) for name in LOGS}


def same(one, other) -> bool:
    """Whether two values of a record are the same but for rounding and times."""
    if isinstance(one, dict):
        return set(one) == set(other) and all(
            key.startswith("seconds/") or same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) or isinstance(other, float):
        return other == pytest.approx(one, rel=1e-3, abs=1e-6)
    return one == other


@pytest.mark.slow
def test_the_record_is_that_of_one_process(runs):
    """The same problems, answers, verdicts, losses, and norms, also after a stop that one of the
    processes was asked for, and a resumption."""
    wrong = []
    for setup in SETUPS:
        mine, theirs = record(runs, "one", setup), record(runs, "two", setup)
        assert len(mine["metrics.jsonl"]) > 5 and mine["eval.jsonl"]
        wrong += [f"{setup} {log}: {row} {its}" for log in LOGS for row, its in
                  itertools.zip_longest(mine[log], theirs[log]) if not same(row, its)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_gradients_and_weights_are_those_of_one_process(runs):
    """The sum over the processes: a mean, or a part counted twice, would show."""
    for setup in SETUPS:
        one, other = (runs / name / setup / "seed-0" for name in ("one", "two"))
        mine, theirs = (torch.load(folder / "gradients.pt") for folder in (one, other))
        mine = mine[len(mine) - len(theirs):]  # what was taken after the resumption
        assert len(mine) > 3
        for gradient, its in zip(mine, theirs, strict=True):
            assert float((its - gradient).norm()) < 1e-3 * float(gradient.norm()) + 1e-7, setup
        weights, others = (load_file(next((folder / "checkpoint" / "final").glob(
            "*.safetensors"))) for folder in (one, other))
        assert set(weights) == set(others)
        assert all(torch.allclose(weights[name], others[name], atol=1e-4) for name in weights)


@pytest.mark.slow
def test_a_drawn_step_is_the_same_in_every_process(runs):
    """SASR's draw follows a norm that all processes measure together; otherwise one might sample
    while the other is taught. Steps of both kinds, and a probability that changes."""
    one, two = ([row for row in record(runs, experiment, "sasr")["metrics.jsonl"]
                 if "sasr/p" in row] for experiment in ("one", "two"))
    drawn = [row["lambda/sft"] for row in one]
    assert [row["lambda/sft"] for row in two] == drawn and set(drawn) == {0, 1}
    chances = [row["sasr/p"] for row in one]
    assert [row["sasr/p"] for row in two] == pytest.approx(chances, rel=1e-3)
    assert len(set(chances)) > 1


@pytest.mark.slow
def test_one_process_writes_and_says_how_many_there_were(runs):
    """The manifest counts the processes and the verdicts of all of them, each once."""
    one, two = (RunFolder(runs / name / "sft_then_rl_entropy" / "seed-0").read("manifest.json")
                for name in ("one", "two"))
    assert (one["processes"], two["processes"], two["resumed_from"]) == (1, 2, [5])
    assert {k: v for k, v in one["verdicts"].items() if v} == {
        k: v for k, v in two["verdicts"].items() if v}


@pytest.mark.slow
def test_a_failure_in_one_process_ends_all_with_one_sentence(results):
    """The other process neither waits forever nor complains that one is gone."""
    texts = start([{**FULL, "experiment": "failing", "fail": 1}])
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    assert lines == ["hybridrl: This process has failed."]


def launch(tmp_path, *options) -> subprocess.CompletedProcess:
    """`accelerate launch` itself, on the CPU and without this machine's configuration."""
    environment = {key: value for key, value in os.environ.items()
                   if not key.startswith(("ACCELERATE_", "FSDP_", "MASTER_"))}
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", "2",
         "--main_process_port", "0", str(TESTS / "launched.py")], text=True, check=False,
        capture_output=True, timeout=300, env=environment | {
            "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path),
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])})


@pytest.mark.slow
def test_the_launcher_itself_starts_two_processes(tmp_path):
    """What the installed release leaves in the environment is what this library reads; with --cpu
    it starts one process of two, which is refused, and so is FSDP."""
    done = launch(tmp_path, "--multi_gpu")
    assert not done.returncode, done.stderr
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("process"))
    assert said == [f"process {rank} of 2" for rank in range(2)]
    for options, fact in ((("--cpu",), "--multi_gpu"),
                          (("--use_fsdp", "--fsdp_version", "2"), "--use_fsdp")):
        done = launch(tmp_path, *options)
        assert done.returncode
        assert any(line.startswith("hybridrl: ") and fact in line
                   for line in done.stderr.splitlines())


# Without processes ------------------------------------------------------------------------------


def test_completions_are_divided_in_whole_groups_and_evenly(monkeypatch):
    """Every completion is learned from once, and no process gets all the long ones."""
    sequences = [PromptCompletion([prompt] * 5, [1] * length) for prompt, lengths in
                 enumerate(([3, 3], [40], [20, 20], [2], [2, 1])) for length in lengths]
    parts = []
    for rank in range(3):
        monkeypatch.setattr(sharing, "size", lambda: 3)
        monkeypatch.setattr(sharing, "rank", lambda rank=rank: rank)
        parts.append(sharing.my_sequences(sequences))
    assert sorted(sum(parts, [])) == list(range(len(sequences)))
    owners = [{tuple(sequences[i].prompt) for i in part} for part in parts]
    assert sum(map(len, owners)) == 5
    costs = [sum(len(sequences[i].completion) for i in part) for part in parts]
    assert max(costs) <= 40


def test_what_a_launch_cannot_do_is_refused(monkeypatch):
    """Before a model is loaded: a launcher that starts one process of several, FSDP, and vllm."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="--multi_gpu"):
        processes.begin("cpu")
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="--use_fsdp"):
        processes.begin("cpu")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="model.sampler"):
        run("sft", settings=["model.sampler=vllm"])

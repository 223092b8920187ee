"""Training, sampling and memory on a GPU; `pytest -m gpu` runs these tests where there is one.

Where it is cheap the same test runs on the CPU, so that it is known to be right itself.
"""

import math
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from small_training import distance, make_trainer, small_settings

from hybridrl_lib.config.sections import ModelSettings
from hybridrl_lib.learning.learner import Learner, in_order
from hybridrl_lib.policy.loading import load_policy
from hybridrl_lib.policy.packing import PromptCompletion
from hybridrl_lib.policy.sampling import sample
from hybridrl_lib.system.errors import Stopped
from hybridrl_lib.training.observer import Observer

ROOT = Path(__file__).parents[2]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
# How far a score may be from the exact one: the step of each number format, times some layers.
CLOSE = {"fp32": 1e-3, "bf16": 0.15, "fp16": 0.02}


@pytest.fixture()
def load(model_folders):
    """load(device, ...) -> a fresh policy there."""
    def make(device, precision="fp32", adapter="none"):
        if precision == "bf16" and device == "cuda" and (
                torch.cuda.get_device_capability() < (8, 0)):
            pytest.skip("this GPU has no bf16")
        return load_policy(ModelSettings(path=str(model_folders["qwen2"]), device=device,
                                         precision=precision, adapter=adapter))
    return make


def train(policy, folder, setup, *overrides, observer=None):
    trainer = make_trainer(setup, *overrides, policy=policy, folder=folder, observer=observer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_two_steps(load, tmp_path, device, precision, adapter):
    """Both losses of the paper at once: finite, of the value that exact arithmetic on a CPU gives,
    and the weights that move are fp32 and on the device."""
    policy = load(device, precision, adapter)
    before = {name: w.detach().clone() for name, w in policy.trained_weights().items()}
    setting = ("combined", "training.epochs=4", "rl.kl_anchor=reference")
    trainer = train(policy, tmp_path / "run", *setting)
    exact = train(load("cpu", "fp32", adapter), tmp_path / "exact", *setting)
    rows, wanted = (t.folder.lines("metrics.jsonl") for t in (trainer, exact))
    assert len(rows) == len(wanted) == 2
    for row in rows:
        assert not row.get("updates_not_finite") and math.isfinite(row["loss/rl"])
    assert rows[0]["loss/sft"] == pytest.approx(wanted[0]["loss/sft"], rel=CLOSE[precision])
    after = policy.trained_weights()
    assert all(w.dtype == torch.float32 and w.device.type == device and w.isfinite().all()
               for w in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    moments = [value for state in trainer.learner.optimizer.optimizer.state.values()
               for name, value in state.items() if name != "step"]
    assert moments and all(m.dtype == torch.float32 and m.device.type == device for m in moments)


def test_scores_of_several_places_are_brought_to_one():
    """A demonstration's zeros are made in main memory, a rollout's anchor on the GPU: what is not
    brought together piece by piece ends the run."""
    values = [torch.zeros(2), torch.zeros(3, device="meta")]
    found = in_order(values, torch.tensor([1, 1, 1, 0, 0]), "meta")
    assert found.shape == (5,) and found.device.type == "meta"


def flat(policy) -> torch.Tensor:
    return torch.cat([w.detach().flatten().cpu() for w in policy.trained_weights().values()])


class EndsAfter(Observer):
    """Ends a run after a step, with its checkpoint written."""

    def __init__(self, step):
        self.step = step

    def on_step(self, row, total):
        if row["step"] == self.step + 1:
            raise Stopped("Stopped.")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_run_goes_on_where_it_stopped(load, tmp_path, device, precision):
    """Weights, moments, loss scale and step: bit for bit on a CPU; a GPU adds up in an order of
    its own each time, so that there the ways that the weights have gone are compared."""
    setting = ("training.epochs=4", "training.checkpoint_every=2", "training.warmup_steps=2",
               "sft.learning_rate=1e-3")
    start = flat(load(device, precision))
    whole = train(load(device, precision), tmp_path / "whole", "sft", *setting)
    with pytest.raises(Stopped):
        train(load(device, precision), tmp_path / "cut", "sft", *setting, observer=EndsAfter(2))
    again = train(load(device, precision), tmp_path / "cut", "sft", *setting)
    assert again.resumed_from == [2] and again.step == whole.step == 4
    gone, wanted = flat(again.policy) - start, flat(whole.policy) - start
    assert gone.norm() > 0
    assert torch.equal(gone, wanted) if device == "cpu" else distance(gone, wanted) < 0.02


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_sampler_and_the_learner_score_alike(load, device, precision, adapter):
    """The log-probabilities of sampled tokens are those of the training pass, before and after the
    weights have moved; on a GPU the sampler replays CUDA graphs."""
    policy = load(device, precision, adapter)
    learner = Learner(policy, small_settings())
    for shift in (0.0, 0.01):
        with torch.no_grad():
            for weight in policy.trained_weights().values():
                weight.add_(shift)
        groups = sample(policy, [[5, 6, 7], [8, 9, 10, 11, 12]], samples=8, max_new_tokens=20,
                        temperature=1.0, seed=1)
        completions = [(g.prompt_ids, c) for g in groups for c in g.completions]
        scores = learner.scores([PromptCompletion(p, c.token_ids) for p, c in completions],
                                temperature=1.0)
        sampled = torch.cat([torch.tensor(c.log_probabilities) for _, c in completions])
        error = (torch.cat([s.cpu() for s in scores]) - sampled).abs()
        assert error.mean() < CLOSE[precision] / 3 and error.max() < 3 * CLOSE[precision]


@pytest.mark.gpu
@pytest.mark.parametrize("more", [(), ("model.adapter=lora", "model.gradient_checkpointing=true")])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_estimate_is_within_a_fifth_of_what_is_measured(precision, more):
    """As tests/test_memory.py on a CPU: every phase of a run of 30 million weights, in a process of
    its own, by the same function."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from memory import LENGTHS, WIDE, measure

    settings = (*LENGTHS, "model.device=cuda", f"model.precision={precision}", *more)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        points = pool.apply(measure, (WIDE, settings, 1))
    assert len(points) == 5
    for point in points:
        assert 0.8 < point["estimated_mib"] / point["measured_mib"] < 1.2, point

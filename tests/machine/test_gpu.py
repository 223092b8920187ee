"""Training, sampling, and memory on a GPU; `pytest -m gpu` runs these tests where there is one.

Where it is cheap the same test runs on the CPU, so that the test itself is known to be right.
"""

import math
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from small_training import distance, make_trainer, rows_of, small_settings

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


CASES = [(precision, adapter) for precision in CLOSE for adapter in ("none", "lora")]
DEVICES = pytest.mark.parametrize("device", ["cpu", GPU])


@pytest.fixture()
def load(model_folders):
    """load(device, ...) -> a fresh policy there."""
    def make(device, precision="fp32", adapter="none"):
        return load_policy(ModelSettings(path=str(model_folders["qwen2"]), device=device,
                                         precision=precision, adapter=adapter))
    return make


def supported(device, precision) -> bool:
    return not (precision == "bf16" and device == "cuda"
                and torch.cuda.get_device_capability() < (8, 0))


def train(policy, folder, setup, *overrides, observer=None):
    trainer = make_trainer(setup, *overrides, policy=policy, folder=folder, observer=observer)
    trainer.train()
    return trainer


@DEVICES
def test_two_steps(load, tmp_path, device):
    """Both losses of the paper at once: finite, of the value that exact arithmetic on a CPU gives,
    and the weights that move are fp32 and on the device."""
    setting = ("combined", "training.epochs=4", "rl.kl_anchor=reference")
    exact = {adapter: rows_of(train(load("cpu", "fp32", adapter), tmp_path / f"exact-{adapter}",
                                    *setting)) for adapter in ("none", "lora")}
    for precision, adapter in CASES:
        if not supported(device, precision):
            continue
        policy = load(device, precision, adapter)
        before = {name: w.detach().clone() for name, w in policy.trained_weights().items()}
        trainer = train(policy, tmp_path / f"{precision}-{adapter}", *setting)
        rows, wanted = rows_of(trainer), exact[adapter]
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
        assert moments and all(m.dtype == torch.float32 and m.device.type == device
                               for m in moments)


def test_scores_of_several_places_are_brought_to_one():
    """A demonstration's zeros are in main memory, a rollout's anchor is on the GPU: every piece is
    moved, or the run fails."""
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


@DEVICES
def test_a_run_resumes_where_it_stopped(load, tmp_path, device):
    """Weights, moments, loss scale, and step: bit for bit on a CPU; a GPU adds in a different
    order each time, so there the distances that the weights have moved are compared."""
    setting = ("training.epochs=4", "training.checkpoint_every=2", "training.warmup_steps=2",
               "sft.learning_rate=1e-3")
    for precision in ("fp32", "fp16"):
        start = flat(load(device, precision))
        whole = train(load(device, precision), tmp_path / f"whole-{precision}", "sft", *setting)
        cut = tmp_path / f"cut-{precision}"
        with pytest.raises(Stopped):
            train(load(device, precision), cut, "sft", *setting, observer=EndsAfter(2))
        again = train(load(device, precision), cut, "sft", *setting)
        assert again.resumed_from == [2] and again.step == whole.step == 4
        gone, wanted = flat(again.policy) - start, flat(whole.policy) - start
        assert gone.norm() > 0
        assert (torch.equal(gone, wanted) if device == "cpu" else
                distance(gone, wanted) < 0.02), precision


@DEVICES
def test_the_sampler_and_the_learner_score_alike(load, device):
    """The log-probabilities of sampled tokens are those of the training pass, before and after the
    weights have moved; on a GPU the sampler replays CUDA graphs."""
    for precision, adapter in CASES:
        if not supported(device, precision):
            continue
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
            assert error.mean() < CLOSE[precision] / 3, (precision, adapter)
            assert error.max() < 3 * CLOSE[precision], (precision, adapter)


@pytest.mark.gpu
def test_the_estimate_is_within_a_fifth_of_what_is_measured():
    """Like tests/machine/test_memory.py on a CPU: every phase of a run of 30 million weights, in
    its own process, by the same function."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from memory import LENGTHS, WIDE, measure

    for precision in ("fp32", "fp16"):
        for more in ((), ("model.adapter=lora", "model.gradient_checkpointing=true")):
            settings = (*LENGTHS, "model.device=cuda", f"model.precision={precision}", *more)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                points = pool.apply(measure, (WIDE, settings, 1))
            assert len(points) == 5
            for point in points:
                assert 0.8 < point["estimated_mib"] / point["measured_mib"] < 1.2, point

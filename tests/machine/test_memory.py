"""The memory model: shapes, estimates against measurements, and what follows from them."""

import math
import multiprocessing
import re
import sys
from pathlib import Path

import pytest
import torch
from notebook_files import read
from small_training import rows_of, small_settings
from transformers import Qwen2Config

from hybridrl_lib.config.presets import load_settings
from hybridrl_lib.config.sections import ModelSettings
from hybridrl_lib.experiments.run import run
from hybridrl_lib.machine import memory, memory_estimate
from hybridrl_lib.machine.memory import GIB, fit, room_for, with_micro_batches
from hybridrl_lib.machine.memory_estimate import columns, estimate
from hybridrl_lib.machine.shapes import KNOWN_SHAPES, shape_from, shape_of
from hybridrl_lib.policy import sampling
from hybridrl_lib.policy.decoding import Decoder
from hybridrl_lib.policy.loading import load_policy
from hybridrl_lib.policy.sampling import sample
from hybridrl_lib.setups import SETUPS
from hybridrl_lib.system.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

QWEN = KNOWN_SHAPES["Qwen/Qwen2.5-0.5B"]
T4 = 0.9 * 14.6 * GIB
SHORT = ("data.max_prompt_tokens=32", "data.max_demonstration_tokens=32", "rl.max_new_tokens=32",
         "evaluation.max_new_tokens=32", "training.micro_batch_tokens=512",
         "training.logit_chunk_tokens=128", "sft.batch_size=8", "evaluation.batch_size=16")


# Shapes -------------------------------------------------------------------------------------------


def test_the_presets_models_have_their_published_sizes():
    """Counted from the shape alone, as their model cards say."""
    assert QWEN.parameters == 494_032_768
    assert KNOWN_SHAPES["HuggingFaceTB/SmolLM2-135M-Instruct"].parameters == 134_515_008
    for name in ("smollm2", "colab", "paper"):
        assert shape_of(load_settings(name, smoke=False).model) is not None


def test_a_shape_counts_what_a_model_has(make_policy, model_folders):
    """From the folder and from the loaded model: the same, with adapters, to the last weight; and
    for the shipped model."""
    for architecture in ("qwen2", "llama"):
        for rank in (0, 3):
            settings = {"adapter": "lora", "lora_rank": rank} if rank else {}
            policy = make_policy(architecture, **settings)
            model = ModelSettings(path=str(model_folders[architecture]), **settings)
            shape = shape_of(model)
            assert shape == shape_from(policy.model.config.to_dict())
            assert shape.parameters + shape.adapter(model) == policy.parameter_count()
            assert not rank or shape.adapter(model) == sum(
                w.numel() for w in policy.trained_weights().values())
    shipped = load_policy(ModelSettings(device="cpu"))
    assert shape_of(ModelSettings()).parameters == shipped.parameter_count()


def test_other_models_have_no_shape(tmp_path):
    """A GGUF file, and an architecture that is not covered: nothing is made up."""
    assert shape_of(ModelSettings(path="model.gguf")) is None
    assert shape_from({"model_type": "gpt_neox", "num_attention_heads": 4}) is None
    assert shape_from({"model_type": "qwen2"}) is None
    known = Qwen2Config().to_dict()
    assert shape_from(known).tied == known["tie_word_embeddings"] == shape_from(
        {k: v for k, v in known.items() if k != "tie_word_embeddings"}).tied
    (tmp_path / "config.json").write_text("{")
    assert shape_of(ModelSettings(path=str(tmp_path))) is None


def test_the_cache_grows_as_the_decoder_grows_it(policy, monkeypatch):
    """The columns before and after the last growth are those that were allocated."""
    sizes, make_room = [], Decoder._make_room

    def noted(self, cache, columns, rows=None):
        sizes.append(columns)
        make_room(self, cache, columns, rows)

    monkeypatch.setattr(Decoder, "_make_room", noted)
    policy.stop_ids = (10**6,)
    wrong = []
    for length in (1, 5, 16, 40, 130, 300):
        sizes[:] = [0]
        sample(policy, [[5, 6]], samples=2, max_new_tokens=length, temperature=1.0)
        if columns(length, "cpu") != tuple(sizes[-2:]):
            wrong.append((length, sizes[-2:]))
    assert not wrong
    assert memory_estimate.GPU_BLOCK == sampling.GPU_NUMBERS  # one block of logits on a GPU


# Against what is measured -------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of one phase is asked of Linux")
@pytest.mark.parametrize("more", [(), pytest.param(
    ("model.adapter=lora", "model.gradient_checkpointing=true"), marks=pytest.mark.slow)])
def test_the_estimate_is_within_a_fifth_of_what_is_measured(more):
    """Every phase of a run of 30 million weights, in its own process."""
    from memory import LENGTHS, WIDE, measure  # benchmarks/memory.py

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        points = pool.apply(measure, (WIDE, (*LENGTHS, *SHORT, *more), 1))
    assert len(points) == 5
    for point in points:
        assert 0.8 < point["estimated_mib"] / point["measured_mib"] < 1.2, point


# What follows from it -----------------------------------------------------------------------------


def test_smaller_devices_get_smaller_micro_batches():
    """0 takes the largest that fits; a number is left alone."""
    settings = load_settings("paper", ("training.micro_batch_tokens=0",), smoke=False)
    found = [fit(settings, QWEN, "bf16", "cuda", room * GIB)[0].training.micro_batch_tokens
             for room in (12.6, 13, 14, 40)]
    assert found == sorted(found) and found[0] < found[-1]
    fixed = memory.with_micro_batches(settings, 3000)
    assert fit(fixed, QWEN, "bf16", "cuda", 40 * GIB)[0] == fixed


def test_colab_fits_a_t4_and_paper_does_not():
    """The error says what needs how much, and names a setting that helps."""
    _, expected = fit(load_settings("colab", smoke=False), QWEN, "fp32", "cuda", T4)
    assert expected.peak < T4
    with pytest.raises(UserError) as caught:
        fit(load_settings("paper", smoke=False), QWEN, "fp32", "cuda", 0.8 * T4)
    for fact in ("10.5 GiB", "optimizer 3.7", "model.adapter=lora"):
        assert fact in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_advice_is_the_setting_that_helps():
    """What needs most of the memory decides."""
    lora, saving = "model.adapter=lora", "model.gradient_checkpointing=true"
    for overrides, advice in (
            ((lora,), saving),
            ((lora, saving, "training.micro_batch_tokens=65536"), "training.micro_batch_tokens"),
            ((lora, saving, "training.logit_chunk_tokens=16384"), "training.logit_chunk_tokens")):
        settings = load_settings("tiny", (
            "rl.max_new_tokens=512", "training.micro_batch_tokens=8192", "rl.prompts_per_step=64",
            *overrides), smoke=False)
        with pytest.raises(UserError, match=advice):
            fit(settings, QWEN, "fp32", "cuda", 6 * GIB)


def test_a_run_that_cannot_fit_loads_no_model(results, monkeypatch):
    """The error comes before the weights are read."""
    monkeypatch.setattr("hybridrl_lib.machine.memory.free_memory", lambda device: 2**20)
    monkeypatch.setattr("hybridrl_lib.experiments.run.load_policy",
                        lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match="GiB.*GiB"):
        run("sft", "tiny", 0, "small")


def test_the_base_model_is_scored_where_training_it_would_not_fit(results, monkeypatch):
    """It needs no gradients and no optimizer, so their memory does not count."""
    monkeypatch.setattr("hybridrl_lib.machine.memory.free_memory", lambda device: 2**20)
    record = run("base", "tiny", 0, "small", [
        "data.test_limits=1,1", "evaluation.samples=0", "evaluation.train_samples=0",
        "evaluation.train_limit=1", "probe.prompts=1", "probe.samples=2", "rl.group_size=2"])
    assert record.is_complete


def test_micro_batches_by_memory_change_no_number_beyond_rounding(make_trainer, monkeypatch):
    """What `training.micro_batch_tokens=0` chooses changes the last digits at most."""
    settings = small_settings("training.micro_batch_tokens=0", setup="rl")
    shape = shape_of(ModelSettings())
    expected = estimate(shape, memory.with_micro_batches(settings, 256), "fp32", "cpu")
    tight = expected.total(expected.surely)
    losses = []
    for number, room in enumerate((tight, 8 * GIB)):
        chosen, _ = fit(settings, shape, "fp32", "cpu", room)
        trainer = make_trainer(
            "rl", f"training.micro_batch_tokens={chosen.training.micro_batch_tokens}",
            folder=f"run{number}")
        trainer.train()
        losses.append([row["grad_norm"] for row in rows_of(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_resumed_run_keeps_its_micro_batches(results, monkeypatch):
    """Bit for bit, however often it was cut off: free memory decides once."""
    monkeypatch.setenv("HYBRIDRL_SMOKE", "1")
    small = ("training.micro_batch_tokens=0", "data.train_limits=[2]", "data.test_limits=[2]",
             "evaluation.samples=0", "evaluation.train_samples=0", "probe.samples=2",
             "probe.prompts=1")
    folder = run("sft", "tiny", 0, "kept", small)
    chosen = folder.read("manifest.json")["memory"]["micro_batch_tokens"]
    assert folder.read("config.json")["micro_batch_tokens"] == chosen > 0
    folder.write("config.json", folder.read("config.json") | {"micro_batch_tokens": 384})
    (folder.path / "manifest.json").unlink()  # as if it had been cut off
    assert run("sft", "tiny", 0, "kept", small).read("manifest.json")["memory"][
        "micro_batch_tokens"] == 384


def test_a_container_with_less_memory_than_the_machine(monkeypatch, tmp_path):
    """A limit of the container or batch job counts; without one the machine's memory does."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.container_memory() == math.inf
    for name, text in (("max", "3000"), ("current", "1200"), ("stat", "inactive_file 200\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.free_memory("cpu") == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.container_memory() == math.inf


def test_a_model_of_unknown_shape_needs_a_number(results, monkeypatch, make_policy, tmp_path):
    """With 0 there is nothing to choose from: an error, after the model is loaded."""
    monkeypatch.setattr("hybridrl_lib.machine.memory.shape_of", lambda model: None)
    monkeypatch.setattr("hybridrl_lib.experiments.run.shape_from", lambda config: None)
    with pytest.raises(UserError, match="micro_batch_tokens"):
        run("sft", "tiny", 0, "unknown", ("training.micro_batch_tokens=0",))


def test_what_a_method_holds_is_planned_with():
    """A second AdamW (relift), MIFO's importance and the weights before RL, and BRIDGE's copy with
    its moments: otherwise the run would be out of memory at its first such update."""
    def expected(name, preset, precision):
        settings = with_micro_batches(load_settings(preset, smoke=False, setup=SETUPS[name]), 1024)
        return estimate(QWEN, settings, precision, "cuda")

    plain = expected("rl", "paper", "bf16").phases["RL update"]
    for name, copies in (("relift", 2), ("mifo", 4)):
        own = expected(name, "paper", "bf16").phases["RL update"]
        assert sum(own.values()) - sum(plain.values()) == copies * 4 * QWEN.parameters, name
    whole, without = (expected(name, "colab", "fp32")
                      for name in ("bridge", "bridge_without_gain"))
    assert whole.peak - without.peak >= 3 * 4 * QWEN.parameters
    assert "gradient of the words" in whole.phases["RL update"]  # the base weights learn
    lora, bridge = (load_settings("tiny", ("model.adapter=lora",), smoke=False, setup=setup)
                    for setup in (None, SETUPS["bridge"]))
    shape = shape_of(ModelSettings())
    one, other = (estimate(shape, s, "fp32", "cuda").peak for s in (lora, bridge))
    assert other - one >= 6 * 4 * shape.parameters


def test_pear_holds_its_behavior_model():
    """While that trains, a second model; it is gone before the policy has moments."""
    settings = {name: load_settings("tiny", ("rl.kl_anchor=old", *more), smoke=False,
                                    setup=SETUPS[setup]) for name, setup, more in (
        ("sft", "sft_then_rl", ()), ("pear", "pear", ()),
        ("named", "pear", ("pear.behavior=Qwen/Qwen2.5-0.5B",)))}
    sizes = {name: estimate(QWEN, chosen, "fp32", "cuda") for name, chosen in settings.items()}
    update = sizes["sft"].total("SFT update")
    assert sizes["pear"].total("behavior's update") == update + 4 * QWEN.parameters
    assert sizes["pear"].surely == "behavior's update"
    assert sizes["named"].surely != "behavior's update"
    assert sizes["named"].phases["behavior's sampling"]["behavior model"] == 4 * QWEN.parameters
    assert sizes["pear"].total("SFT update") == update
    # in main memory: the weights as loaded and after SFT, and for a moment those of now
    one, other = (estimate(QWEN, settings[name], "fp32", "cpu").total("RL update")
                  for name in ("sft", "pear"))
    assert other - one == 3 * 4 * QWEN.parameters


def test_vllm_has_its_share_of_the_gpu(monkeypatch):
    """What vllm will take is not available, and what it does is not counted twice."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 22 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (22 * GIB, 24 * GIB))
    own, vllm = (load_settings("colab", (f"model.sampler={name}",), smoke=False)
                 for name in ("own", "vllm"))
    assert room_for(own, "cuda") == 0.9 * 22 * GIB
    assert room_for(vllm, "cuda") == pytest.approx(0.9 * (22 - 0.4 * 24) * GIB)
    assert room_for(vllm, "cpu", 2) == 0.45 * 22 * GIB
    assert "cache" not in estimate(QWEN, vllm, "fp32", "cuda").phases["evaluation"]
    assert "cache" in estimate(QWEN, own, "fp32", "cuda").phases["evaluation"]


def test_the_bridge_notebook_says_what_fits_a_t4():
    """Its title: the preset for a T4 is refused there, and the settings that it advises fit."""
    title = read("36_bridge").cells[0].source
    advised = re.search(r'`settings = "(.+?)"`', title)[1]
    plain, smaller = (load_settings("colab", text, smoke=False, setup=SETUPS["bridge"])
                      for text in ("", advised))
    with pytest.raises(UserError, match="18.8 GiB.*13.1 GiB"):
        fit(plain, QWEN, "fp32", "cuda", T4)
    _, expected = fit(smaller, shape_of(smaller.model), "fp32", "cuda", T4)
    assert expected.peak < T4
    for number in (18.8, 13.1, round(expected.total(expected.surely) / GIB, 1)):
        assert str(number) in title
    fit(plain, QWEN, "fp32", "cuda", 0.9 * 22 * GIB)  # what a GPU of 24 GB has


def test_gradients_are_summed_in_one_piece():
    """Several processes hold them twice for a moment, when the activations have gone."""
    settings = load_settings("tiny", ("training.micro_batch_tokens=8", "sft.batch_size=1",
                                      "data.max_prompt_tokens=4", "rl.prompts_per_step=2",
                                      "data.max_demonstration_tokens=4"), smoke=False)
    alone, two = (estimate(QWEN, settings, "fp32", "cpu", n).phases["SFT update"] for n in (1, 2))
    assert two["gradients in one piece"] == two["gradients"] == 4 * QWEN.parameters
    assert sum(two.values()) > sum(alone.values()) and "activations" not in two
    large = load_settings("tiny", ("training.micro_batch_tokens=65536",
                                   "sft.batch_size=512"), smoke=False)
    alone, two = (estimate(QWEN, large, "fp32", "cpu", n).phases["SFT update"] for n in (1, 2))
    assert two == alone and "activations" in two

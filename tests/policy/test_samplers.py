"""The other samplers: steps replayed as a graph, and vllm (a stand-in for it)."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_decoding import (
    move_adapter,
    prompts_of,
    sampled_scores,
    texts,
    trained_scores,
)

from hybridrl_lib.config.sections import ModelSettings
from hybridrl_lib.policy import loading as policy_module
from hybridrl_lib.policy import sampling as rollouts
from hybridrl_lib.policy.cuda_graphs import GraphedDecoder
from hybridrl_lib.policy.decoding import Decoder
from hybridrl_lib.policy.loading import load_policy
from hybridrl_lib.policy.sampling import sample
from hybridrl_lib.policy.vllm import plain_weights
from hybridrl_lib.system.errors import UsageError

ARGUMENTS = {"samples": 8, "max_new_tokens": 12, "temperature": 1.0, "seed": 5}


# Steps replayed as a graph ------------------------------------------------------------------------


class Replayed:
    """In place of a CUDA graph: runs the function again, into the memory of its first result.

    As a graph it is not run when it is recorded, and hands out the same memory every time.
    """

    recorded = 0

    def __init__(self, function):
        type(self).recorded += 1
        self.function, self.result = function, None

    def __call__(self):
        result = self.function()
        if self.result is None:
            self.result = result.clone()
        return self.result.copy_(result)


def graphed(monkeypatch, record):
    monkeypatch.setattr(rollouts, "make_decoder", lambda policy: GraphedDecoder(policy, record))


def test_replayed_steps_are_the_plain_ones_bit_for_bit(make_policy, monkeypatch):
    """Fixed memory changed in place gives what fresh memory gives, also after rows were dropped."""
    for adapter in ("none", "lora"):
        policy = make_policy(adapter=adapter)
        if adapter == "lora":
            move_adapter(policy)
        for columns in (4, 128):
            with monkeypatch.context() as patch:
                for kind in (Decoder, GraphedDecoder):
                    patch.setattr(kind, "columns", columns)
                    patch.setattr(kind, "compact_below", 0.8)
                plain = sample(policy, prompts_of(policy), **ARGUMENTS)
                graphed(patch, Replayed)
                before = Replayed.recorded
                replayed = sample(policy, prompts_of(policy), **ARGUMENTS)
            assert Replayed.recorded > before + 1, "rows were dropped, so it was recorded again"
            assert texts(replayed) == texts(plain)
            assert torch.equal(sampled_scores(replayed), sampled_scores(plain))


def test_where_no_graph_can_be_recorded_the_steps_are_run(policy, monkeypatch):
    """A refused recording costs speed and nothing else."""
    def refused(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    plain = sample(policy, prompts_of(policy), **ARGUMENTS)
    graphed(monkeypatch, refused)
    assert texts(sample(policy, prompts_of(policy), **ARGUMENTS)) == texts(plain)


@pytest.mark.gpu
def test_graphs_on_a_gpu_are_the_plain_steps(make_policy, monkeypatch):
    """The recorded kernels give the numbers of the launched ones, before and after an update."""
    for adapter in ("none", "lora"):
        policy = make_policy(adapter=adapter)
        policy.model.to("cuda")
        for shift in (0.0, 0.01):
            with torch.no_grad():
                for weight in policy.model.parameters():
                    weight.add_(shift * weight.requires_grad)
            replayed = sample(policy, prompts_of(policy), **ARGUMENTS)
            with monkeypatch.context() as patched:
                patched.setattr(rollouts, "make_decoder", Decoder)
                plain = sample(policy, prompts_of(policy), **ARGUMENTS)
            assert texts(replayed) == texts(plain)
            torch.testing.assert_close(sampled_scores(replayed), sampled_scores(plain),
                                       atol=1e-4, rtol=1e-4)


# vllm ---------------------------------------------------------------------------------------------


class StandIn:
    """What vllm offers and this project calls: answers come from our sampler, scores are wrong."""

    made = []

    def __init__(self, model, **settings):
        self.policy = load_policy(ModelSettings(path=model, device="cpu", precision="fp32"))
        self.loads = 0
        StandIn.made.append(self)

    def apply_model(self, function):
        return [function(self)]

    def load_weights(self, weights):
        mine = dict(self.policy.model.named_parameters())
        given = dict(weights)
        assert given.keys() == mine.keys(), "a model without adapter, tied weights once"
        with torch.no_grad():
            for name, weight in given.items():
                mine[name].copy_(weight)
        self.loads += 1

    def generate(self, prompts, parameters, use_tqdm):
        outputs = []
        for prompt, wanted in zip(prompts, parameters, strict=True):
            policy = replace(self.policy, stop_ids=tuple(wanted.stop_token_ids))
            group, = sample(policy, [prompt["prompt_token_ids"]], samples=wanted.n,
                            max_new_tokens=wanted.max_tokens, temperature=wanted.temperature,
                            seed=wanted.seed)
            outputs.append(SimpleNamespace(outputs=[
                SimpleNamespace(token_ids=tuple(c.token_ids), cumulative_logprob=-1e9)
                for c in group.completions]))
        return outputs


@pytest.fixture()
def vllm(monkeypatch):
    monkeypatch.setattr(StandIn, "made", [])
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(
        LLM=StandIn, SamplingParams=lambda **values: SimpleNamespace(**values)))
    monkeypatch.setattr(policy_module, "find_spec", lambda name: name == "vllm")
    return StandIn


def test_vllm_gets_the_weights_and_its_scores_are_not_used(make_policy, vllm):
    """After an update it samples the new policy; scores are the training model's own."""
    for architecture in ("qwen2", "llama"):
        for adapter in ("none", "lora"):
            vllm.made.clear()
            policy = make_policy(architecture, adapter=adapter, sampler="vllm")
            first = sample(policy, prompts_of(policy), **ARGUMENTS)
            with torch.no_grad():
                for weight in policy.model.parameters():
                    if weight.requires_grad:
                        weight.add_(0.05 * torch.randn(
                            weight.shape, generator=torch.Generator().manual_seed(1)))
            second = sample(policy, prompts_of(policy), **ARGUMENTS)
            assert len(vllm.made) == 1 and vllm.made[0].loads == 2
            assert texts(first) != texts(second)
            torch.testing.assert_close(sampled_scores(second), trained_scores(policy, second, 1.0),
                                       atol=1e-5, rtol=1e-5)
            merged = dict(plain_weights(policy))
            own = vllm.made[0].policy
            greedy, theirs = (sample(p, prompts_of(p), samples=2, max_new_tokens=8,
                                     temperature=0.0) for p in (policy, own))
            assert texts(greedy) == texts(theirs) and merged


def test_one_seed_repeats_through_vllm(make_policy, vllm):
    """Seeds are a prompt's own; finished answers end with a stop token."""
    policy = make_policy(sampler="vllm")
    one, again = (sample(policy, prompts_of(policy), **ARGUMENTS) for _ in range(2))
    other = sample(policy, prompts_of(policy), **{**ARGUMENTS, "seed": 6})
    assert texts(one) == texts(again) != texts(other)
    for completion in (c for group in one for c in group.completions):
        assert completion.finished == (completion.token_ids[-1] == policy.eos_id)


def test_vllm_that_is_not_installed_is_refused(make_policy, monkeypatch):
    """Before anything is loaded, and with the command that helps."""
    monkeypatch.setattr(policy_module, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install hybridrl_lib\[vllm\]"):
        make_policy(sampler="vllm")

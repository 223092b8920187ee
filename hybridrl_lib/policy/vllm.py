"""Sampling with vllm, from the present weights.

vllm's kernels give slightly different log-probabilities. Those that the loss needs are therefore
computed by the model being trained.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..config.sections import VLLM_SHARE
from .adapters import inner_model
from .decoding import effective
from .device import DTYPES
from .packing import PromptCompletion, pack
from .policy import Policy

SCORED_AT_ONCE = 8192  # tokens of a forward pass when completions are scored


def plain_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all weights, as in a model without an adapter."""
    model = policy.model
    base = inner_model(model)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    for place, module in base.named_modules():
        if "lora_" in place or place.endswith("base_layer"):
            continue
        if hasattr(module, "get_delta_weight"):
            weight, bias = effective(module)
            yield f"{place}.weight", weight.detach()
            if bias is not None:
                yield f"{place}.bias", bias.detach()
        elif not (tied and module is base.get_output_embeddings()):
            for name, weight in module.named_parameters(recurse=False):
                yield f"{place}.{name}", weight.detach()


def make_engine(policy: Policy):
    """A vllm engine of the policy's architecture, in this process."""
    # An engine in another process would get its weights by pickling.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    model = policy.model
    base = inner_model(model)
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder, state_dict=dict(plain_weights(policy)))
        policy.tokenizer.save_pretrained(folder)
        return LLM(model=folder, skip_tokenizer_init=True, enable_prefix_caching=False,
                   dtype=str(DTYPES[policy.precision]).removeprefix("torch."),
                   gpu_memory_utilization=VLLM_SHARE)  # the rest is for training


def sample_with_vllm(policy: Policy, prompts: Sequence[Sequence[int]], *, samples: int,
                     max_new_tokens: int, temperature: float, seed: int) -> list:
    """`sampling.sample` through vllm, with the same arguments and result.

    The same seed gives the same completions, but not those of the project's own sampler.
    """
    from vllm import SamplingParams

    from .completions import Completion, Group

    if policy.engine is None:
        policy.engine = make_engine(policy)
    weights = list(plain_weights(policy))
    policy.engine.apply_model(lambda model: model.load_weights(weights) and None)
    many = samples if temperature > 0 else 1  # greedy answers are all the same
    # vllm gives the n answers of a prompt the seeds from this one on: no two prompts share one.
    parameters = [SamplingParams(
        n=many, temperature=temperature, top_p=1.0, top_k=-1, max_tokens=max_new_tokens,
        seed=(seed + number * many) % 2**62, stop_token_ids=list(policy.stop_ids), detokenize=False)
        for number in range(len(prompts))]
    outputs = policy.engine.generate([{"prompt_token_ids": list(p)} for p in prompts], parameters,
                                     use_tqdm=False)
    answers = [[list(o.token_ids) for o in output.outputs] * (samples // many)
               for output in outputs]
    scores = iter(trained_scores(policy, [
        PromptCompletion(list(prompt), ids)
        for prompt, rows in zip(prompts, answers, strict=True) for ids in rows], temperature))
    texts = iter(policy.tokenizer.batch_decode([ids for rows in answers for ids in rows],
                                               skip_special_tokens=True))
    return [Group(list(prompt), [
        Completion(ids, *next(scores), finished=ids[-1] in policy.stop_ids, text=next(texts))
        for ids in rows]) for prompt, rows in zip(prompts, answers, strict=True)]


@torch.inference_mode()
def trained_scores(policy: Policy, sequences: list[PromptCompletion],
                   temperature: float) -> list[tuple[list[float], list[float]]]:
    """Log-probabilities and entropies of every completion under the model that is trained."""
    result: list = [None] * len(sequences)
    for packed in pack(sequences, SCORED_AT_ONCE, policy.pad_id):
        both = torch.stack(policy.score(packed.to(policy.device), temperature=temperature or 1.0))
        owners, lengths = packed.sequence.unique_consecutive(return_counts=True)
        for index, piece in zip(owners.tolist(), both.split(lengths.tolist(), dim=1), strict=True):
            result[index] = tuple(piece.tolist())
    return result

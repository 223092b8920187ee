"""Shares completions and gradients between the processes of one run (DDP)."""

from collections.abc import Sequence

import torch
import torch.distributed as group

from ..policy.packing import PromptCompletion
from ..system.processes import rank, size


def my_sequences(sequences: Sequence[PromptCompletion]) -> list[int]:
    """The places of the completions that this process scores; all get about as many tokens.

    Completions of one prompt stay together, so that their prompt is read once.
    """
    if size() == 1:
        return list(range(len(sequences)))
    prompts: dict[tuple[int, ...], list[int]] = {}
    for place, sequence in enumerate(sequences):
        prompts.setdefault(tuple(sequence.prompt), []).append(place)
    costs = {prompt: len(prompt) + sum(len(sequences[i].completion) for i in places)
             for prompt, places in prompts.items()}
    loads, mine = [0] * size(), []
    for prompt in sorted(prompts, key=costs.get, reverse=True):
        least = loads.index(min(loads))
        loads[least] += costs[prompt]
        if least == rank():
            mine += prompts[prompt]
    return sorted(mine)


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replaces every gradient by its sum over all processes, in one all-reduce.

    A parameter that has no gradient in any process keeps none.
    """
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32,
                         device=parameters[0].device)
    group.all_reduce(there, group.ReduceOp.MAX)
    chosen = [p for p, has in zip(parameters, there.tolist(), strict=True) if has]
    if not chosen:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                      for p in chosen])
    group.all_reduce(flat)
    for parameter, piece in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
        parameter.grad = piece.view_as(parameter)

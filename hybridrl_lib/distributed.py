"""What the processes of one run share: each does a part of a step, and all know all of its result.

`accelerate launch` starts the same command several times. Every process holds the same settings,
problems and counters and walks through the same steps; what is dear is shared out: prompts to
sample from, answers to verify, completions to score and to learn from. Results are gathered in the
order of the processes and gradients are summed, so that all processes take the same decisions and
have the same weights. The first process alone writes and speaks. In one process nothing here does
anything.

torch is imported when there are several processes, so that light commands stay light.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UsageError, UserError, reason

if TYPE_CHECKING:
    import torch

    from .packing import PromptCompletion

Value = TypeVar("Value")
STARTED = "accelerate launch --multi_gpu --num_processes N -m hybridrl_lib.cli run ..."
_sharded = False


# The processes ----------------------------------------------------------------------------------


def wants_shards() -> bool:
    """Whether the run was launched with --use_fsdp: every process keeps a part of the weights."""
    return _sharded or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")


def launched() -> int:
    """How many processes the launcher started, whether they have met or not."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def begin(device: str) -> None:
    """Joins the processes that `accelerate launch` has started; nothing if this one is alone.

    Args:
        device: the setting model.device.

    Raises:
        UsageError: the launcher was asked for what it does not do, or FSDP for its first version.
    """
    global _sharded
    alone = launched() == 1
    if alone and "LOCAL_RANK" not in os.environ and "MASTER_PORT" in os.environ and (
            os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"):
        raise UsageError("'accelerate launch --cpu' starts a single process however many it is "
                         f"asked for; start several with '{STARTED}', on CPUs too.")
    if wants_shards() and not _sharded:
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UsageError("FSDP works in its second version alone; add --fsdp_version 2 to "
                             "'accelerate launch'.")
        _sharded = True
        # The weights are shared out by `sharding.py`: nobody else must do it a second time.
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    if alone and not _sharded:
        return
    import torch
    from accelerate import PartialState

    PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def end() -> None:
    """Leaves the other processes, when all is done."""
    if size() > 1 or _sharded:
        import torch.distributed as group

        if group.is_initialized():
            group.barrier()
            group.destroy_process_group()


def size() -> int:
    """How many processes work on the run."""
    if "WORLD_SIZE" not in os.environ:
        return 1
    import torch.distributed as group

    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0 on."""
    if size() == 1:
        return 0
    import torch.distributed as group

    return group.get_rank()


def is_first() -> bool:
    """Whether this process writes the record and speaks."""
    return rank() == 0


def may_complain() -> bool:
    """Whether this process is the one to say why the run ended: the first that asks."""
    if launched() == 1:
        return True
    if size() == 1:  # they have not met yet, and all fail alike
        return os.environ.get("RANK", "0") == "0"
    from torch.distributed import distributed_c10d

    try:
        return distributed_c10d._get_default_store().add("hybridrl/complaints", 1) == 1
    except Exception:  # the process that keeps the count has gone, and it has complained
        return False


# Sharing out ------------------------------------------------------------------------------------


def my_part(count: int) -> range:
    """The places, of so many, that this process does: every n-th of them."""
    return range(rank(), count, size())


def my_sequences(sequences: "Sequence[PromptCompletion]") -> list[int]:
    """The places of the completions that this process scores, of about as many tokens as others'.

    Completions of one prompt stay together, where their prompt is read once.
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


# Telling each other -----------------------------------------------------------------------------


def together(work: Callable[[], Value]) -> list[Value]:
    """What `work` gives in every process, in their order.

    Raises:
        Exception: in all of them, what it raised in the first one that it failed in.
    """
    if size() == 1:
        return [work()]
    import torch.distributed as group

    try:
        mine = (work(), None)
    except Exception as error:
        mine = (None, as_sent(error))
    found: list = [None] * size()
    group.all_gather_object(found, mine)
    for _, error in found:
        if error is not None:
            raise error
    return [value for value, _ in found]


def as_sent(error: Exception) -> Exception:
    """An error as the other processes can have it: those of other libraries may not be rebuilt."""
    if isinstance(error, UserError | OSError | MemoryError | RuntimeError):
        return error
    return RuntimeError(f"{type(error).__name__}: {reason(error)}")


def from_first(work: Callable[[], Value]) -> Value:
    """What `work` gives in the first process, which alone does it, or the error it raises there."""
    if size() == 1:
        return work()
    return together(work if is_first() else lambda: None)[0]


def merged(parts: Sequence[dict]) -> dict:
    """The dictionaries of all processes as one."""
    return parts[0] if len(parts) == 1 else {k: v for part in parts for k, v in part.items()}


def any_of(flag: bool) -> bool:
    """Whether it holds in any process."""
    return flag if size() == 1 else any(together(lambda: flag))


def sum_gradients(parameters: "Sequence[torch.nn.Parameter]") -> None:
    """Puts the sum over all processes in place of every gradient, by one all-reduce.

    A parameter without a gradient in any process keeps none.
    """
    import torch
    import torch.distributed as group

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


class SharedVerifier:
    """A verifier of which every process asks its own about a part of the answers.

    A verdict may depend on a time limit: each is given once, and all processes take it over.
    """

    def __init__(self, own: Any):
        self.own, self.counts = own, Counter()

    def verify(self, golds: Sequence[str], texts: Sequence[str],
               finished: Sequence[bool]) -> list:
        """As `rewards.Verifier.verify`; `counts` counts the verdicts of all processes."""
        places = my_part(len(texts))

        def judge() -> tuple[dict, Counter]:
            before = Counter(self.own.counts)
            verdicts = self.own.verify(*([values[i] for i in places]
                                         for values in (golds, texts, finished)))
            return dict(zip(places, verdicts, strict=True)), self.own.counts - before

        parts = together(judge)
        for _, counts in parts:
            self.counts.update(counts)
        found = merged([verdicts for verdicts, _ in parts])
        return [found[i] for i in range(len(texts))]

"""The processes of one run: each does part of a step, and all get the whole result.

`accelerate launch` starts the same command several times. Every process has the same settings,
problems, and counters, and takes the same steps. The expensive work is divided: sampling,
verification, scoring, and gradients. Results are gathered in the order of the processes, and
gradients are summed, so all processes make the same decisions and have the same weights. Only the
first process writes and prints. In a single process nothing here has an effect.

torch is imported only if there are several processes.
"""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from .errors import UsageError, UserError, reason

Value = TypeVar("Value")
STARTED = "accelerate launch --multi_gpu --num_processes N -m hybridrl_lib.cli run ..."


# The processes ----------------------------------------------------------------------------------


def launched() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def begin(device: str) -> None:
    """Joins the processes that `accelerate launch` has started; does nothing in a single process.

    Args:
        device: the setting model.device.

    Raises:
        UsageError: an option of the launcher is not supported.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        raise UsageError("FSDP is not supported; launch without --use_fsdp, and every process "
                         "holds the whole model.")
    alone = launched() == 1
    if alone and "LOCAL_RANK" not in os.environ and "MASTER_PORT" in os.environ and (
            os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"):
        raise UsageError("'accelerate launch --cpu' always starts a single process; to start "
                         f"several, also on CPUs, use '{STARTED}'.")
    if alone:
        return
    import torch
    from accelerate import PartialState

    PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def end() -> None:
    """Leaves the other processes at the end."""
    if size() > 1:
        import torch.distributed as group

        if group.is_initialized():
            group.barrier()
            group.destroy_process_group()


def size() -> int:
    """Number of processes that work on the run."""
    if "WORLD_SIZE" not in os.environ:
        return 1
    import torch.distributed as group

    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    if size() == 1:
        return 0
    import torch.distributed as group

    return group.get_rank()


def is_first() -> bool:
    """Whether this process writes the record and prints."""
    return rank() == 0


def may_complain() -> bool:
    """Whether this process is the first to ask, and so the one that says why the run ended."""
    if launched() == 1:
        return True
    if size() == 1:  # they have not joined yet, and all fail in the same way
        return os.environ.get("RANK", "0") == "0"
    from torch.distributed import distributed_c10d

    try:
        return distributed_c10d._get_default_store().add("hybridrl/complaints", 1) == 1
    except Exception:  # the process that keeps the count has ended with the message
        return False


# Dividing and gathering -------------------------------------------------------------------------


def my_part(count: int) -> range:
    """The indices, out of `count`, that this process works on: every n-th."""
    return range(rank(), count, size())


def together(work: Callable[[], Value]) -> list[Value]:
    """The results of `work` in all processes, in their order.

    Raises:
        Exception: in all processes, the error of the first one that failed.
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
    """An error that other processes can unpickle."""
    if isinstance(error, UserError | OSError | MemoryError | RuntimeError):
        return error
    return RuntimeError(f"{type(error).__name__}: {reason(error)}")


def from_first(work: Callable[[], Value]) -> Value:
    """The result of `work` in the first process only, or its error."""
    if size() == 1:
        return work()
    return together(work if is_first() else lambda: None)[0]


def merged(parts: Sequence[dict]) -> dict:
    """The dictionaries of all processes as one."""
    return parts[0] if len(parts) == 1 else {k: v for part in parts for k, v in part.items()}


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if size() == 1 else any(together(lambda: flag))

"""The memory of a run's device: what is free, which micro-batches fit, and what was used."""

import gc
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..config.sections import VLLM_SHARE
from ..config.settings import Settings
from ..system.errors import UserError
from ..system.processes import launched
from .memory_estimate import Estimate, estimate
from .shapes import Shape, shape_of

# (whether the preset is made for a GPU, main memory in GiB that it needs)
NEEDS = {"tiny": (False, 2), "smollm2": (False, 6), "colab": (True, 8), "paper": (True, 12)}


def main_memory() -> float:
    """The machine's memory in GiB; 0 if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return 0.0


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


GIB = 2**30
TO_USE = 0.9  # of the free memory: allocators leave gaps, and products need workspace
# Tokens, largest first; more make nothing faster.
MICRO_BATCHES = tuple(2**power for power in range(14, 7, -1))
CGROUP = Path("/sys/fs/cgroup")  # where Linux says what a container or batch job may take


def fit(settings: Settings, shape: Shape, precision: str, device: str,
        room: float, refuse: bool = True) -> tuple[Settings, Estimate]:
    """Settings whose micro-batches fit, and what they need; sampling alone may need more.

    Args:
        settings: `training.micro_batch_tokens` is chosen if it is 0, and checked otherwise.
        room: available bytes.
        refuse: False takes the smallest micro-batches if none fits.

    Raises:
        UserError: no micro-batch is small enough.
    """
    asked = settings.training.micro_batch_tokens
    for tokens in (asked,) if asked else MICRO_BATCHES:
        chosen = with_micro_batches(settings, tokens)
        expected = estimate(shape, chosen, precision, device, launched())
        if expected.total(expected.surely) <= room:
            return chosen, expected
    if not refuse:
        return chosen, expected
    raise UserError(too_much(expected, settings, device, room))


def with_micro_batches(settings: Settings, tokens: int) -> Settings:
    """Settings with `training.micro_batch_tokens` set."""
    return replace(settings, training=replace(settings.training, micro_batch_tokens=tokens))


def too_much(expected: Estimate, settings: Settings, device: str, room: float) -> str:
    """The message for a run that does not fit, with the setting that helps most."""
    phase, model = expected.surely, settings.model
    parts, needed = expected.phases[phase], expected.total(phase)
    largest = max(parts, key=lambda name: parts[name])
    if largest == "logits":
        advice = "lower training.logit_chunk_tokens"
    elif largest == "activations" and not model.gradient_checkpointing:
        advice = "set model.gradient_checkpointing=true"
    elif largest == "activations" and settings.training.micro_batch_tokens:
        advice = "lower training.micro_batch_tokens (0 takes what fits)"
    elif model.adapter == "none":
        advice = "set model.adapter=lora"
    else:
        advice = "choose a smaller model or a larger machine"
    return (f"This run needs about {needed / GIB:.1f} GiB ({phase}: {in_words(parts)}) and "
            f"{'the GPU' if device == 'cuda' else 'this machine'} has {room / GIB:.1f} GiB to "
            f"spare; {advice}.")


def tight(expected: Estimate, room: float) -> str:
    """A note if sampling may need more than there is; otherwise empty."""
    if expected.peak <= room:
        return ""
    return (f"{expected.phase} may need up to {expected.peak / GIB:.1f} GiB and {room / GIB:.1f} "
            "are to spare: if it runs out of memory, lower evaluation.batch_size")


def in_words(parts: Mapping[str, int]) -> str:
    """`weights 1.8, logits 0.6` in GiB, largest first."""
    shown = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in shown if size > 0.05 * GIB) or (
        ", ".join(f"{name} {size / GIB:.3f}" for name, size in shown[:3]))


def fit_to_device(settings: Settings, room: float, shape: Shape | None = None, *,
                  refuse: bool = True) -> tuple[Settings, Estimate | None]:
    """`fit` for the device that the settings choose.

    Args:
        room: available bytes.
        shape: of the loaded model; default: what is known before it is loaded.

    Returns:
        Unchanged settings and None if the model's shape is unknown.
    """
    from ..policy.device import choose_device, choose_precision

    device, shape = choose_device(settings.model.device), shape or shape_of(settings.model)
    if shape is None:
        return settings, None
    return fit(settings, shape, choose_precision(settings.model.precision, device), device.type,
               room, refuse)


def free_memory(device: str) -> int:
    """Available bytes of the GPU, or of main memory."""
    if device == "cuda":
        import torch

        gc.collect()  # memory cached by an earlier run of this process is available
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    import psutil

    return min(psutil.virtual_memory().available, container_memory())


def room_for(settings: Settings, device: str, processes: int = 1) -> float:
    """Bytes that a run may plan with, without what vllm will take.

    Args:
        processes: of the run that share the device.
    """
    free = free_memory(device)
    if settings.model.sampler == "vllm" and device == "cuda":
        import torch

        free -= VLLM_SHARE * torch.cuda.mem_get_info()[1]
    return max(0.0, TO_USE * free / processes)


def container_memory() -> float:
    """Bytes that the container or batch job may still use; infinite without a limit."""
    try:
        limit, taken = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        cache = re.search(r"^inactive_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):  # no limit is the word "max"
        return math.inf
    return max(0, limit - taken + (int(cache[1]) if cache else 0))


class PeakMemory:
    """Measures the peak memory of a run from here on.

    On a GPU it is the memory of tensors. On a CPU it is the resident memory of the process minus
    its value here. It includes libraries imported later; after earlier work in the same process it
    is an upper bound.
    """

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = 0
        else:
            import psutil

            self.before = psutil.Process().memory_info().rss

    def read(self) -> int:
        """Bytes."""
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        return max(0, peak_resident() - self.before)


def peak_resident() -> int:
    """The peak resident memory of this process so far, in bytes."""
    import psutil

    if not psutil.POSIX:
        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if psutil.MACOS else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

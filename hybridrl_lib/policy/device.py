"""The device and the precision that a run uses."""

import torch

from ..system.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(wanted: str = "auto") -> torch.device:
    """The device to run on: `auto` takes a CUDA GPU if there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device is 'cuda', but torch sees no CUDA GPU; set it to 'auto'.")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def choose_precision(wanted: str, device: torch.device) -> str:
    """The precision of matrix products; weights and optimizer state stay in fp32.

    `auto` is fp32 on a CPU, bf16 on GPUs of compute capability 8.0 or higher, and fp32 on older
    ones: a T4 has no bf16, and fp16 needs loss scaling, which suits the small gradients of RL
    badly.

    Raises:
        UserError: bf16 on a GPU that only emulates it.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if wanted == "bf16" and device.type == "cuda" and capability < (8, 0):
        raise UserError("model.precision is 'bf16', which GPUs have from compute capability 8.0 "
                        f"on, and this one has {capability[0]}.{capability[1]}; set it to 'auto' "
                        "or 'fp16'.")
    if wanted != "auto":
        return wanted
    return "bf16" if capability >= (8, 0) else "fp32"

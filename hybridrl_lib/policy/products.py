"""fp32 matrix products on a CPU through oneDNN, if torch has it.

torch uses MKL, which does not use the wide vectors of non-Intel CPUs: on an AMD EPYC with AVX-512
oneDNN takes less than half the time. In half precision torch uses oneDNN itself; on a GPU nothing
changes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN compiles code for every new shape, which takes about a millisecond. Rows of a decoding
# batch and tokens of a micro-batch are therefore rounded up.
ROWS, TOKENS = 16, 128


def rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step



def _one_dnn_works() -> bool:
    """Whether this build of torch has oneDNN's linear operation."""
    try:
        one = torch.ones(1, 1)
        return torch.backends.mkldnn.is_available() and bool(_product(one, one, None) == 1)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


ONE_DNN = _one_dnn_works()


class _Linear(torch.autograd.Function):
    """y = x W^T + b and its gradients, each in one oneDNN product."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        return (_product(gradient, weight.t(), None) if for_x else None,
                _product(flat.t(), x.flatten(0, -2).t(), None) if for_weight else None,
                flat.sum(0) if for_bias else None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, through oneDNN for fp32 on a CPU.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs).
        bias: (outputs,).
    """
    if not (ONE_DNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
            and x.numel() and not torch.is_autocast_enabled("cpu")):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


class Linear(torch.nn.Linear):
    """A linear layer whose product is `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def use_fast_products(model: torch.nn.Module) -> torch.nn.Module:
    """Replaces the product of every plain linear layer of a model; names and weights stay."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear
    return model


def use_plain_products(model: torch.nn.Module) -> torch.nn.Module:
    """Undoes `use_fast_products`."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = torch.nn.Linear
    return model

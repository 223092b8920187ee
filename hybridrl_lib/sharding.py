"""FSDP: every process keeps a part of each weight, of its gradient and of AdamW's moments.

torch's `fully_shard`, a unit a layer. A forward pass gathers a layer's weights from all processes
and drops them again, so all have to make the same number of passes; sampling gathers the whole
model. Checkpoints hold whole tensors and fit any number of processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor

from .adapters import inner_model
from .distributed import wants_shards


def shard(model: torch.nn.Module) -> None:
    """Shares a model's weights out over the processes; gradients are summed over these."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if units(model):
        return
    base = inner_model(model)
    for layer in base.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    for module in units(model):
        module.set_gradient_divide_factor(1.0)  # a sum: the loss's weights are those of all
        module.set_force_sum_reduction_for_comms(True)
    # Outputs are cloned: FSDP's hooks on a view could be lost.
    model.run_inside = MethodType(lambda self, work: tuple(x.clone() for x in work()), model)
    register_fsdp_forward_method(model, "run_inside")


def units(model: torch.nn.Module) -> list:
    """The parts that gather their weights together, the whole model first; none without FSDP."""
    if not wants_shards():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole(model: torch.nn.Module) -> Iterator[None]:
    """All weights of a model in every process, inside the `with` block; they are to be read only.

    All processes enter it together. Nothing happens to a model that is not shared out.
    """
    shared = units(model)
    with torch.inference_mode(False), torch.no_grad():  # else they could not be trained afterwards
        for module in shared:
            module.unshard()
    try:
        yield
    finally:
        for module in shared:
            module.reshard()


def weights_to_save(model: torch.nn.Module) -> dict:
    """What `save_pretrained` has to be given besides, inside `whole`: by itself the model would
    ask the other processes for their parts once more."""
    return {"state_dict": dict(model.named_parameters(remove_duplicate=False))} if units(
        model) else {}


def is_part(tensor: Tensor) -> bool:
    """Whether this process has a part of it alone."""
    return hasattr(tensor, "full_tensor")


def plain(tensor: Tensor) -> Tensor:
    """The whole of a tensor, which all processes ask for together."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, shared out as another one is; every process has it whole."""
    if not is_part(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements,
                             src_data_rank=None)


def whole_state(state: dict) -> dict:
    """An optimiser's state with whole tensors, on the CPU where they were parts."""
    moments = {key: {name: plain(value).cpu() if is_part(value) else value
                     for name, value in values.items()}
               for key, values in state["state"].items()}
    return {**state, "state": moments}


def share_state(optimizer: torch.optim.Optimizer) -> None:
    """Shares out what an optimiser has loaded, each moment as its weight."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    optimizer.state[parameter][name] = like(value, parameter)

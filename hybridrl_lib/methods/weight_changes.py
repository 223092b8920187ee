"""How far and in which direction weights moved between two moments of a run.

PEAR's three monitors. The paper's exact definitions are unverified; these are ours, over all
trained weights (with an adapter, the adapter's).
"""

import torch
from torch import Tensor

UNMOVED = 1e-5  # a weight that moved by less counts as the same


def copy_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of weights in main memory, in fp32."""
    return {name: weight.detach().to("cpu", torch.float32, copy=True)
            for name, weight in weights.items()}


def weight_changes(start: dict[str, Tensor], middle: dict[str, Tensor],
                   end: dict[str, Tensor]) -> dict[str, float | dict[str, float]]:
    """How RL changed the weights after SFT.

    Args:
        start, middle, end: theta_0, theta_SFT and theta_RL by name, as `copy_of` gives them.

    Returns:
        drift: ||theta_RL - theta_SFT|| / ||theta_SFT||. drift_by_tensor: the same for each tensor
        by name, to four digits; without tensors of zeros. sparsity: fraction of weights with
        |theta_RL - theta_SFT| < 1e-5. alignment: cos(theta_SFT - theta_0, theta_RL - theta_SFT);
        absent if one of them is 0.
    """
    moved = size = first = inner = 0.0
    same = count = 0
    by_tensor = {}
    for name in sorted(middle):  # weights from a checkpoint come in another order
        weight = middle[name]
        before = (weight - start[name]).double()
        after = (end[name] - weight).double()
        mine, own_size = float(after.pow(2).sum()), float(weight.double().pow(2).sum())
        if own_size:
            by_tensor[name] = float(f"{(mine / own_size) ** 0.5:.4g}")
        moved += mine
        first += float(before.pow(2).sum())
        inner += float((before * after).sum())
        size += own_size
        same += int((after.abs() < UNMOVED).sum())
        count += weight.numel()
    changes = {"drift": (moved / size) ** 0.5, "drift_by_tensor": by_tensor,
               "sparsity": same / count}
    if first and moved:
        changes["alignment"] = inner / (first * moved) ** 0.5
    return changes

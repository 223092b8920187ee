"""The columns of metrics.jsonl that come from the updates of a step."""

import math
from collections.abc import Sequence

from ..learning.step import Step
from ..learning.update import Totals, Update


def update_metrics(totals: Totals, updates: Sequence[Update], with_rollouts: bool) -> dict:
    """What the updates of a step measured: means over tokens, and the mean of L_SFT and L_RL."""
    names = ("loss/sft", "loss/rl", "kl/old", "clip_ratio", *(() if with_rollouts else
                                                              ("entropy",)))
    row = {}
    for name in names:
        if name not in totals.sums:
            continue
        value = totals.mean(name)
        if name.startswith("loss/"):
            uses = sum(getattr(update, name.replace("loss/", "lambda_")) > 0 for update in updates)
            value = totals.sums[name] / max(1, uses)
        if value is not None:
            row[name] = value
    return row


def gradient_metrics(norms: Sequence[float], left_out: int = 0) -> dict:
    """Mean norm before clipping, number of updates, and number of those with a non-finite norm.

    Args:
        left_out: how many changed nothing because their norm was above `Update.largest_norm`.
    """
    finite = [norm for norm in norms if math.isfinite(norm)]
    row: dict = {}
    if finite or not norms:
        row["grad_norm"] = sum(finite) / max(1, len(finite))
    row["updates"] = len(finite) - left_out
    if len(norms) > len(finite):
        row["updates_not_finite"] = len(norms) - len(finite)
    return row


def finite_values(row: dict) -> dict:
    """The row without numbers that are not finite, which JSON cannot represent."""
    return {name: value for name, value in row.items()
            if not isinstance(value, float) or math.isfinite(value)}


def place_of(step: Step, number: int) -> str:
    """`step 12 (rl) with the problems a, b, c and 13 more`, for an error message."""
    ids = [p.id for p in step.demonstrations] + [r.problem.id for r in step.rollouts]
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    return (f"step {number} ({step.progress.stage.name}) with the problems "
            f"{', '.join(ids[:3])}{more}")

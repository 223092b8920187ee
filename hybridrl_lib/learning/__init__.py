"""One optimizer update."""

from ..system.faces import lazy

_HOMES = {
    "Learner": "learner",
    "Update": "update", "Totals": "update",
    "Rollout": "step", "Step": "step",
    "Stage": "progress", "Progress": "progress", "Weights": "progress",
    "EntropyControl": "entropy_control", "covariances": "entropy_control",
    "verdicts_of": "judging", "rewards_of": "judging",
}
__getattr__, __all__ = lazy(__name__, _HOMES)

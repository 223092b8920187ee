"""Algorithm 1: the loop, the judge, evaluation, checkpoints."""

from ..system.faces import lazy

_HOMES = {
    "Trainer": "trainer",
    "evaluate": "evaluation",
    "Observer": "observer", "Lines": "observer",
    "Checkpoints": "checkpoints", "Snapshot": "checkpoints",
}
__getattr__, __all__ = lazy(__name__, _HOMES)

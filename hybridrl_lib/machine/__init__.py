"""What a run needs, and what this machine has."""

from ..system.faces import lazy

_HOMES = {
    "fit": "memory", "free_memory": "memory",
    "estimate": "memory_estimate",
    "shape_of": "shapes",
}
__getattr__, __all__ = lazy(__name__, _HOMES)

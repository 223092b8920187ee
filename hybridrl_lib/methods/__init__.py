"""Which lambdas at which step, and what an update learns from: one file per paper."""

from ..system.faces import lazy

_HOMES = {
    "Method": "method", "Run": "method",
    "make_method": "registry", "method_class": "registry",
}
__getattr__, __all__ = lazy(__name__, _HOMES)

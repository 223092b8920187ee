"""One run or many, on this machine or on a cluster.

A function that has the name of its file, such as `run`, is imported from there or from
`hybridrl_lib`.
"""

from ..system.faces import lazy

_HOMES = {
    "choose_arms": "compare",
    "SWEEPS": "sweep",
    "choose": "tuning",
}
__getattr__, __all__ = lazy(__name__, _HOMES)

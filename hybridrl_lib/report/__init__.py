"""Tables and figures from records."""

from ..system.faces import lazy

_HOMES = {
    "make_report": "report", "make_texts": "report",
    "Experiment": "loading", "load_experiment": "loading",
    "make_table2": "table2",
    "pass_at_k": "statistics", "mean_interval": "statistics", "paired_difference": "statistics",
    "holm": "statistics",
}
__getattr__, __all__ = lazy(__name__, _HOMES)

"""What a notebook shows: a live view of training, curves, answers, scores, and findings.

Notebooks only call these functions. Text written by a model is escaped before it becomes part of a
page.
"""

from . import quiet  # noqa: F401  first: the other modules import what it quiets
from .answers import show_answers, show_completions, show_tokens
from .curves import new_panels, plot_against, plot_run, show
from .findings import show_claims, show_findings
from .live_view import LiveRun, live
from .methods import plot_diagnostics, show_source
from .place import begin, experiment_path, is_headless, list_files
from .questions import check
from .scores import show_reasons, show_scores, show_signal
from .tables import (
    say,
    show_file,
    show_picture,
    show_published,
    show_rows,
    show_table,
    write_report,
)
from .wellness import show_health

__all__ = [
    "LiveRun", "begin", "check", "experiment_path", "is_headless", "list_files", "live",
    "new_panels", "plot_against", "plot_diagnostics", "plot_run", "say", "show", "show_answers",
    "show_claims", "show_completions", "show_file", "show_findings", "show_health",
    "show_picture", "show_published", "show_reasons", "show_rows", "show_scores", "show_signal",
    "show_source", "show_table", "show_tokens", "write_report",
]

"""What a notebook shows: a live view of training, curves, answers, scores, and findings.

Notebooks only call these functions. Text written by a model is escaped before it becomes part of a
page.
"""

import warnings

from ..system.faces import lazy

warnings.filterwarnings("ignore", message="IProgress not found")  # no such bar is shown
__getattr__, __all__ = lazy(__name__, {
    "answers": "show_answers show_completions show_tokens",
    "curves": "new_panels plot_against plot_run show",
    "findings": "show_claims show_findings",
    "live_view": "LiveRun live",
    "methods": "plot_diagnostics show_source",
    "place": "begin experiment_path is_headless list_files",
    "questions": "check",
    "scores": "show_reasons show_scores show_signal",
    "tables": "say show_file show_picture show_published show_rows show_table write_report",
    "wellness": "show_health",
})

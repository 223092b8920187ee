"""What a method's notebook shows: its code in the library, and its diagnostics."""

import inspect
import textwrap
from collections import Counter

from IPython.display import Markdown, display

from ..records.run_folder import RunFolder
from ..report.arm_figures import is_own, limit_of
from ..report.style import figure_text, show_size_of_constant, style
from ..setups import SETUPS
from .curves import column, finish, mark_stages, new_panels, show

MOST_PANELS = 9


def show_source(*things: object) -> None:
    """Shows the code of classes, methods, and functions."""
    for thing in things:
        display(Markdown(source_of(thing)))


def source_of(thing: object) -> str:
    """The code of a class, method, or function as a Markdown block."""
    return f"```python\n{textwrap.dedent(inspect.getsource(thing)).rstrip()}\n```"


@style()
def plot_diagnostics(record: RunFolder, *extra: str) -> None:
    """Draws the columns that a run's method added to metrics.jsonl, a panel each, over epochs.

    If a setting is a column's limit or target, it is drawn as a dashed line.

    Args:
        extra: further columns, such as `lambda/sft`.
    """
    metrics = record.lines("metrics.jsonl")
    counts = Counter(key for row in metrics for key, value in row.items()
                     if isinstance(value, int | float))
    known = {key for key, count in counts.items() if count > 1}  # one point makes no curve
    config = record.read("config.json")
    setup = SETUPS.get(config["setup"])
    method = setup.method if setup else ""
    columns = [*extra, *sorted(key for key in known if is_own(key, method))]
    columns = [key for key in dict.fromkeys(columns) if key in known][:MOST_PANELS]
    if not columns:
        print("The method recorded no columns in this run.")
        return
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure, panels = new_panels(2.3 * down, columns=across, rows=down)
    flat = list(getattr(panels, "flat", [panels]))
    for panel, key in zip(flat, columns, strict=False):
        epochs, values = column(metrics, key)
        panel.plot(epochs, values, color="#0072B2", marker=".", markersize=3, linewidth=0.9)
        limit = limit_of(config, method, key)
        if limit is not None:
            panel.axhline(limit, color="#777777", linewidth=0.9, linestyle="--")
        finish(panel, figure_text(key))
        show_size_of_constant(panel)
    for panel in flat[len(columns):]:
        panel.set_visible(False)
    mark_stages(flat[:len(columns)], metrics)
    show(figure, alt="The method's own columns over epochs: " + ", ".join(columns))

"""Style of the figures: a color-blind-safe palette and sizes for print.

Palette and theme are seaborn's. Global settings of Matplotlib are not changed. Seaborn is imported
only when something is drawn, since its import takes a second.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..setups import SETUPS
from ..system.errors import printable

WIDTH = 6.8  # inches: a page's text width
# Of seaborn's `colorblind`: blue, vermilion, green, purple, orange, sky blue, brown. Its yellow,
# pink, and gray are hard to see on white or next to the base model's gray.
CHOSEN_COLORS = (0, 3, 2, 4, 1, 9, 5)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = (4.0, 1.6)

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9.0, "axes.labelsize": 9.0, "axes.titlesize": 9.5,
    "xtick.labelsize": 8.0, "ytick.labelsize": 8.0, "legend.fontsize": 8.0,
    "xtick.major.size": 3.5, "xtick.major.width": 0.7, "ytick.major.size": 3.5,
    "ytick.major.width": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6, "lines.linewidth": 1.5, "lines.markersize": 4.0,
    "legend.frameon": False, "savefig.dpi": 300, "figure.facecolor": "white",
    "svg.hashsalt": "hybridrl", "svg.fonttype": "path", "path.simplify": True,
}


def figure_text(text: object) -> str:
    """Text from a record for a title or label; a dollar sign starts no formula."""
    shown = re.sub("[\u2400-\u2421]", "\ufffd", printable(text))  # what the font has
    return shown.replace("$", r"\$")


@contextmanager
def style() -> Iterator[None]:
    """Applies the figures' settings while one is drawn or written."""
    import seaborn

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(seaborn.axes_style("ticks") | seaborn.plotting_context("paper")
                                   | RC)
        yield


@cache
def palette() -> tuple[str, ...]:
    """One color per marker."""
    import seaborn

    colors = seaborn.color_palette("colorblind").as_hex()
    return tuple(colors[index] for index in CHOSEN_COLORS)


def line_style(setup: str) -> dict[str, Any]:
    """Color, dashes, and marker of a setup; dashed and hollow with entropy regularization."""
    plain = [entry.name for entry in sorted(SETUPS.values(), key=lambda entry: not entry.in_paper)
             if entry.stages and not entry.entropy]
    paper = sum(SETUPS[name].in_paper for name in plain)
    name = setup.removesuffix("_entropy")
    if setup == "base":
        return {"color": "#555555", "marker": "X"}
    # Other setups take the colors after the paper's, by their place in SETUPS or else by name.
    # Colors repeat after the last.
    place = plain.index(name) if name in plain else paper + sum(map(ord, name))
    if place >= paper:
        place = paper + (place - paper) % (len(MARKERS) - paper)
    look: dict[str, Any] = {"color": palette()[place], "marker": MARKERS[place]}
    if setup.endswith("_entropy"):
        look |= {"dashes": DASHES, "markerfacecolor": "white"}
    return look


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any
               ) -> tuple[Figure, Any]:
    """A figure of text width, `height` in inches, with its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def show_size_of_constant(panel: Axes) -> None:
    """Sets a panel that shows a constant to run from 0 to twice its value (-1 to 1 for 0).

    Otherwise rounding errors would fill the panel.
    """
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in panel.lines] or [[]])
    values = values[np.isfinite(values)]
    if values.size and np.ptp(values) <= 1e-4 * np.abs(values).max():
        size = float(np.abs(values).max())
        ends = (0.0, 2 * float(np.copysign(size, values[0]))) if size else (-1.0, 1.0)
        panel.set_ylim(min(ends), max(ends))


def legend_below(figure: Figure, handles: Sequence[Artist], columns: int) -> None:
    """One legend below all panels."""
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3.0,
                  columnspacing=1.4)


def as_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as `svg` or `png`; the same figure gives the same bytes."""
    out = io.BytesIO()
    if figure.get_layout_engine() is not None:
        # the layout takes as long as the drawing; compute it once for both kinds of file
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    # dates and version numbers would make each drawing differ
    if kind == "svg":
        figure.savefig(out, format=kind, metadata={"Date": None, "Creator": None})
    else:
        figure.savefig(out, format=kind, pil_kwargs={"compress_level": 1})
        # 255 colors are enough, at a third of the size
        picture = Image.open(out).convert("RGB").quantize(255, dither=Image.Dither.NONE)
        out = io.BytesIO()
        picture.save(out, format="png", dpi=(RC["savefig.dpi"],) * 2)
    return out.getvalue()

"""Curves of one run, while it trains or from its record, as small PNG figures."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image as Picture

from ..config.methods import METHODS
from ..records.run_folder import RunFolder
from ..report.loading import setup_title
from ..report.style import figure_text, line_style, style
from ..setups import SETUPS
from ..system.errors import printable

DOTS_PER_INCH = 100
SMOOTH = 0.9  # of the running mean over single steps
STEPS, PROBE, VALIDATION = "#0072B2", "#D55E00", "#009E73"

Rows = Sequence[Mapping[str, object]]


@style()
def new_panels(height: float = 2.6, columns: int = 1, rows: int = 1, width: float = 8.6):
    """A figure in the project's style with its axes; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def png(figure: Figure) -> bytes:
    """The figure as a small PNG."""
    out = io.BytesIO()
    with style():
        figure.savefig(out, format="png", dpi=DOTS_PER_INCH)
    picture = Picture.open(out).convert("RGB").quantize(
        128, method=Picture.Quantize.MAXCOVERAGE, dither=Picture.Dither.NONE)
    out = io.BytesIO()
    picture.save(out, format="png", optimize=True)
    return out.getvalue()


def show(figure: Figure, alt: str = "A figure") -> None:
    """Shows a figure in the notebook."""
    display(Image(png(figure), metadata={"alt": alt}))  # IPython 7 has no alt=


def plot_run(record: RunFolder) -> None:
    """Draws a run's step log, probe, and validation over epochs."""
    metrics, probe = record.lines("metrics.jsonl"), record.lines("probe.jsonl")
    if not metrics:
        print("Nothing was trained, so there are no curves.")
        return
    setup = SETUPS.get(record.path.parent.name)
    own_loss = setup is not None and METHODS[setup.method].own_loss
    show(draw_run(metrics, probe, record.lines("validation.jsonl"), own_loss),
         alt="Reward, losses, entropy, KL divergence, length and groups without signal over epochs")


@style()
def draw_run(metrics: Rows, probe: Rows, validation: Rows, own_loss: bool = False) -> Figure:
    """Six panels over epochs for one run.

    Args:
        own_loss: whether the method's loss on demonstrations differs from SFT's.
    """
    figure, panels = new_panels(4.6, columns=3, rows=2)
    one, two, three, four, five, six = panels.flat
    _steps(one, metrics, "reward", "training, each step")
    _probe(one, probe, "reward", "probe (validation, sampled)")
    _points(one, validation, "strict", "validation (greedy answer, or loss)")
    finish(one, "reward: share of correct answers", floor=True)
    if any("loss/sft" in row for row in metrics):
        _steps(two, metrics, "loss/sft", "training, each step")
        _points(two, validation, "loss", "")
        finish(two, "the method's loss on demonstrations" if own_loss else
               "SFT loss (nat per token)", floor=True)
    else:
        _steps(two, metrics, "loss/rl", "")
        finish(two, "RL loss (near 0 is normal)")
    _steps(three, metrics, "entropy", "")
    _probe(three, probe, "entropy", "")
    finish(three, "entropy (nat per token)", floor=True)
    _probe(four, probe, "kl/base", "")
    finish(four, "KL to the base model (nat per token)", floor=True)
    _steps(five, metrics, "completions/mean_length", "")
    _probe(five, probe, "completions/mean_length", "")
    finish(five, "length of answers (tokens)")
    _steps(six, metrics, "frac_reward_zero_std", "")
    _probe(six, probe, "frac_reward_zero_std", "")
    finish(six, "groups without signal (share)", floor=True)
    mark_stages(panels.flat, metrics)
    _legend(figure, panels.flat)
    return figure


@style()
def draw_live(metrics: Rows, probe: Rows) -> Figure:
    """Four panels over epochs, quick to draw, for a run in progress."""
    figure, panels = new_panels(2.3, columns=4, width=9.6)
    if any("reward" in row for row in metrics):
        _steps(panels[0], metrics, "reward", "each step")
        _probe(panels[0], probe, "reward", "probe")
        finish(panels[0], "reward", floor=True)
    else:
        _steps(panels[0], metrics, "loss/sft", "each step")
        finish(panels[0], "SFT loss", floor=True)
    _steps(panels[1], metrics, "entropy", "each step")
    _probe(panels[1], probe, "entropy", "probe")
    finish(panels[1], "entropy", floor=True)
    _probe(panels[2], probe, "kl/base", "probe")
    finish(panels[2], "KL to the base model", floor=True)
    _steps(panels[3], metrics, "completions/mean_length", "each step")
    _probe(panels[3], probe, "completions/mean_length", "probe")
    finish(panels[3], "tokens per answer")
    mark_stages(panels, metrics)
    _legend(figure, panels)
    return figure


@style()
def plot_against(record: RunFolder, other: str) -> None:
    """Draws a run's probe together with that of another setup of the same experiment and seed."""
    setup, seed = record.path.parent.name, record.path.name
    folders = {setup: record.path, other: record.path.parent.parent / other / seed}
    probes = {name: RunFolder(Path(path)).lines("probe.jsonl") for name, path in folders.items()}
    if len(probes[other]) < 2:
        print(f"The setup {printable(other)} has not run with this seed in this experiment; run "
              "its notebook, then this cell again.")
        return
    columns = {"reward": "reward (probe)", "entropy": "entropy (nat per token)",
               "kl/base": "KL to base model (nat per token)"}
    figure, panels = new_panels(2.7, columns=len(columns))
    for panel, (key, title) in zip(panels, columns.items(), strict=True):
        for name, rows in probes.items():
            epochs, values = column(rows, key)
            panel.plot(epochs, values, label=figure_text(setup_title(name)),
                       markevery=max(1, len(epochs) // 6), **line_style(name))
        finish(panel, title, floor=True)
    _legend(figure, panels)
    show(figure, alt=f"Probe of {figure_text(setup)} and of {figure_text(other)} over epochs")


# Parts of a panel -------------------------------------------------------------------------------


def column(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the lines that have the key."""
    found = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    return (np.array([epoch for epoch, _ in found], dtype=float),
            np.array([value for _, value in found], dtype=float))


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Exponential mean, corrected for its start."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = SMOOTH * mean + (1 - SMOOTH) * value
        weight = SMOOTH * weight + (1 - SMOOTH)
        result.append(mean / weight)
    return np.array(result)


def _steps(panel: Axes, rows: Rows, key: str, label: str) -> None:
    for stage in dict.fromkeys(row["stage"] for row in rows):  # each with a mean of its own
        epochs, values = column([row for row in rows if row["stage"] == stage], key)
        if len(values):
            panel.plot(epochs, values, color=STEPS, alpha=0.25, linewidth=0.8)
            panel.plot(epochs, _running_mean(values), color=STEPS, label=label or None)


def _probe(panel: Axes, rows: Rows, key: str, label: str) -> None:
    epochs, values = column(rows, key)
    if len(values):
        panel.plot(epochs, values, color=PROBE, marker="s", markersize=2.5, linewidth=1.0,
                   label=label or None)


def _points(panel: Axes, rows: Rows, key: str, label: str) -> None:
    epochs, values = column(rows, key)
    if len(values):
        panel.plot(epochs, values, color=VALIDATION, marker="^", markersize=4.5, linestyle="none",
                   label=label or None)


def finish(panel: Axes, title: str, floor: bool = False) -> None:
    panel.set_title(title, loc="left")
    panel.set_xlabel("epoch")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    panel.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if not panel.lines:
        panel.text(0.5, 0.5, "not measured yet", transform=panel.transAxes, ha="center",
                   color="#777777")
    elif floor:
        panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]) if _below_zero(panel) else 0.0)
    panel.set_xlim(left=0.0)


def _below_zero(panel: Axes) -> bool:
    return any(len(line.get_ydata()) and np.min(line.get_ydata()) < 0 for line in panel.lines)


def mark_stages(panels: Iterable[Axes], metrics: Rows) -> None:
    """Adds a dotted line where the second stage starts."""
    stages = [(row["stage"], row["epoch"]) for row in metrics]
    for (stage, epoch), (following, _) in zip(stages, stages[1:], strict=False):
        if stage != following:
            for panel in panels:
                panel.axvline(epoch, color="#777777", linewidth=0.9, linestyle=(0, (1, 2)),
                              zorder=0.5)


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend below all panels."""
    entries = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(handles=list(entries.values()), labels=list(entries),
                      loc="outside lower center", ncols=5, handlelength=2.2)

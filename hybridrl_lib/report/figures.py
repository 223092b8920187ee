"""The figures of a report: functions from an experiment to a figure, or None without data.

Curves that compare setups use the probe: answers of every setup to the same validation prompts. SFT
has no rollouts of its own.
"""

from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from .loading import Experiment, Run, benchmark_title, series, setup_title, stage_change
from .scores import EXACT_MATCH
from .style import legend_below, line_style, new_figure
from .table2 import make_table2

FEW_SEEDS = 3  # with fewer, each seed is a thin line and there is no band


def draw_reward(experiment: Experiment) -> Figure | None:
    """Reward over training."""
    return _probe_curves(experiment, "reward", "reward (share of right samples)", floor=0.0)


def draw_kl(experiment: Experiment) -> Figure | None:
    """KL divergence to the base model over training."""
    return _probe_curves(experiment, "kl/base", "KL to the base model (nat per token)", floor=0.0)


def draw_entropy(experiment: Experiment) -> Figure | None:
    """Entropy over training."""
    return _probe_curves(experiment, "entropy", "entropy (nat per token)", floor=0.0)


def draw_lengths(experiment: Experiment) -> Figure | None:
    """Length of completions over training."""
    return _probe_curves(experiment, "completions/mean_length", "length (tokens)")


def draw_loss(experiment: Experiment) -> Figure | None:
    """The SFT and the RL loss, a panel each, as means over fortieths of the run."""
    figure, panels = new_figure(3.1, columns=2)
    drawn = []
    for panel, key in zip(panels, ("loss/sft", "loss/rl"), strict=True):
        drawn.append(_curves(panel, experiment, lambda run, key=key: _binned(
            run, *series(run, "metrics", key))))
    if not any(drawn):
        return None
    for panel, title in zip(panels, ("SFT loss", "RL loss (near 0 is normal)"), strict=True):
        panel.set_title(title, loc="left")
    panels[0].set_ylabel("loss (nat per token)")
    panels[1].set_ylabel("loss")
    _finish(figure, experiment, list(panels))
    return figure


def draw_correctness(experiment: Experiment) -> Figure | None:
    """Shares of the probe's groups with 0..G correct answers over training, a panel per setup."""
    found = {}
    for setup in experiment.setups:
        counts = [pair for run in experiment.of(setup) if (pair := _group_shares(run)) is not None]
        if setup != "base" and counts:
            found[setup] = _mean_shares(counts)
    if not found:
        return None
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    # setups without entropy regularization above those with it, as in the legends
    order = sorted(found, key=lambda name: name.endswith("_entropy")) if len(found) > 3 else \
        list(found)
    group = max(shares.shape[1] for _, shares in found.values()) - 1
    colors = colormaps["viridis"](np.linspace(0.0, 1.0, group + 1))
    figure, panels = new_figure(0.7 + 1.9 * rows, rows, columns, sharex=True, sharey=True,
                                squeeze=False)
    for panel, setup in zip(panels.flat, order, strict=False):
        epochs, shares = found[setup]
        panel.stackplot(epochs, 100.0 * shares.T, colors=colors[:shares.shape[1]],
                        linewidth=0.25, edgecolor="white")
        panel.set_title(setup_title(setup), loc="left")
        panel.set(xlim=(0.0, _end(experiment.of(setup)[0])), ylim=(0.0, 100.0))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        panel.grid(False)
        change = stage_change(experiment.of(setup)[0])
        if change is not None:
            panel.axvline(change, color="white", linewidth=1.4)
            panel.axvline(change, color="black", linewidth=0.9, linestyle=(0, (2, 2)))
    for panel in panels.flat[len(order):]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("groups (%)")
    for panel in panels[-1]:
        panel.set_xlabel("epoch")
    bar = figure.colorbar(
        ScalarMappable(BoundaryNorm(np.arange(-0.5, group + 1.0), group + 1),
                       ListedColormap(colors)),
        ax=panels, ticks=range(group + 1), pad=0.02, aspect=28)
    bar.set_label(f"correct answers in a group of {group}")
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=0)
    return figure


def draw_table2(experiment: Experiment) -> Figure | None:
    """Greedy exact match with intervals; the paper's values as hollow diamonds."""
    table = make_table2(experiment)
    benchmarks = experiment.benchmarks
    if not benchmarks:
        return None
    setups = experiment.setups
    figure, panels = new_figure(1.3 + 0.3 * len(setups), 1, len(benchmarks), sharey=True,
                                squeeze=False)
    figure.get_layout_engine().set(wspace=0.06)
    with_paper = False
    for panel, benchmark in zip(panels[0], benchmarks, strict=True):
        for row, setup in enumerate(setups):
            cell = table.cells.get((setup, benchmark, EXACT_MATCH))
            if cell is None:
                continue
            look = line_style(setup)
            interval = cell.interval
            panel.plot([100 * interval.low, 100 * interval.high], [row, row],
                       color=look["color"], linewidth=1.8, solid_capstyle="butt")
            panel.plot(100 * interval.mean, row, marker="o", markersize=5.5, color=look["color"])
            if cell.paper is not None:  # slightly lower, to avoid overlap
                with_paper = True
                panel.plot(cell.paper, row + 0.28, marker="D", markersize=5.0, color="black",
                           markerfacecolor="white", markeredgewidth=0.9, linestyle="none")
        title = benchmark_title(benchmark)
        place = title.stands_for and benchmark_title(title.stands_for).title
        panel.set_title(title.title + (f"\n(stands for {place})" if place else ""), loc="left")
        panel.set(xlim=(0.0, 100.0), xlabel="exact match (%)", ylim=(len(setups) - 0.4, -0.6))
        panel.set_yticks(range(len(setups)), [setup_title(setup) for setup in setups])
        panel.tick_params(axis="y", length=0)
        panel.grid(True, axis="x")
        panel.grid(False, axis="y")
        panel.spines["left"].set_visible(False)
    marks = [Line2D([], [], color="#333333", marker="o", markersize=5.5, linewidth=1.8,
                    label="measured, 95 % interval")]
    if with_paper:
        marks.append(Line2D([], [], color="black", marker="D", markerfacecolor="white",
                            markersize=5.0, linestyle="none",
                            label="paper (Qwen2.5-0.5B, real benchmarks)"))
    legend_below(figure, marks, len(marks))
    return figure


FIGURES: dict[str, Callable[[Experiment], Figure | None]] = {
    "table2": draw_table2, "reward": draw_reward, "kl": draw_kl, "entropy": draw_entropy,
    "lengths": draw_lengths, "loss": draw_loss, "correctness": draw_correctness,
}


def _probe_curves(experiment: Experiment, key: str, label: str, floor: float | None = None
                  ) -> Figure | None:
    """One panel with a column of every setup's probe; `floor` is the start of the axis."""
    figure, panel = new_figure(3.7)
    if not _curves(panel, experiment, lambda run: series(run, "probe", key)):
        return None
    panel.set_ylabel(label)
    if floor is not None:
        panel.set_ylim(bottom=floor)
    _finish(figure, experiment, [panel])
    return figure


def _curves(panel: Axes, experiment: Experiment,
            read: Callable[[Run], tuple[np.ndarray, np.ndarray]]) -> bool:
    """Draws each setup's mean over seeds with a band, or its seeds; returns whether any exist."""
    drawn = False
    for setup in experiment.setups:
        found = [pair for run in experiment.of(setup) if len((pair := read(run))[0]) > 1]
        if setup == "base" or not found:
            continue
        drawn = True
        grid, values = _on_one_grid(found)
        look = line_style(setup)
        if len(found) >= FEW_SEEDS:
            mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1)
            panel.fill_between(grid, mean - deviation, mean + deviation, color=look["color"],
                               alpha=0.14, linewidth=0.0)
        elif len(found) > 1:
            for row in values:
                panel.plot(grid, row, color=look["color"], linewidth=0.6, alpha=0.7)
        every = max(1, len(grid) // 6)
        panel.plot(grid, values.mean(axis=0), label=setup_title(setup),
                   markevery=(every - 1, every), **look)
    return drawn


def _on_one_grid(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(T,) epochs of the shortest seed and (S, T) values, interpolated if epochs differ."""
    grid = min((epochs for epochs, _ in pairs), key=lambda epochs: (epochs[-1], len(epochs)))
    return grid, np.stack([np.interp(grid, epochs, values) for epochs, values in pairs])


def _binned(run: Run, epochs: np.ndarray, values: np.ndarray, windows: int = 40
            ) -> tuple[np.ndarray, np.ndarray]:
    """Means over parts of the run, each at its last epoch, since single steps are noisy.

    Values are (T, ...). The value before the first step is a part of its own.
    """
    bins = np.ceil(epochs / _end(run) * windows - 1e-9).astype(int)
    kept = np.unique(bins)
    return (np.array([epochs[bins == index].max() for index in kept]),
            np.array([values[bins == index].mean(axis=0) for index in kept]))


def _end(run: Run) -> float:
    """The epoch at which a run ended; 1 for the base model."""
    return max((line["epoch"] for line in (*run.metrics, *run.probe)), default=0.0) or 1.0


def _group_shares(run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """(T,) epochs and (T, G+1) shares of the probe's groups by number of correct answers."""
    lines = [line for line in run.probe if line.get("groups/correct_counts")]
    if len(lines) < 2 or len({len(line["groups/correct_counts"]) for line in lines}) > 1:
        return None
    counts = np.array([line["groups/correct_counts"] for line in lines], dtype=float)
    return _binned(run, np.array([float(line["epoch"]) for line in lines]),
                   counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0), windows=20)


def _mean_shares(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the shares over seeds, on the shortest seed's epochs."""
    columns = pairs[0][1].shape[1]
    pairs = [pair for pair in pairs if pair[1].shape[1] == columns]
    grids = [_on_one_grid([(epochs, shares[:, index]) for epochs, shares in pairs])
             for index in range(columns)]
    return grids[0][0], np.stack([values.mean(axis=0) for _, values in grids], axis=1)


def _finish(figure: Figure, experiment: Experiment, panels: list[Axes]) -> None:
    """Adds epochs on the axes, marks where second stages start, and one legend for all panels."""
    changes = {round(change, 3) for run in experiment.runs
               if (change := stage_change(run)) is not None}
    entries: dict[str, Artist] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries[label] = handle
        panel.set_xlabel("epoch")
        panel.set_xlim(0.0, 1.01 * max(map(_end, experiment.runs)))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    marks: list[Artist] = []
    if changes:
        look = {"color": "#777777", "linewidth": 0.9, "linestyle": (0, (1, 2))}
        for panel in panels:
            for change in changes:
                panel.axvline(change, zorder=0.5, **look)
        marks.append(Line2D([], [], label="second stage starts", **look))
    if any(panel.collections for panel in panels):
        marks.append(Patch(facecolor="#BBBBBB", label="± 1 SD over seeds"))
    # columns fill from above: a setup over its twin with entropy regularization
    order = [title for setup in sorted(experiment.setups, key=_twins_together(experiment))
             if (title := setup_title(setup)) in entries]
    handles = [*(entries[title] for title in order), *marks]
    legend_below(figure, handles, min(4, -(-len(handles) // 2) if len(handles) > 4 else 4))


def _twins_together(experiment: Experiment) -> Callable[[str], tuple[int, bool]]:
    """A sort key that puts a setup's twin with entropy regularization right after it."""
    setups = list(experiment.setups)

    def place(setup: str) -> tuple[int, bool]:
        plain = setup.removesuffix("_entropy")
        return setups.index(plain if plain in setups else setup), setup != plain

    return place

"""Figures of a comparison: forest plot, Pass@k against k, and the methods' own diagnostics."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..config.methods import METHODS
from ..setups import SETUPS
from .arms import Arm
from .loading import Experiment, benchmark_title, series, setup_title
from .scores import EXACT_MATCH, score
from .statistics import SIGNIFICANT
from .style import legend_below, line_style, new_figure, show_size_of_constant

GREY = "#777777"
PANELS = 3  # in a row
TITLE_WIDTH = 27  # characters that fit above such a panel
SFT_WEIGHT = "lambda/sft"
TITLES = {SFT_WEIGHT: "λ, weight of the SFT loss", "kl/anchor": "KL to the loss's anchor"}


def draw_forest(experiment: Experiment, arms: Sequence[Arm], baseline: str,
                titles: Mapping[str, str]) -> Figure | None:
    """Each arm's difference to the baseline in exact match, with its interval."""
    shown = [arm for arm in arms if any(metric == EXACT_MATCH for _, metric in arm.differences)]
    if not shown:
        return None
    benchmarks = experiment.benchmarks
    figure, panels = new_figure(1.2 + 0.27 * len(shown), 1, len(benchmarks), sharey=True,
                                squeeze=False)
    for panel, benchmark in zip(panels[0], benchmarks, strict=True):
        for row, arm in enumerate(shown):
            difference, p = arm.differences.get((benchmark, EXACT_MATCH), (None, 1.0))
            if difference is None:
                continue
            look = line_style(arm.setup)
            panel.plot([100 * difference.low, 100 * difference.high], [row, row],
                       color=look["color"], linewidth=1.8, solid_capstyle="butt")
            panel.plot(100 * difference.mean, row, marker="o", markersize=5.5, color=look["color"],
                       markerfacecolor=look["color"] if p < SIGNIFICANT else "white")
        panel.axvline(0.0, color=GREY, linewidth=0.9)
        panel.set_title(benchmark_title(benchmark).title, loc="left")
        panel.set(xlabel=f"points above {setup_title(baseline)}", ylim=(len(shown) - 0.4, -0.6))
        panel.set_yticks(range(len(shown)), [titles[arm.setup] for arm in shown])
        panel.tick_params(axis="y", length=0)
        panel.grid(True, axis="x")
        panel.grid(False, axis="y")
        panel.spines["left"].set_visible(False)
    marks = [Line2D([], [], color="#333333", marker="o", markersize=5.5, linewidth=1.8,
                    markerfacecolor=fill, label=label)
             for fill, label in (("#333333", f"p < {SIGNIFICANT} after Holm"),
                                 ("white", "not significant"))]
    if any(titles[arm.setup] != setup_title(arm.setup) for arm in shown):
        marks.append(Line2D([], [], linestyle="", label="† more than the baseline's budget"))
    legend_below(figure, marks, len(marks))
    return figure


def draw_pass_at_k(experiment: Experiment, baseline: str) -> Figure | None:
    """Pass@k against k, a panel per arm, the baseline in gray."""
    def curve(setup: str, benchmark: str) -> tuple[list[int], list[float]]:
        ks = [2 ** power for power in range(8)]
        found = [(k, score(experiment, setup, benchmark, f"pass@{k}")) for k in ks]
        pairs = [(k, 100 * float(s.values.mean())) for k, s in found if s is not None]
        return [k for k, _ in pairs], [value for _, value in pairs]

    shown = [setup for setup in experiment.setups
             if any(curve(setup, benchmark)[0] for benchmark in experiment.benchmarks)]
    if not shown:
        return None
    rows = -(-len(shown) // PANELS)
    figure, panels = new_figure(0.8 + 1.7 * rows, rows, PANELS, sharex=True, sharey=True,
                                squeeze=False)
    dashes = dict(zip(experiment.benchmarks, ((), (4.0, 1.6), (1.0, 1.2)), strict=False))
    for panel, setup in zip(panels.flat, shown, strict=False):
        for benchmark in experiment.benchmarks:
            style = {"dashes": dashes.get(benchmark, ())}
            if setup != baseline:
                panel.plot(*curve(baseline, benchmark), color="#BBBBBB", **style)
            panel.plot(*curve(setup, benchmark), color=line_style(setup)["color"], marker="o",
                       markersize=2.5, **style)
        panel.set_title(textwrap.fill(setup_title(setup), TITLE_WIDTH), loc="left")
        panel.set_xscale("log", base=2)
        panel.set_xticks(curve(setup, experiment.benchmarks[0])[0])
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.minorticks_off()
    _hide_empty(panels, len(shown), "k")
    for panel in panels[:, 0]:
        panel.set_ylabel("Pass@k (%)")
    marks = [Line2D([], [], color="#333333", label=benchmark_title(name).title,
                    dashes=dashes.get(name, ())) for name in experiment.benchmarks]
    marks.append(Line2D([], [], color="#BBBBBB", label=setup_title(baseline)))
    legend_below(figure, marks, len(marks))
    return figure


def _hide_empty(panels: np.ndarray, filled: int, label: str) -> None:
    """Hides unused panels (rows, columns); each column's last panel has the x-label."""
    for place, panel in enumerate(panels.flat):
        panel.set_visible(place < filled)
        if place < filled <= place + panels.shape[1]:
            panel.set_xlabel(label)
            panel.tick_params(labelbottom=True)  # a shared axis shows them in the last row only


def is_own(key: str, method: str) -> bool:
    """Whether a column of metrics.jsonl belongs to a method, or to a setting of its runs."""
    return key == "kl/anchor" or key.partition("/")[0] in (method, "entropy_control")


def title_of(key: str) -> str:
    """A column's title: `relift/sft_share` is SFT share."""
    words = key.partition("/")[2].split("_")
    return TITLES.get(key) or " ".join(w.upper() if w in ("kl", "rl", "sft") else w for w in words)


def limit_of(config: Mapping, method: str, key: str) -> float | None:
    """The setting that limits a run's column, if there is one and it is a number."""
    name = key.partition("/")[2]
    if method not in METHODS or name not in METHODS[method].limits:
        return None
    value = ((config.get("settings") or {}).get(method) or {}).get(name)
    return value if isinstance(value, int | float) else None


def draw_diagnostics(experiment: Experiment, method: str) -> Figure | None:
    """A panel per column that a method adds to metrics.jsonl, a line per run.

    Also the weight of the SFT loss, if the method changes it. Dashed: the setting of the same name,
    if it is a limit or target (`MethodSettings.limits`).
    """
    setups = [name for name in experiment.setups if SETUPS[name].method == method]
    runs = {name: experiment.of(name) for name in setups}
    keys = sorted({key for found in runs.values() for run in found for line in run.metrics
                   for key, value in line.items()
                   if is_own(key, method) and isinstance(value, int | float)})
    keys = [key for key in keys if any(len(series(run, "metrics", key)[0]) > 1
                                       for found in runs.values() for run in found)]
    weights = {line.get(SFT_WEIGHT) for found in runs.values() for run in found
               for line in run.metrics}
    if weights - {None, 0.0, 1.0} or (keys and {0.0, 1.0} <= weights):
        keys.insert(0, SFT_WEIGHT)
    if not keys:
        return None
    columns = min(PANELS, len(keys))
    rows = -(-len(keys) // columns)
    figure, panels = new_figure(0.8 + 1.6 * rows, rows, columns, squeeze=False)
    looks = {name: {"color": f"C{index}"} for index, name in enumerate(setups)}
    for panel, key in zip(panels.flat, keys, strict=False):
        for name, found in runs.items():
            for run in found:
                epochs, values = series(run, "metrics", key)
                panel.plot(epochs, values, linewidth=0.8, alpha=0.8,
                           marker="o" if len(values) < 30 else None, markersize=2.0, **looks[name])
                limit = limit_of(run.config, method, key)
                if limit is not None:
                    panel.axhline(limit, color=GREY, linewidth=0.9, linestyle="--", zorder=0.5)
        panel.set_title(title_of(key), loc="left")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        show_size_of_constant(panel)
    _hide_empty(panels, len(keys), "epoch")
    legend_below(figure, [Line2D([], [], label=setup_title(name), **looks[name])
                          for name in setups], min(4, len(setups)))
    return figure

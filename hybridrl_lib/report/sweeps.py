"""A sweep's page: scores for each value of one setting, as a table and a figure."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..records.files import write_whole
from .arms import used
from .comparisons import difference_text
from .hyperparameters import changed, changes_of
from .loading import Experiment, benchmark_title, setup_title
from .scores import EXACT_MATCH, paired_family, score
from .statistics import SIGNIFICANT, Difference, Interval, mean_interval
from .style import as_bytes, legend_below, new_figure, style
from .text import (
    NOTHING,
    bracket,
    bullets,
    csv_text,
    markdown_table,
    number,
    percent,
    plain_table,
)

METRICS = {EXACT_MATCH: "exact match", "pass@1": "Pass@1"}
COLUMNS = ("parameter", "setup", "value", "benchmark", "metric", "mean", "ci_low", "ci_high",
           "seeds", "problems", "difference", "diff_low", "diff_high", "p_holm")
Key = tuple[str, str, str]  # value, benchmark, metric


def report_sweep(folder: Path, parameter: str, title: str, setup: str,
                 experiments: Mapping[str, Experiment]) -> tuple[list[Path], str]:
    """Writes sweep.csv, sweep.md and the figure.

    Args:
        parameter, title: the setting's name on the command line, and its title.
        setup: the setup that was run with every value.
        experiments: by value, in the order of the table.

    Returns:
        The files, and the table for the terminal.
    """
    cells = _cells(setup, experiments)
    files = [write_whole(folder / name, text)
             for name, text in sweep_texts(parameter, title, setup, experiments).items()]
    with style():
        figure = draw_sweep(title, experiments, cells)
        files += [write_whole(folder / "figures" / f"sweep.{kind}", as_bytes(figure, kind))
                  for kind in ("svg", "png")]
    return files, plain_table(*_table(setup, experiments, cells))


def sweep_texts(parameter: str, title: str, setup: str,
                experiments: Mapping[str, Experiment]) -> dict[str, str]:
    """{file name: text} of the tables; arguments as for `report_sweep`."""
    cells = _cells(setup, experiments)
    head, rows = _table(setup, experiments, cells)
    usual, apart = usual_value(setup, experiments), differences(setup, experiments)
    seeds = sorted({cell.seeds for cell in cells.values()})
    changes = changes_of(run for found in experiments.values() for run in found.of(setup))
    text = "\n".join([
        f"# {title}, {setup_title(setup)}\n",
        "Test problems, last checkpoint, strict; percent, mean [95 % interval].\n",
        markdown_table(head, rows, range(1, len(head))),
        *_differences_part(usual, experiments, apart), bullets((
            *((f"Every run has {', '.join(changes)}.",) if changes else ()),
            "No other setting was changed or tuned per value. A run's rollouts, optimizer updates, "
            "and demonstrations may change with the value.",
            "One seed only: intervals and p-values cover test problems only. Another training seed "
            "may reverse a bold difference." if seeds == [1] else
            "Intervals cover seeds and problems.",
            "Compare values by their paired difference. The intervals of two scores may overlap "
            "although the difference is significant.",
            "Choose a value on validation problems, not by this table."))])
    return {"sweep.md": text, "sweep.csv": csv_text(COLUMNS, [
        (parameter, setup, *key, percent(i.mean), percent(i.low), percent(i.high), i.seeds,
         i.problems, *_difference_cells(apart.get(key))) for key, i in cells.items()])}


def usual_value(setup: str, experiments: Mapping[str, Experiment]) -> str:
    """The preset's own value, or else the first: the one whose runs differ from the preset in the
    fewest settings."""
    return min(experiments, key=lambda value: changed(experiments[value].of(setup)[0]))


def differences(setup: str, experiments: Mapping[str, Experiment]
                ) -> dict[Key, tuple[Difference, float]]:
    """{(value, benchmark, metric): (paired difference to the usual value, Holm's p)}; a family is
    one metric. Values tested on other problems are left out."""
    usual, found = usual_value(setup, experiments), {}
    for metric in METRICS:
        pairs = [((value, benchmark, metric), *(score(one, setup, benchmark, metric)
                                                for one in (experiment, experiments[usual])))
                 for value, experiment in experiments.items() if value != usual
                 for benchmark in experiment.benchmarks]
        found |= paired_family(pair for pair in pairs if pair[1] and pair[2]
                               and set(pair[1].ids) == set(pair[2].ids))
    return found


def _differences_part(usual: str, experiments: Mapping[str, Experiment],
                      apart: Mapping[Key, tuple[Difference, float]]) -> list[str]:
    """The differences as Markdown, a row per value."""
    benchmarks = dict.fromkeys(benchmark for _, benchmark, _ in apart)
    columns = [(benchmark, metric) for benchmark in benchmarks for metric in METRICS
               if any(key[1:] == (benchmark, metric) for key in apart)]
    if not columns:
        return []
    head = ["value", *(f"{benchmark_title(benchmark).title}: {METRICS[metric]}"
                       for benchmark, metric in columns)]
    rows = [[value, *(difference_text(apart.get((value, *column))) for column in columns)]
            for value in experiments if value != usual]
    return [f"## Difference to {usual}\n",
            "Percentage points, paired over problems [95 % interval] (p after Holm's correction "
            f"over all values and benchmarks of one metric); bold below {SIGNIFICANT}.\n",
            markdown_table(head, rows, range(1, len(head)))]


def _difference_cells(both: tuple[Difference, float] | None) -> tuple[str, ...]:
    if both is None:
        return ("",) * 4
    difference, p = both
    return (percent(difference.mean), percent(difference.low), percent(difference.high),
            number(p, 6))


def _cells(setup: str, experiments: Mapping[str, Experiment]) -> dict[Key, Interval]:
    """{(value, benchmark, metric): score}."""
    return {(value, benchmark, metric): mean_interval(found.values)
            for value, experiment in experiments.items() for benchmark in experiment.benchmarks
            for metric in METRICS
            if (found := score(experiment, setup, benchmark, metric)) is not None}


def _table(setup: str, experiments: Mapping[str, Experiment],
           cells: Mapping[Key, Interval]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, a row per value, with what its runs used."""
    benchmarks = list(dict.fromkeys(benchmark for _, benchmark, _ in cells))
    columns = [(benchmark, metric) for benchmark in benchmarks for metric in METRICS]
    head = ["value", *(f"{benchmark_title(benchmark).title}: {METRICS[metric]}"
                       for benchmark, metric in columns), "rollouts", "optimizer updates",
            "demonstration tokens", "minutes"]
    rows = []
    for value, experiment in experiments.items():
        spent = used(experiment.of(setup))
        rows.append([value, *(bracket(i.mean, i.low, i.high) if (i := cells.get((value, *key)))
                              else NOTHING for key in columns),
                     f"{spent.rollouts:,.0f}", f"{spent.updates:,.0f}",
                     f"{spent.demonstration_tokens:,.0f}", f"{spent.minutes:.1f}"])
    return head, rows


def draw_sweep(title: str, experiments: Mapping[str, Experiment],
               cells: Mapping[Key, Interval]) -> Figure:
    """Scores by value, a panel per benchmark; values are equally spaced."""
    benchmarks = list(dict.fromkeys(benchmark for _, benchmark, _ in cells))
    values = list(experiments)
    figure, panels = new_figure(3.0, 1, max(1, len(benchmarks)), sharey=True, squeeze=False)
    marks = []
    for place, (metric, label) in enumerate(METRICS.items()):
        look = {"color": f"C{place}", "marker": "os"[place]}
        marks.append(Line2D([], [], label=label, **look))
        for panel, benchmark in zip(panels[0], benchmarks, strict=False):
            found = [(x, cells[value, benchmark, metric]) for x, value in enumerate(values)
                     if (value, benchmark, metric) in cells]
            at = [x + 0.08 * (2 * place - 1) for x, _ in found]
            panel.plot(at, [100 * i.mean for _, i in found], **look)
            panel.vlines(at, [100 * i.low for _, i in found], [100 * i.high for _, i in found],
                         color=look["color"], linewidth=1.0)
    for panel, benchmark in zip(panels[0], benchmarks, strict=False):
        panel.set_title(benchmark_title(benchmark).title, loc="left")
        panel.set_xticks(range(len(values)), values)
        panel.set_xlabel(title)
    panels[0][0].set_ylabel("score (%)")
    legend_below(figure, marks, len(marks))
    return figure

"""How good a run is: scores with intervals next to the base model's, failures, and signal."""

from collections import Counter
from dataclasses import replace

import numpy as np
from IPython.display import Markdown, display
from matplotlib.ticker import MaxNLocator

from ..records.run_folder import RunFolder
from ..report.comparisons import make_comparisons
from ..report.group_signal import right_samples, signal_lines
from ..report.loading import Experiment, benchmark_title, load_experiment, setup_title
from ..report.scores import EXACT_MATCH, EXACT_MATCH_LENIENT, pass_ks
from ..report.style import figure_text, style
from ..report.table2 import make_table2
from ..report.text import literal, markdown_table, percent, signed
from ..rewards.verifier import REASONS
from ..system.errors import printable
from .curves import new_panels, show
from .findings import p_said


def show_scores(record: RunFolder) -> None:
    """Shows a run's test scores in percent with 95 % intervals, and the base model's if it ran.

    Raises:
        UserError: the run is not finished.
    """
    experiment = _this_run_and_base(record)
    table = make_table2(experiment)
    metrics = {EXACT_MATCH: "greedy, strict", EXACT_MATCH_LENIENT: "greedy, lenient"}
    metrics |= {f"pass@{k}": f"pass@{k}" for k in sorted({1, max(pass_ks(experiment))})}
    rows = [[benchmark_title(benchmark).title, setup_title(setup),
             *(table.text(setup, benchmark, metric) for metric in metrics)]
            for benchmark in experiment.benchmarks for setup in reversed(experiment.setups)]
    text = markdown_table(["benchmark", "", *metrics.values()], rows, range(2, 2 + len(metrics)))
    text += ("\nPercent of test problems [95 % interval over problems" + (
        "].\n\n" if record.path.parent.name == "base" else
        "; one seed, so without the variance between seeds].\n\n"))
    comparisons = [c for c in make_comparisons(experiment)
                   if c.metric in (EXACT_MATCH, EXACT_MATCH_LENIENT)]
    text += "".join(
        f"- {benchmark_title(c.benchmark).title}: {setup_title(c.first)} − {setup_title(c.second)} "
        f"= {signed(c.difference.mean, c.difference.low, c.difference.high)} points, "
        f"{metrics[c.metric]}, {p_said(c.difference.p_value)}\n"
        for c in sorted(comparisons, key=lambda c: list(metrics).index(c.metric)))
    if comparisons:
        text += ("\nStrict: the answer is correct and in its box; lenient: correct anywhere. A "
                 "gain by the strict rule only is a gain in form.\n")
    if record.path.parent.name != "base" and "base" not in experiment.setups:
        text += "- The base model was not scored in this experiment; `00_start_here` does it.\n"
    display(Markdown(text))


def _this_run_and_base(record: RunFolder) -> Experiment:
    """The experiment reduced to one run and the base model."""
    experiment = load_experiment(record.path.parent.parent)
    setup, seed = record.path.parent.name, int(record.path.name.removeprefix("seed-"))
    mine = [run for run in experiment.runs if (run.setup, run.seed) == (setup, seed)]
    base = [run for run in experiment.of("base") if run not in mine]
    base = [run for run in base if run.seed == seed] or base[:1]
    return replace(experiment, runs=(*base, *mine) if setup != "base" else tuple(mine))


def show_reasons(record: RunFolder) -> None:
    """Shows the reasons of the strict verdicts on greedy test answers, by benchmark."""
    counts: dict[str, Counter] = {}
    for row in _test_rows(record):
        counts.setdefault(row["benchmark"], Counter())[row["greedy"].get("reason", "wrong")] += 1
    totals = {name: sum(count.values()) for name, count in counts.items()}
    rows = [[reason, *(f"{count[reason]} ({percent(count[reason] / totals[name], 0)} %)"
                       for name, count in counts.items())]
            for reason in REASONS if any(count[reason] for count in counts.values())]
    header = ["reason", *(f"{literal(benchmark_title(name).title)} ({totals[name]})"
                           for name in counts)]
    display(Markdown(markdown_table(header, rows, range(1, len(header)))))


@style()
def show_signal(record: RunFolder, group_size: int = 8) -> None:
    """Draws how many of m samples are correct for each problem, and what this means for RL.

    A group has a signal if some of its G answers are correct and some wrong
    (`statistics.group_signal`).
    """
    rows = record.lines("eval.jsonl")
    drawn, samples = right_samples(rows, "test")
    if not drawn:
        print("No answers were sampled in this run (evaluation.samples=0).")
        return
    figure, panels = new_panels(2.5, columns=len(drawn))
    for panel, (name, right) in zip(np.atleast_1d(panels), drawn.items(), strict=True):
        counts = np.bincount(right, minlength=samples + 1)
        colors = ["#BBBBBB"] + ["#0072B2"] * (samples - 1) + ["#BBBBBB"]
        panel.bar(range(samples + 1), counts, color=colors)
        title = figure_text(benchmark_title(name).title)
        panel.set_title(f"{title} ({len(right)} problems)", loc="left")
        panel.set(xlabel=f"correct samples out of {samples}", ylabel="problems")
        for axis in (panel.xaxis, panel.yaxis):  # counts
            axis.set_major_locator(MaxNLocator(integer=True))
    show(figure, alt="Histogram of correct samples per problem; gray: all wrong or all correct")
    for line in signal_lines(rows, group_size, "test"):
        print(printable(line))


def _test_rows(record: RunFolder) -> list[dict]:
    return [row for row in record.lines("eval.jsonl")
            if row["part"] == "test" and row["checkpoint"] == "last"]

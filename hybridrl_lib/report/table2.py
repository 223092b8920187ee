"""Table 2: every setup on every benchmark with intervals, next to the paper's number."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..setups import paper_setups
from .loading import PAPER_MODEL, Experiment, agreed, benchmark_title, paper_value, setup_title
from .scores import EXACT_MATCH, EXACT_MATCH_BEST, EXACT_MATCH_LENIENT, metric_names, score
from .statistics import Interval, mean_interval
from .text import (
    NOTHING,
    bracket,
    bullets,
    code_span,
    csv_text,
    markdown_table,
    number,
    percent,
    tex_table,
)

COLUMNS = ("setup", "benchmark", "metric", "mean", "ci_low", "ci_high", "seeds", "problems",
           "paper")


@dataclass(frozen=True)
class Cell:
    """One line of table2.csv."""

    setup: str
    benchmark: str
    metric: str
    interval: Interval
    paper: float | None  # percent; exact match only
    dropped: int  # problems that some seed was not scored on

    @property
    def text(self) -> str:
        return bracket(self.interval.mean, self.interval.low, self.interval.high)


@dataclass(frozen=True)
class Table2:
    """All cells, found by (setup, benchmark, metric)."""

    cells: dict[tuple[str, str, str], Cell]

    def text(self, setup: str, benchmark: str, metric: str) -> str:
        """`mean [low, high]` in percent, or a dash."""
        cell = self.cells.get((setup, benchmark, metric))
        return cell.text if cell else NOTHING


def make_table2(experiment: Experiment) -> Table2:
    """Scores every setup, benchmark and metric that was measured."""
    cells = {}
    for setup in experiment.setups:
        for benchmark in experiment.benchmarks:
            for metric in metric_names(experiment):
                scores = score(experiment, setup, benchmark, metric)
                if scores is not None:
                    paper = paper_value(setup, benchmark) if metric == EXACT_MATCH else None
                    cells[setup, benchmark, metric] = Cell(
                        setup, benchmark, metric, mean_interval(scores.values), paper,
                        scores.dropped)
    return Table2(cells)


def table2_csv(table: Table2) -> str:
    """Long form, percent."""
    return csv_text(COLUMNS, [
        (cell.setup, cell.benchmark, cell.metric, percent(cell.interval.mean),
         percent(cell.interval.low), percent(cell.interval.high), cell.interval.seeds,
         cell.interval.problems, number(cell.paper, 1)) for cell in table.cells.values()])


def row_setups(experiment: Experiment) -> tuple[str, ...]:
    """The table's rows: all of the paper's setups, then others that ran."""
    paper = paper_setups()
    return (*paper, *(name for name in experiment.setups if name not in paper))


def wide_header(experiment: Experiment) -> list[str]:
    """The columns of the wide table."""
    header = ["setup", "seeds"]
    for benchmark in experiment.benchmarks:
        title = benchmark_title(benchmark)
        column = benchmark_title(title.paper_key).title
        header += [title.title, f"paper, {column}"]
    return header


def wide_rows(experiment: Experiment, table: Table2) -> list[list[str]]:
    """A row per setup: `mean [low, high]` of greedy exact match, and the paper's value."""
    rows = []
    for setup in row_setups(experiment):
        row = [setup_title(setup), str(len(experiment.of(setup)) or NOTHING)]
        for benchmark in experiment.benchmarks:
            row += [table.text(setup, benchmark, EXACT_MATCH),
                    number(paper_value(setup, benchmark), 1) or NOTHING]
        rows.append(row)
    return rows


def wide_markdown(experiment: Experiment, table: Table2) -> str:
    """The wide table alone."""
    header = wide_header(experiment)
    return markdown_table(header, wide_rows(experiment, table), range(1, len(header)))


def table2_markdown(experiment: Experiment, table: Table2) -> str:
    """The wide table, the other metrics per benchmark, and notes."""
    parts = [f"# Table 2, experiment `{experiment.name}`\n",
             "Exact match of one greedy answer, strict, last checkpoint; percent, mean "
             "[95 % interval].\n",
             wide_markdown(experiment, table), bullets(table_notes(experiment, table))]
    for benchmark in experiment.benchmarks:
        parts += [f"## Other metrics: {benchmark_title(benchmark).title}\n",
                  other_metrics(experiment, table, benchmark)]
    parts.append(bullets((
        "Pass@k: unbiased estimate from samples at the evaluation's temperature, strict.",
        "Lenient: the last box counts, or else the last `####`, or else the last number, even if "
        "the answer did not end.",
        "Best checkpoint: the one with the best strict greedy score on validation problems, which "
        "may be the last.",
        "Training problems: greedy and Pass@1 on problems of the training set. The gap to test "
        "problems is in gap.md.")))
    return "\n".join(parts)


def other_metrics(experiment: Experiment, table: Table2, benchmark: str) -> str:
    """One benchmark's metrics other than greedy exact match, as a Markdown table."""
    titles = {EXACT_MATCH_LENIENT: "greedy, lenient", EXACT_MATCH_BEST: "greedy, best checkpoint",
              "pass@1_lenient": "Pass@1, lenient", "exact_match_train": "greedy, training problems",
              "pass@1_train": "Pass@1, training problems"}
    measured = {metric for _, name, metric in table.cells if name == benchmark}
    metrics = [name for name in metric_names(experiment)
               if name in measured and name != EXACT_MATCH]
    header = ["setup", *(titles.get(name, name.replace("pass", "Pass")) for name in metrics)]
    rows = [[setup_title(setup), *(table.text(setup, benchmark, name) for name in metrics)]
            for setup in experiment.setups]
    return markdown_table(header, rows, range(1, len(header)))


def table2_tex(experiment: Experiment, table: Table2) -> str:
    """The wide table for LaTeX with booktabs."""
    notes = " ".join(note.replace("`", "") for note in table_notes(experiment, table))
    return tex_table(
        wide_header(experiment), wide_rows(experiment, table),
        f"Exact match of one greedy answer, percent, mean [95 % interval]. {notes}",
        label="tab:" + "".join(c if c.isalnum() else "-" for c in experiment.name))


def table_notes(experiment: Experiment, table: Table2) -> list[str]:
    """Notes on the intervals, the benchmarks, and what is missing."""
    return [*interval_notes(experiment), *place_notes(experiment),
            *dropped_notes(table), *experiment.notes]


def interval_notes(experiment: Experiment) -> list[str]:
    """Which sources of variance the intervals include."""
    counts = {setup: len(experiment.of(setup)) for setup in experiment.setups if setup != "base"}
    single = [setup_title(setup) for setup, count in counts.items() if count == 1]
    several = sorted({count for count in counts.values() if count > 1})
    notes = []
    if several:
        notes.append(
            "Intervals cover training seeds and test problems (two-way mean squares, Student's t "
            "with Satterthwaite's degrees of freedom, Wilson's form), for this base model and this "
            "split.")
        if several[0] < 5:
            notes.append(
                f"With fewer than five seeds (here {several[0]}), the variance between seeds is "
                "poorly known. If it is large, a 95 % interval covers less: about 90 % with three "
                "seeds, 86 % with two.")
    if single:
        who = "every setup" if len(single) == len(counts) else ", ".join(single)
        notes.append(f"One seed only ({who}): these intervals cover test problems only, not the "
                     "variance between seeds.")
    if "base" in experiment.setups:
        notes.append("The base model has no training seeds; its intervals cover test problems "
                     "only.")
    return notes


def place_notes(experiment: Experiment) -> list[str]:
    """Which benchmark a generated one replaces, and which model the paper's numbers belong to."""
    notes = []
    stand_ins = [(title.title, benchmark_title(title.stands_for).title)
                 for title in map(benchmark_title, experiment.benchmarks) if title.stands_for]
    if stand_ins:
        places = ", ".join(f"{own} for {real}" for own, real in stand_ins)
        notes.append(f"Stand-ins: {places}. Code generates these problems; they are far easier "
                     "than the real benchmarks.")
    models = agreed(experiment.runs, lambda run: run.manifest.get("model", {}).get("name"))
    here = "; here the model is " + ", ".join(map(code_span, models)) if models else ""
    notes.append(f"The paper's numbers are {PAPER_MODEL} on the real benchmarks{here}. Results "
                 "with another model do not test them.")
    return notes


def dropped_notes(table: Table2) -> list[str]:
    """Problems that not every seed was scored on."""
    return [f"{setup_title(cell.setup)}, {benchmark_title(cell.benchmark).title}, {cell.metric}: "
            f"{cell.dropped} problems left out because not every seed was scored on them."
            for cell in table.cells.values() if cell.dropped]


def summary_rows(experiment: Experiment, table: Table2) -> tuple[Sequence[str], list[list[str]]]:
    """Header and rows of the table for the terminal: setups that ran."""
    titles = {setup_title(setup) for setup in experiment.setups}
    return wide_header(experiment), [row for row in wide_rows(experiment, table)
                                     if row[0] in titles]

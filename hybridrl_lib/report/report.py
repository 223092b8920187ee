"""Writes every table and figure of an experiment from its records; needs no torch."""

from pathlib import Path

from ..records.files import write_whole
from .comparisons import (
    comparisons_csv,
    comparisons_markdown,
    gaps_csv,
    gaps_markdown,
    make_comparisons,
    make_gaps,
)
from .figures import FIGURES
from .group_signal import make_signals, signals_csv, signals_markdown
from .hyperparameters import hyperparameters_markdown
from .loading import Experiment, load_experiment
from .page import beside_published, report_markdown
from .race import make_race, race_csv, race_markdown
from .style import as_bytes, style
from .table2 import (
    Table2,
    make_table2,
    summary_rows,
    table2_csv,
    table2_markdown,
    table2_tex,
    table_notes,
)
from .text import plain_table


def make_report(experiment_folder: Path, out_folder: Path | None = None,
                published: Path | None = None) -> list[Path]:
    """Writes every table and figure of an experiment and prints Table 2.

    The same records give the same bytes. Runs that are not finished or cannot be read are left out
    and listed in the tables' notes.

    Args:
        experiment_folder: holds <setup>/seed-<n>/, such as `results/runs/tiny`.
        out_folder: where to write; default: the experiment's folder.
        published: a folder with an earlier table2.csv, shown in report.md for comparison.

    Returns:
        The files written.

    Raises:
        UserError: no finished run, or no table in `published`.
    """
    experiment = load_experiment(Path(experiment_folder))
    out = Path(out_folder) if out_folder is not None else Path(experiment_folder)
    table = make_table2(experiment)
    texts = make_texts(experiment, table)
    sections = [text for name, text in texts.items()
                if name.endswith(".md") and name != "hyperparameters.md"]
    if published is not None:
        sections.insert(1, beside_published(experiment, table, Path(published)))
    written = [write_whole(out / name, text) for name, text in texts.items()]
    pictures, names = _draw(experiment, out / "figures")
    written += pictures
    written.append(write_whole(out / "report.md", report_markdown(experiment, sections, names)))
    print(f"Exact match, greedy, percent [95 % interval], experiment {experiment.name}:\n")
    print(plain_table(*summary_rows(experiment, table)) + "\n")
    for note in table_notes(experiment, table):
        print(f"* {note}")
    print(f"\n{len(written)} files in {out}; start with {out / 'report.md'}.")
    return written


def make_texts(experiment: Experiment, table: Table2) -> dict[str, str]:
    """{file name: text} of the tables; the Markdown files in the order of report.md."""
    texts = {"table2.csv": table2_csv(table), "table2.md": table2_markdown(experiment, table),
             "table2.tex": table2_tex(experiment, table)}
    comparisons, gaps, race = (make_comparisons(experiment), make_gaps(experiment),
                               make_race(experiment))
    if comparisons:
        texts |= {"differences.csv": comparisons_csv(comparisons),
                  "differences.md": comparisons_markdown(experiment, comparisons)}
    if gaps:
        texts |= {"gap.csv": gaps_csv(gaps), "gap.md": gaps_markdown(experiment, gaps)}
    if race is not None:
        texts |= {"steps_to_threshold.csv": race_csv(race),
                  "steps_to_threshold.md": race_markdown(experiment, race)}
    signals = make_signals(experiment)
    if signals:
        texts |= {"signal.csv": signals_csv(signals),
                  "signal.md": signals_markdown(experiment, signals)}
    texts["hyperparameters.md"] = hyperparameters_markdown(experiment)
    return texts


def _draw(experiment: Experiment, folder: Path) -> tuple[list[Path], list[str]]:
    """Draws and writes every figure whose data was measured."""
    written, names = [], []
    with style():
        for name, draw in FIGURES.items():
            figure = draw(experiment)
            if figure is not None:
                names.append(name)
                written += [write_whole(folder / f"{name}.{kind}", as_bytes(figure, kind))
                            for kind in ("svg", "png")]
    return written, names

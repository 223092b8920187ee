"""Tables as HTML with every cell escaped, and the report's tables and figures."""

import contextlib
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from IPython.display import HTML, Image, Markdown, display

from ..records.folders import published_folder
from ..report.figures import FIGURES
from ..report.loading import load_experiment
from ..report.page import published_to_compare
from ..report.report import make_report
from ..report.style import style
from ..system.errors import UserError, printable

LONGEST_TEXT = 900  # characters of a text in a cell; the record has all of it
WIDEST_PICTURE, COLORS = 1000, 64  # pixels
TAG = re.compile(r"<(?=[A-Za-z/!?])")
# No typesetting: an answer's dollar signs are part of it.
PLAIN = 'class="tex2jax_ignore mathjax_ignore"'
LEFT = 'style="text-align:left;vertical-align:top"'


def escaped(text: object) -> str:
    """Text as HTML that shows it unchanged; control characters become visible signs."""
    text = printable(text)
    if len(text) > LONGEST_TEXT:
        text = text[:LONGEST_TEXT] + " …"
    return html.escape(text, quote=True).replace("\n", "<br>")


def code(text: object) -> str:
    """Text as inline code in HTML, with spaces and dollar signs kept."""
    return f'<code {PLAIN} style="white-space:pre-wrap">{escaped(text)}</code>'


def html_table(header: Sequence[object], rows: Iterable[Sequence[str]]) -> str:
    """A table as HTML. Cells are HTML already: text goes through `escaped` or `code` first."""
    head = "".join(f"<th {LEFT}>{escaped(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td {LEFT}>{cell}</td>" for cell in row) + "</tr>"
                   for row in rows)
    return f"<table {PLAIN}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def show_rows(header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Shows a table of texts and numbers."""
    display(HTML(html_table([_cell(name) for name in header],
                            [[escaped(_cell(value)) for value in row] for row in rows])))


def _cell(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def write_report(folder: Path, preset: str) -> list[Path]:
    """Writes the report of an experiment without printing it; the notebook shows its parts.

    report.md also shows the preset's published table, if there is one.

    Returns:
        The files written.

    Raises:
        UserError: the experiment has no finished run.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        files = make_report(folder, published=published_to_compare(preset))
    print(f"{len(files)} files, from the records of all finished runs")
    return files


def show_table(path: Path) -> None:
    """Shows a Markdown table of the report, with smaller headings.

    Raises:
        UserError: the report did not write it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no {path.name} in {path.parent.name}; make the report first "
                        "(some of its tables need more than one setup).")
    # The report writes no HTML, so anything that looks like a tag is foreign.
    text = TAG.sub("<\u200b", path.read_text(encoding="utf-8"))
    display(Markdown("\n".join("##" + line if line.startswith("#") else line
                               for line in text.split("\n"))))


def show_picture(folder: Path, name: str) -> None:
    """Draws a figure of the report (`report.figures.FIGURES`) from an experiment's records.

    Raises:
        UserError: the experiment has no finished run.
    """
    from .curves import show

    with style():
        figure = FIGURES[name](load_experiment(Path(folder)))
    if figure is None:
        print(f"Nothing was measured for the figure {name!r}.")
    else:
        show(figure, alt=f"Figure {name} of the report")


def say(text: str) -> None:
    """Prints a command's output without its tables, which are too wide; `show_file` shows them."""
    if "\n" not in text.strip():
        print(text.strip())


def show_file(path: Path) -> None:
    """Shows a file that a command wrote: a Markdown table, or a figure as PNG.

    Raises:
        UserError: the file does not exist.
    """
    path = Path(path)
    if path.suffix == ".md":
        show_table(path)
    elif not path.is_file():
        raise UserError(f"There is no figure {path.name} in {path.parent.parent.name}; there was "
                        "no data, or it was not made yet.")
    else:
        display(Image(data=smaller(path.read_bytes()), metadata={"alt": f"Figure {path.stem}"}))


def smaller(png: bytes) -> bytes:
    """A figure reduced to page width and few colors, to keep committed notebooks small."""
    from PIL import Image as Picture

    with Picture.open(io.BytesIO(png)) as picture:
        if picture.width <= WIDEST_PICTURE:
            return png
        height = round(picture.height * WIDEST_PICTURE / picture.width)
        shown = picture.convert("RGB").resize((WIDEST_PICTURE, height), Picture.Resampling.LANCZOS)
    found = io.BytesIO()
    # the default, median cut, merges thin blue and green lines on a white background
    shown.quantize(COLORS, method=Picture.Quantize.MAXCOVERAGE, dither=Picture.Dither.NONE).save(
        found, "PNG", optimize=True)
    return found.getvalue()


def show_published(experiment: str, *names: str) -> None:
    """Shows files of a published experiment, if the repository's results are available."""
    folder = published_folder() / experiment
    if not folder.is_dir():
        print(f"The published results of {experiment} are in the repository, in "
              f"results/published/{experiment}; they do not come with the installed package.")
    for name in names if folder.is_dir() else ():
        show_file(folder / name)

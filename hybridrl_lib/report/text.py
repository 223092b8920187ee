"""Numbers as text, and tables as CSV, Markdown, LaTeX, and plain text."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..system.errors import printable

NOTHING = "–"


def number(value: float | None, digits: int = 2) -> str:
    """A number rounded to `digits` decimals; "" for None.

    Sums differ in the last bit between machines. Rounding twice makes halves round the same way
    everywhere. Zero has no minus sign.
    """
    if value is None:
        return ""
    return f"{round(value, 9) + 0.0:.{digits}f}".replace("-0." + "0" * digits, "0." + "0" * digits)


def percent(share: float | None, digits: int = 2) -> str:
    """A share in percent, without the percent sign."""
    return number(None if share is None else 100.0 * share, digits)


def p_text(p_value: float) -> str:
    """A p-value to four decimals."""
    return "<0.0001" if p_value < 0.0001 else number(p_value, 4)


def bracket(mean: float, low: float, high: float) -> str:
    """`mean [low, high]` of shares, in percent."""
    return f"{percent(mean, 1)} [{percent(low, 1)}, {percent(high, 1)}]"


def signed(mean: float, low: float, high: float) -> str:
    """`+mean [low, high]` of differences of shares, in percentage points."""
    return " ".join(filter(None, (plus(100.0 * mean),
                                  f"[{plus(100.0 * low)}, {plus(100.0 * high)}]")))


def plus(value: float | None) -> str:
    """A number with one decimal and its sign, or a dash."""
    if value is None:
        return NOTHING
    text = number(value, 1)
    return text if text.startswith("-") or text == "0.0" else "+" + text


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A CSV file's text."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Entities, because Markdown renderers differ on backslashes; MathJax would still find &#36;.
_MARKDOWN = str.maketrans({**{sign: f"&#{ord(sign)};" for sign in "<>&|`*[]\\~#"}, "$": "＄"})


def literal(text: object) -> str:
    """Text from a record as Markdown that shows it unchanged, without markup or links."""
    return " ".join(printable(text).translate(_MARKDOWN).split("\n"))


def code_span(text: object) -> str:
    """Text from a record as inline code; `markdown_table` escapes a `|`."""
    return "`" + " ".join(printable(text).replace("`", "'").split("\n")) + "`"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]],
                   right: Iterable[int] = ()) -> str:
    """A Markdown table; the columns `right` are aligned to the right."""
    right = set(right)
    marks = ["---:" if index in right else "---" for index in range(len(header))]
    lines = [header, marks, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line)
                     + " |" for line in lines) + "\n"


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]],
                right: Iterable[int] | None = None) -> str:
    """A table for the terminal.

    Args:
        right: columns of numbers, aligned to the right; default: all but the first.
    """
    right = set(range(1, len(header)) if right is None else right)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join("  ".join(
        cell.rjust(width) if index in right else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in (header, *rows))


def bullets(sentences: Iterable[str]) -> str:
    """A Markdown list."""
    return "".join(f"- {sentence}\n" for sentence in sentences)


_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$",
        "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--",
        "†": r"\textdagger{}"}


def tex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_TEX.get(character, character) for character in text)


def tex_table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str,
              label: str = "") -> str:
    """A table for LaTeX with booktabs."""
    return "\n".join((
        r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering\footnotesize",
        rf"\caption{{{tex(caption)}}}", *([rf"\label{{{label}}}"] if label else []),
        r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}", r"\toprule",
        " & ".join(map(tex, header)) + r" \\", r"\midrule",
        *(" & ".join(map(tex, row)) + r" \\" for row in rows),
        r"\bottomrule", r"\end{tabular}", r"\end{table}")) + "\n"

"""Findings as sentences, made from the published tables; no number is written by hand."""

from collections.abc import Mapping
from pathlib import Path

from IPython.display import Markdown, display

from ..records.folders import published_folder
from ..report.loading import benchmark_title, setup_title
from ..report.statistics import SIGNIFICANT
from ..report.text import NOTHING, code_span, literal, markdown_table, p_text, read_csv

Line = Mapping[str, str]

# The paper's claims that one difference can test: (claim, first, second, expected sign).
CLAIMS = (
    ("RL alone is worse than SFT", "rl", "sft", -1),
    ("RL after SFT is better than RL alone", "sft_then_rl", "rl", +1),
    ("RL without SFT hurts", "rl", "base", -1),
    ("RL after SFT helps", "sft_then_rl", "sft", +1),
    ("entropy regularization helps SFT", "sft_entropy", "sft", +1),
    ("entropy regularization helps RL", "rl_entropy", "rl", +1),
    ("entropy regularization helps SFT + RL", "sft_then_rl_entropy", "sft_then_rl", +1),
)


def show_findings(setup: str, experiment: str = "tiny") -> None:
    """Shows what the published records say about a setup."""
    display(Markdown(findings(setup, published_folder() / experiment)))


def findings(setup: str, folder: Path) -> str:
    """The sentences as Markdown: scores, then all comparisons of the setup."""
    scores = [row for row in _lines(folder / "table2.csv") if row["setup"] == setup]
    if not scores:
        return (f"There are no published records of this setup here ({code_span(folder.name)}): "
                "they are in the project's repository in `results/published`.")
    found = {(row["benchmark"], row["metric"]): row for row in scores}
    differences = [row for row in _lines(folder / "differences.csv") if row["first"] == setup]
    parts = [f"From the published records of the experiment {code_span(folder.name)}:\n"]
    for benchmark in dict.fromkeys(row["benchmark"] for row in scores):
        exact = found.get((benchmark, "exact_match"))
        if exact is None:
            continue
        parts.append(_score_sentence(setup, benchmark, exact, found))
        parts += [_difference_sentence(row) for row in differences
                  if row["benchmark"] == benchmark and row["metric"] == "exact_match"]
    return "\n".join(parts)


def _score_sentence(setup: str, benchmark: str, exact: Line, found: Mapping) -> str:
    title = benchmark_title(benchmark).title
    text = (f"- **{title}**: {setup_title(setup)} answers {_percent(exact)} of "
            f"{exact['problems']} test problems correct with one greedy answer "
            f"({_seeds(exact['seeds'], setup)})")
    one = found.get((benchmark, "pass@1"))
    many = next((found[benchmark, f"pass@{k}"] for k in (8, 4, 2)
                 if (benchmark, f"pass@{k}") in found), None)
    if one and many:
        text += f"; sampled, pass@1 is {one['mean']} % and {many['metric']} is {many['mean']} %"
    if exact.get("paper"):
        text += (f". The paper's number is {exact['paper']} %, for another model and "
                 "benchmark" if benchmark.startswith("tiny") else
                 f". The paper prints {exact['paper']} %")
    return text + "."


def _difference_sentence(row: Line) -> str:
    first, second = setup_title(row["first"]), setup_title(row["second"])
    size = float(row["difference"])
    if float(row["p_holm"]) < SIGNIFICANT:
        verdict = f"**{'better' if size > 0 else 'worse'}** than {second} (significant)"
    else:
        verdict = f"not distinguishable from {second}"
    return (f"    - {first} is {verdict}: {_signed(row)} points, "
            f"{p_said(float(row['p_holm']))} (Holm).")


def show_claims(folder: Path) -> None:
    """Shows the paper's claims next to an experiment's measured differences."""
    display(Markdown(claims(Path(folder))))


def claims(folder: Path) -> str:
    """A Markdown table of the claims, the measured differences, and what these say."""
    measured = {(row["first"], row["second"], row["benchmark"]): row
                for row in _lines(folder / "differences.csv") if row["metric"] == "exact_match"}
    rows = []
    for claim, first, second, sign in CLAIMS:
        for benchmark in dict.fromkeys(key[2] for key in measured):
            row = measured.get((first, second, benchmark))
            if row is not None:
                rows.append([claim, f"{setup_title(first)} − {setup_title(second)}",
                             benchmark_title(benchmark).title,
                             _signed(row), _plus(row["paper"]) or NOTHING, _verdict(row, sign)])
    if not rows:
        return "No two setups of this experiment have finished yet, so nothing can be compared."
    return markdown_table(["claim", "difference", "benchmark", "measured, points [95 %]",
                           "paper", "here"], rows, (3, 4))


def _verdict(row: Line, sign: int) -> str:
    if float(row["p_holm"]) >= SIGNIFICANT:
        return "undecided"
    return "holds" if float(row["difference"]) * sign > 0 else "the opposite holds"


def p_said(p_value: float) -> str:
    """`p = 0.0123`, or `p < 0.0001`."""
    text = p_text(p_value)
    return f"p < {text[1:]}" if text.startswith("<") else f"p = {text}"


def _signed(row: Line) -> str:
    """The difference with its interval, with the digits of the table."""
    return f"{_plus(row['difference'])} [{_plus(row['ci_low'])}, {_plus(row['ci_high'])}]"


def _plus(number: str) -> str:
    return number if not number or number.startswith("-") or not float(number) else "+" + number


def _percent(row: Line) -> str:
    return f"{row['mean']} % [{row['ci_low']}, {row['ci_high']}]"


def _seeds(count: str, setup: str) -> str:
    if setup == "base":
        return "no training, so no seeds"
    return f"mean over {count} seeds" if int(count) > 1 else "one seed"


def _lines(path: Path) -> list[dict[str, str]]:
    return [{name: literal(value or "") for name, value in row.items() if name}
            for row in read_csv(path)]

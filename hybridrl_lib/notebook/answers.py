"""Tables of what models wrote, with every piece escaped."""

from collections.abc import Mapping, Sequence

from IPython.display import HTML, display

from ..config.presets import settings_from_dict
from ..problems.splits import load_parts
from ..records.run_folder import RunFolder
from ..system.errors import UserError
from .tables import PLAIN, code, escaped, html_table

Rows = Sequence[Mapping[str, object]]


def show_completions(record: RunFolder, count: int = 4) -> None:
    """Shows some completions that were sampled in training, the first and the last."""
    rows = record.lines("samples.jsonl")
    if not rows:
        print("No completions were sampled in training: SFT learns from reference solutions.")
        return
    chosen = rows if len(rows) <= count else [*rows[:count // 2], *rows[-(count - count // 2):]]
    display(HTML(completions_table(chosen)))


def completions_table(rows: Rows) -> str:
    """Lines of samples.jsonl as an HTML table."""
    return html_table(("step", "problem", "completion", "gold", "reward"), [
        (escaped(row["step"]), code(row["prompt"]), code(_ended(row["completion"], row)),
         code(row["gold"]), escaped(f"{row['reward']:g}")) for row in rows])


def _ended(text: object, row: Mapping[str, object]) -> str:
    return str(text) + ("" if row.get("finished", True) else " [cut off]")


def show_answers(record: RunFolder, count: int = 4) -> None:
    """Shows greedy answers to test problems, correct and wrong ones of every benchmark in turn."""
    rows = [row for row in record.lines("eval.jsonl")
            if row["part"] == "test" and row["checkpoint"] == "last"]
    questions = _questions(record)
    piles: dict[tuple, list] = {}
    for row in rows:
        piles.setdefault((row["greedy"]["strict"], row["benchmark"]), []).append(row)
    piles = [piles[key] for key in sorted(piles, key=lambda key: not key[0])]
    chosen = [pile[turn] for turn in range(count) for pile in piles if turn < len(pile)][:count]
    display(HTML(html_table(("problem", "greedy answer", "gold", "verdict"), [
        (code(questions.get(row["id"], row["id"])),
         code(_ended(row["greedy"]["text"], row["greedy"])), code(row["gold"]),
         escaped(row["greedy"].get("reason", "right" if row["greedy"]["strict"] else "wrong")))
        for row in chosen])))


def _questions(record: RunFolder) -> dict[str, str]:
    """Question by id; empty if the problems are no longer available."""
    try:
        config = record.read("config.json") or {}
        return {p.id: p.question
                for p in load_parts(settings_from_dict(config["settings"]).data).test}
    except (UserError, KeyError):
        return {}


def show_tokens(answers: Sequence[Sequence[str]], values: Sequence[Sequence[float]],
                labels: Sequence[str], largest: float | None = None, digits: int = 2) -> None:
    """Shows the tokens of some answers with a number under each; blue is positive, orange negative.

    Args:
        answers: the tokens of every answer, as text.
        values: a number for each token.
        labels: a label for every answer.
        largest: the number with the strongest color; default: the largest one.
    """
    strongest = largest or max((abs(v) for row in values for v in row), default=0.0) or 1.0
    lines = []
    for tokens, numbers, label in zip(answers, values, labels, strict=True):
        cells = "".join(_token(t, v, strongest, digits)
                        for t, v in zip(tokens, numbers, strict=True))
        lines.append(f'<p style="margin:0 0 0.2em 0"><b>{escaped(label)}</b></p>'
                     f'<div style="margin:0 0 0.8em 0">{cells}</div>')
    display(HTML(f"<div {PLAIN}>{''.join(lines)}</div>"))


def _token(text: str, value: float, strongest: float, digits: int) -> str:
    strength = min(1.0, abs(value) / strongest)
    color = "0,114,178" if value >= 0 else "213,94,0"  # blue and orange
    number = f"{round(value, digits) + 0.0:.{digits}f}"  # no minus sign before a zero
    return (f'<span style="display:inline-block;text-align:center;margin:1px;padding:1px 4px;'
            f'background:rgba({color},{0.55 * strength:.2f})"><code style="white-space:pre;'
            f'background:none">{escaped(text)}</code><br><small>{number}</small></span> ')

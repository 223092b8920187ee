r"""GSM8K: 8,792 grade school word problems (Cobbe et al., 2021, MIT license).

A row's `answer` has steps with calculator notes (`48/2 = <<48/2=24>>24`) and ends with a line
`#### 72`. The notes are removed and the last line becomes `The answer is \boxed{72}.`, so that all
benchmarks have one answer format (a choice of this project; the paper does not say).
"""

import re

from ..system.errors import UserError
from .problem import BenchmarkData, Problem, answer_sentence
from .source import Row, Source, load_rows

SOURCE = Source(folder="gsm8k", path="openai/gsm8k", name="main", splits=("train", "test"),
                revision="740312add88f781978c0658806c59bc2815b9866")

CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")
FINAL_LINE = re.compile(r"####\s*(\S.*)")
THOUSANDS_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3})")


def rewrite_solution(row: Row) -> tuple[str, str]:
    """The solution for SFT and the gold answer of a row.

    Raises:
        UserError: the row does not end with a line `#### ANSWER`.
    """
    answer = CALCULATOR_NOTE.sub("", row.text("answer"))
    lines = [line.rstrip() for line in answer.splitlines() if line.strip()]
    found = FINAL_LINE.fullmatch(lines[-1]) if lines else None
    if found is None:
        raise UserError(f"The last line '#### ANSWER' is missing in {row.place}; "
                        "fix or remove that row.")
    gold = THOUSANDS_SEPARATOR.sub("", found[1])
    return "\n".join([*lines[:-1], answer_sentence(gold)]), gold


def load_gsm8k() -> BenchmarkData:
    """All rows, first the training file, then the test file; ids such as `gsm8k/train/123`.

    The number in an id counts the rows of the file from 0, as the hub does.

    Raises:
        UserError: see `load_rows` and `rewrite_solution`.
    """
    rows, revision = load_rows(SOURCE)
    problems = []
    for row in rows:
        solution, gold = rewrite_solution(row)
        problems.append(Problem(id=f"gsm8k/{row.split}/{row.index}",
                                question=row.text("question").strip(), solution=solution,
                                answer=gold, benchmark="gsm8k"))
    test = frozenset(f"gsm8k/{row.split}/{row.index}" for row in rows if row.split == "test")
    return BenchmarkData(tuple(problems), revision, test)

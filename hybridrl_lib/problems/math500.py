r"""MATH-500: 500 competition problems (Hendrycks et al., 2021; Lightman et al., 2023; MIT license).

Solutions stay as they are: they box their answers, eight of them more than once, and some draw a
figure in `[asy]`.
"""

from ..system.errors import UserError
from .problem import BenchmarkData, Problem
from .source import Source, load_rows

SOURCE = Source(folder="math500", path="HuggingFaceH4/MATH-500", name=None, splits=("test",),
                revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be")
LEVELS = range(1, 6)


def load_math500() -> BenchmarkData:
    """All rows, with level and subject; ids such as `math500/test/algebra/841.json`.

    The data set has one file, so no test part of its own.

    Raises:
        UserError: see `load_rows`; a row lacks a text, a box, or a level from 1 to 5.
    """
    rows, revision = load_rows(SOURCE)
    problems = []
    for row in rows:
        solution, level = row.text("solution"), row.values.get("level")
        if "\\boxed" not in solution:
            raise UserError(f"There is no \\boxed{{}} in the solution in {row.place}; "
                            "fix or remove that row.")
        if level not in LEVELS:
            raise UserError(f"There is no level from 1 to 5 in {row.place}; "
                            "fix or remove that row.")
        problems.append(Problem(id=f"math500/{row.text('unique_id')}",
                                question=row.text("problem").strip(), solution=solution.strip(),
                                answer=row.text("answer").strip(), benchmark="math500",
                                level=level, subject=row.text("subject")))
    return BenchmarkData(tuple(problems), revision)

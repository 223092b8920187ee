"""Questions in a notebook: the reader sets `answer`, and a cell checks it."""

import math
from collections.abc import Sequence
from typing import Any


def check(question: str, answer: Any, expected: Any, hint: str = "",
          tolerance: float = 0.005) -> None:
    """Prints whether the reader's answer is correct. It never stops a notebook.

    Args:
        question: what is asked, in a few words.
        answer: None until the reader has tried; a number, text, truth value, or a list of these.
        expected: the correct answer, of the same kind. Tensors and arrays count as lists.
        hint: shown with a wrong answer.
        tolerance: allowed difference of numbers, absolute or relative to the expected one.
    """
    if answer is None:
        print(f"your turn: {question}. Replace None by your answer and run the cell again.")
    elif _same(_plain(answer), _plain(expected), tolerance):
        print(f"right: {question} = {_said(_plain(answer))}")
    else:
        print(f"not yet: {question} is not {_said(_plain(answer))}."
              + (f" Hint: {hint}" if hint else ""))


def _plain(value: Any) -> Any:
    """A number, text, truth value, or list from whatever holds one."""
    return value.tolist() if hasattr(value, "tolist") else value


def _same(answer: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, bool) or isinstance(answer, bool):
        return answer is expected
    if isinstance(expected, str) or isinstance(answer, str):
        return str(answer).strip().casefold() == str(expected).strip().casefold()
    if isinstance(expected, Sequence) or isinstance(answer, Sequence):
        return (isinstance(answer, Sequence) and isinstance(expected, Sequence)
                and len(answer) == len(expected)
                and all(_same(a, e, tolerance) for a, e in zip(answer, expected, strict=True)))
    try:
        return math.isclose(answer, expected, rel_tol=tolerance, abs_tol=tolerance)
    except TypeError:
        return False


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_said, value)) + "]"
    return str(value)

"""Finds facts in text whose wording may change: names, numbers, and files."""

import re


def lines_with(text: str, *facts) -> list[str]:
    """The lines of a text that hold all facts, each as a whole word."""
    patterns = [re.compile(rf"(?<!\w){re.escape(str(fact))}(?!\w)") for fact in facts]
    return [line for line in text.splitlines() if all(p.search(line) for p in patterns)]


def notes_with(text: str, *facts) -> list[str]:
    """`lines_with` of prose and bullet points: without the rows of tables."""
    return [line for line in lines_with(text, *facts) if not line.startswith("|")]

"""The README says what the records say, and its commands and links exist."""

import re
from pathlib import Path

import pytest

from hybridrl_lib.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_the_published_ones():
    """Protects against a README that quotes another run than the committed one."""
    for table in sorted(ROOT.glob("results/published/*/table2.md")):
        text = table.read_text(encoding="utf-8").split("## Other")[0]
        rows = [line for line in text.splitlines() if line.startswith("|")]
        if table.parent.name.startswith("base-"):  # one row each, beside what others measured
            scores = [cell.strip() for cell in rows[-1].split("|") if "[" in cell]
            assert any(all(score in line for score in scores) for line in README.splitlines()
                       if table.parent.name in line), f"{table.parent.name}: {scores}"
            continue
        for row in rows:
            assert row in README, f"{table.parent.name}: {row}"


def test_links_and_notebooks_exist():
    """Protects against dead links after a file moved, and against a notebook left out."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for notebook in ROOT.glob("notebooks/*.ipynb"):
        assert f"notebooks/{notebook.name}" in README


@pytest.mark.parametrize("line", re.findall(r"^hybridrl (\w[\w-]*)", README, re.MULTILINE))
def test_commands_exist(line, capsys):
    """Protects against a command in the README that the command line does not know."""
    assert main([line, "--help"]) == 0
    assert "usage" in capsys.readouterr().out

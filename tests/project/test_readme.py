"""README.md and docs/: links, commands, notebooks, tables, and formulas all exist."""

import re
from pathlib import Path

from hybridrl_lib.cli import COMMANDS
from hybridrl_lib.report.docs import render

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results" / "published"
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
         for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README = PAGES["README.md"]
CODE_BLOCK = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
MARKED_TABLE = re.compile(r"<!-- table: (.+?) -->\n(.*?)<!-- /table -->", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", re.MULTILINE)


def test_every_relative_link_exists():
    """Protects against dead links after a file moved."""
    dead = []
    for name, text in PAGES.items():
        for found in LINK.finditer(text):
            target = (found[1] or found[2]).partition("#")[0]
            if target and not re.match(r"[a-z]+:", target) and not (
                    (ROOT / name).parent / target).exists():
                dead.append((name, target))
    assert not dead
    assert len(README.splitlines()) <= 150
    assert not [path.name for path in sorted(ROOT.glob("notebooks/*.ipynb"))
                if f"../notebooks/{path.name}" not in PAGES["docs/notebooks.md"]]


def test_commands_exist():
    """Protects against a command that the command line does not have."""
    called = {(name, command) for name, text in PAGES.items() for block in CODE_BLOCK.findall(text)
              for command in re.findall(r"(?:^|[\s/;&|(])hybridrl ([a-z][\w-]*)", block)}
    unknown = sorted(call for call in called if call[1] not in COMMANDS)
    assert len({command for _, command in called}) > 5 and not unknown


def test_tables_are_the_published_ones():
    """Protects against a page that quotes other runs than the committed ones."""
    marked = [(name, found[1], found[2]) for name, text in PAGES.items()
              for found in MARKED_TABLE.finditer(text)]
    wrong = [(name, table) for name, table, text in marked
             if text != render(table, PUBLISHED, up="" if name == "README.md" else "../")]
    markers = sum(text.count("<!-- table: ") for text in PAGES.values())
    assert len(marked) == markers > 1 and not wrong


def test_a_step_is_in_the_functions_that_the_picture_of_the_code_names():
    """Protects the walk through one GRPO step: 15 functions of 8 files, each where it is said."""
    rows = re.findall(r"^\| \d+ \| `([\w.]+)` \| \[([\w/.]+)\]", PAGES["docs/architecture.md"],
                      re.MULTILINE)
    missing = [row for row in rows if f"def {row[0].rpartition('.')[2]}(" not in (
        ROOT / "hybridrl_lib" / row[1]).read_text(encoding="utf-8")]
    assert not missing and len(rows) == 15 and len({file for _, file in rows}) == 8

"""The tables of README.md and docs/, copied from published pages.

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`.
"""

import re
from pathlib import Path

from ..records.files import write_whole
from ..records.run_folder import RunFolder
from ..system.errors import UserError
from .loading import benchmark_title
from .text import markdown_table, read_csv

_MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- /table -->)", re.DOTALL)


def write_tables(project: Path) -> list[Path]:
    """Rewrites the marked tables of README.md and docs/.

    Args:
        project: a checkout, with results/published/.

    Returns:
        The pages that changed.

    Raises:
        UserError: a page that a table comes from is missing, or a marked name is not known.
    """
    changed = []
    for page in [project / "README.md", *sorted((project / "docs").glob("*.md"))]:
        old = page.read_text(encoding="utf-8")
        new = with_tables(old, project / "results" / "published", page.parent != project)
        if new != old:
            changed.append(write_whole(page, new))
    return changed


def with_tables(text: str, published: Path, in_docs: bool = False) -> str:
    """A page with its marked tables made again; `in_docs` if it lies in docs/."""
    up = "../" if in_docs else ""
    return _MARKED.sub(lambda match: match[1] + render(match[2], published, up) + match[3], text)


def render(name: str, published: Path, up: str = "") -> str:
    """One marked table.

    Args:
        name: `table2 EXPERIMENT`, `sweeps`, `base models` or `speed`.
        up: from the page to the project's root, for links.
    """
    kind, _, experiment = name.partition(" ")
    try:
        if kind == "table2":
            return "".join(_first_table(published / experiment / "table2.md"))
        if name == "speed":
            return "".join(_first_table(published / "bench" / "cpu-amd-epyc-2-cores.md"))
        if name == "sweeps":
            return _sweeps(published, up)
        if name == "base models":
            return _base_models(published, up)
    except FileNotFoundError as error:
        raise UserError(f"The table {name!r} comes from {error.filename}, which does not exist."
                        ) from error
    raise UserError(f"There is no table {name!r}; choose from table2 EXPERIMENT, sweeps, "
                    "base models, speed.")


def _first_table(page: Path) -> list[str]:
    """The lines of a page's first table."""
    lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    end = next((index for index, line in enumerate(lines[start:], start)
                if not line.startswith("|")), len(lines))
    return lines[start:end]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip(" |\n").split("|")]


def _sweeps(published: Path, up: str) -> str:
    """Exact match in percent per value; bold where the difference is significant."""
    rows, titles = [], []
    for folder in sorted(published.glob("*-sweep-*")):
        header, _, *lines = map(_cells, _first_table(folder / "sweep.md"))
        columns = [index for index, title in enumerate(header) if title.endswith(": exact match")]
        titles = [header[index].removesuffix(": exact match") for index in columns]
        facts = read_csv(folder / "sweep.csv")
        bold = {(fact["value"], benchmark_title(fact["benchmark"]).title) for fact in facts
                if fact["metric"] == "exact_match" and float(fact["p_holm"] or 1) < 0.05}
        scores = [", ".join(f"**{score}**" if (line[0], title) in bold else score
                            for line in lines for score in [line[index].split()[0]])
                  for index, title in zip(columns, titles, strict=True)]
        link = f"[{facts[0]['parameter']}]({up}results/published/{folder.name}/sweep.md)"
        rows.append([link, f"`{facts[0]['setup']}`", ", ".join(line[0] for line in lines), *scores])
    return markdown_table(["setting", "setup", "values", *titles], rows)


def _base_models(published: Path, up: str) -> str:
    """Untrained models: the row `base model` of every experiment `base-*`."""
    rows, header = [], []
    for folder in sorted(published.glob("base-*")):
        columns, _, base, *_ = map(_cells, _first_table(folder / "table2.md"))
        scored = [index for index, name in enumerate(columns)
                  if index > 1 and not name.startswith("paper")]
        header = [columns[index] for index in scored]
        model = RunFolder(next(folder.glob("base/seed-*"))).read("manifest.json")["model"]
        rows.append([f"[{Path(model['name']).stem}]({up}results/published/{folder.name}/report.md)",
                     f"`{model['sha256'][:12]}`", *(base[index] for index in scored)])
    return markdown_table(["model", "sha256", *header], rows, range(2, 2 + len(header)))

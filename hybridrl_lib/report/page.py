"""report.md: tables, figures, and facts about the runs on one page."""

import re
from pathlib import Path
from typing import Any

from ..config.presets import smoke_from_environment
from ..records.folders import published_folder
from ..records.health import DETECTORS, replay
from ..system.errors import UserError
from .loading import Experiment, agreed, benchmark_title, probe_problems, setup_title
from .scores import EXACT_MATCH
from .table2 import Table2
from .text import NOTHING, bracket, literal, markdown_table, number, read_csv

OF_THE_PROBE = ("reward", "kl", "entropy", "lengths", "correctness")
CAPTIONS = {
    "table2": "Exact match of one greedy answer with 95 % intervals; hollow: the paper's values.",
    "reward": "Reward on the probe: answers of every setup to the same validation prompts.",
    "kl": "KL divergence of the trained model from the base model, on the probe.",
    "entropy": "Entropy of the distribution of sampled tokens, on the probe.",
    "lengths": "Mean length of completions on the probe.",
    "loss": "The losses that were minimized. An RL loss near 0 is normal; see the reward instead.",
    "correctness": "Correct answers per group of the probe's completions, as shares of groups, "
                   "averaged over seeds and twentieths of the run; epoch 0 is the base model.",
}


def report_markdown(experiment: Experiment, sections: list[str], figures: list[str]) -> str:
    """Joins the tables (their headings one level down), the figures, and the runs' summary.

    Args:
        sections: Markdown texts, each with one first-level heading.
        figures: names of the figures that were drawn, without suffix.
    """
    parts = [f"# Report, experiment `{experiment.name}`\n",
             "Made from the records by `hybridrl report`.\n"]
    parts += [_one_level_down(section) for section in sections]
    if figures:
        parts.append("## Figures\n")
        parts += [f"![{name}](figures/{name}.png)\n\n{caption(experiment, name)}\n"
                  for name in figures]
    parts += ["## Runs\n", "Every setting: [hyperparameters.md](hyperparameters.md).\n",
              runs_table(experiment), facts(experiment), warnings_table(experiment),
              answers_table(experiment)]
    return "\n".join(part for part in parts if part)


def caption(experiment: Experiment, name: str) -> str:
    """What a figure shows; for the probe, also on which problems."""
    problems = probe_problems(experiment) if name in OF_THE_PROBE else ""
    return CAPTIONS[name] + (f" Prompts: {problems}." if problems else "")


def _one_level_down(text: str) -> str:
    return "\n".join("#" + line if line.startswith("#") else line for line in text.split("\n"))


def runs_table(experiment: Experiment) -> str:
    """Seeds, time, and tokens per setup."""
    rows = []
    for setup in experiment.setups:
        runs = experiment.of(setup)
        resumed = sum(bool(run.manifest.get("resumed_from")) for run in runs)
        rows.append([setup_title(setup), ", ".join(str(run.seed) for run in runs),
                     _minutes(runs, "seconds/wall"), _minutes(runs, "seconds/device"),
                     _tokens(runs), str(resumed)])
    return markdown_table(["setup", "seeds", "wall time, min per run",
                           "CPU time of the process, min per run", "tokens per run", "resumed"],
                          rows, (2, 3, 5))


def _minutes(runs: tuple, key: str) -> str:
    found = [float(run.manifest[key]) for run in runs
             if isinstance(run.manifest.get(key), int | float)]
    return number(sum(found) / len(found) / 60.0, 1) if found else NOTHING


def _tokens(runs: tuple) -> str:
    """Mean of each kind of tokens."""
    kinds: dict[str, list[float]] = {}
    for run in runs:
        tokens = run.manifest.get("tokens")
        for kind, count in (tokens if isinstance(tokens, dict) else {}).items():
            if isinstance(count, int | float):
                kinds.setdefault(kind, []).append(count)
    return ", ".join(f"{literal(kind)} {round(sum(counts) / len(runs)):,}"
                     for kind, counts in kinds.items()) or NOTHING


def facts(experiment: Experiment) -> str:
    """What the manifests say; all values where they differ."""
    def model(manifest: dict[str, Any]) -> str | None:
        entry = manifest.get("model") or {}
        if not entry.get("name"):
            return None
        count = entry.get("parameters")
        return (entry["name"] + (f", {count:,} parameters" if isinstance(count, int) else "")
                + (f", sha256 {str(entry['sha256'])[:12]}" if entry.get("sha256") else ""))

    def commit(manifest: dict[str, Any]) -> str | None:
        name = manifest.get("git_commit")
        dirty = " (with changes)" if manifest.get("git_dirty") else ""
        return f"{str(name)[:12]}{dirty}" if name else None

    def versions(manifest: dict[str, Any]) -> str:
        return ", ".join(f"{name} {version}"
                         for name, version in sorted((manifest.get("versions") or {}).items()))

    def data(manifest: dict[str, Any]) -> str:
        lines = []
        for name, entry in (manifest.get("data") or {}).items():
            counts = entry.get("problems") or {}
            revision = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1", str(entry.get("revision")))
            lines.append(f"{benchmark_title(name).title} at {revision}: "
                         + ", ".join(f"{count} {part}" for part, count in counts.items()))
        return "; ".join(lines)

    sources = {"model": model, "data": data, "commit": commit,
               "numerics version": lambda manifest: manifest.get("numerics_version"),
               "device": lambda manifest: manifest.get("device"),
               "precision": lambda manifest: manifest.get("precision"), "versions": versions}
    rows = [[name, " / ".join(map(literal, agreed(
                experiment.runs, lambda run, read=read: read(run.manifest)))) or NOTHING]
            for name, read in sources.items()]
    return markdown_table(["", "all runs"], rows)


def warnings_table(experiment: Experiment) -> str:
    """The warnings of `records/health.py` in each run."""
    heading = "## Warnings in training\n\n"
    trained = [run for run in experiment.runs if run.metrics]
    rows = [[setup_title(run.setup), str(run.seed), alarm.name, alarm.steps,
             literal(alarm.sentence)]
            for run in trained for alarm in replay(run.metrics, run.probe).alarms]
    if not rows:
        return f"{heading}None, by {len(DETECTORS)} detectors on {len(trained)} runs.\n"
    return heading + markdown_table(["setup", "seed", "warning", "steps", "at its start"],
                                    rows, (1,))


def answers_table(experiment: Experiment) -> str:
    """How the greedy test answers end; a truncated answer scores nothing."""
    header = ["setup"]
    for benchmark in experiment.benchmarks:
        header += [f"{benchmark_title(benchmark).title}: cut off, %", "length, tokens"]
    rows = []
    for setup in experiment.setups:
        row = [setup_title(setup)]
        for benchmark in experiment.benchmarks:
            found = [run.answers[key] for run in experiment.of(setup)
                     if (key := ("last", "test", benchmark)) in run.answers]
            count = sum(len(answers.ids) for answers in found)
            row += [number(100.0 * sum(int((~a.finished).sum()) for a in found) / count, 1),
                    number(sum(int(a.tokens.sum()) for a in found) / count, 1)] if count else \
                   [NOTHING, NOTHING]
        rows.append(row)
    return "## Greedy test answers\n\n" + markdown_table(header, rows, range(1, len(header)))


def published_to_compare(preset: str) -> Path | None:
    """The folder of the preset's published table; None without one, and for smoke runs."""
    folder = published_folder() / preset
    found = (folder / "table2.csv").is_file() and not smoke_from_environment()
    return folder if found else None


def beside_published(experiment: Experiment, table: Table2, published: Path) -> str:
    """This experiment's exact match next to that of a published table2.csv (a file or its folder).

    Raises:
        UserError: there is no such table.
    """
    path = published / "table2.csv" if published.is_dir() else published
    try:
        lines = {(line["setup"], line["benchmark"]): line for line in read_csv(path)
                 if line["metric"] == EXACT_MATCH}
    except (OSError, KeyError):
        lines = {}
    if not lines:
        raise UserError(f"There is no published table in {published}; name a folder with a "
                        "table2.csv or leave it out.") from None
    rows = []
    for (setup, benchmark, metric), cell in table.cells.items():
        line = lines.get((setup, benchmark))
        if metric == EXACT_MATCH:
            there = bracket(*(float(line[key]) / 100.0 for key in ("mean", "ci_low", "ci_high"))
                            ) if line else NOTHING
            rows.append([setup_title(setup), benchmark_title(benchmark).title, cell.text, there,
                         f"{cell.interval.seeds} / {line['seeds'] if line else NOTHING}"])
    return ("# Compared with the published records\n\nExact match, percent.\n\n"
            + markdown_table(["setup", "benchmark", f"`{experiment.name}`", "published",
                              "seeds here / there"], rows, (2, 3, 4)))

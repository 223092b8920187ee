"""A comparison's tables and files; no torch needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..records.files import write_whole
from ..setups import SETUPS
from .arm_figures import draw_diagnostics, draw_forest, draw_pass_at_k
from .arm_notes import means_of, notes, unlike_rates, verdict_notes
from .arms import BUDGET, Arm, beyond_budget, metrics_of, score_metrics, spent, used_by, verdict
from .comparisons import difference_text
from .hyperparameters import own_settings_of
from .loading import Experiment, benchmark_title, setup_title
from .scores import EXACT_MATCH, EXACT_MATCH_LENIENT, score
from .statistics import SIGNIFICANT, Interval, mean_interval
from .style import as_bytes, style
from .text import (
    NOTHING,
    bracket,
    bullets,
    csv_text,
    markdown_table,
    number,
    percent,
    plain_table,
    tex_table,
)

COLUMNS = ("setup", "benchmark", "metric", "mean", "ci_low", "ci_high", "difference", "diff_low",
           "diff_high", "p_value", "p_holm", "verdict", "seeds", "problems", "rate_factor", *BUDGET,
           "updates_beside", "generated_tokens", "minutes")
USED = ("arm", "learning rates ×", "rollouts", "optimizer updates", "demonstration tokens",
        "generated tokens", "minutes")


def report_arms(folder: Path, experiment: Experiment, arms: Sequence[Arm], baseline: str,
                tuned: Sequence, alone: Mapping[str, Experiment]) -> tuple[list[Path], str]:
    """Writes comparison.csv, .md and .tex, tuning.csv, transfer.csv and the figures.

    Args:
        tuned: what each tuning run scored (`compare.Tuned`).
        alone: by benchmark, the arms trained on it alone.

    Returns:
        The files, and for the terminal the scores and what each arm used.
    """
    texts = arms_texts(experiment, arms, baseline, tuned, alone)
    files = [write_whole(folder / name, text) for name, text in texts.items()]
    with style():
        figures = {"forest": draw_forest(experiment, arms, baseline, marked_titles(arms, baseline)),
                   "pass_at_k": draw_pass_at_k(experiment, baseline),
                   **{f"diagnostics_{method}": draw_diagnostics(experiment, method)
                      for method in dict.fromkeys(SETUPS[arm.setup].method for arm in arms)}}
        files += [write_whole(folder / "figures" / f"{name}.{kind}", as_bytes(figure, kind))
                  for name, figure in figures.items() if figure is not None
                  for kind in ("svg", "png")]
    metrics = metrics_of(experiment)
    return files, "\n\n".join((
        plain_table(header(experiment, metrics), score_rows(experiment, arms, metrics)),
        plain_table(USED, used_rows(arms, baseline))))


def arms_texts(experiment: Experiment, arms: Sequence[Arm], baseline: str, tuned: Sequence,
               alone: Mapping[str, Experiment]) -> dict[str, str]:
    """{file name: text} of all tables; arguments as for `report_arms`."""
    rows = transfer_rows(alone)
    texts = {"comparison.csv": arms_csv(arms),
             "comparison.tex": arms_tex(experiment, arms, baseline),
             "comparison.md": arms_markdown(experiment, arms, baseline, tuned, rows)}
    if tuned:
        texts["tuning.csv"] = csv_text(
            ("setup", "rate_factor", "seed", "validation", "sampled", "chosen"),
            [(t.setup, f"{t.factor:g}", t.seed, percent(t.validation), percent(t.sampled),
              int(t.factor == chosen(arms, t.setup))) for t in tuned])
    if rows:
        texts["transfer.csv"] = csv_text(
            ("setup", "trained_on", "tested_on", "mean", "ci_low", "ci_high", "seeds", "problems"),
            [(setup, trained, tested, percent(i.mean), percent(i.low), percent(i.high), i.seeds,
              i.problems) for (setup, trained, tested), i in rows.items()])
    return texts


def chosen(arms: Sequence[Arm], setup: str) -> float | None:
    return next((arm.rate_factor for arm in arms if arm.setup == setup), None)


def arms_csv(arms: Sequence[Arm]) -> str:
    """Long form: a line per arm, benchmark, and metric; percent and percentage points."""
    rows, judged = [], (EXACT_MATCH,) if unlike_rates(arms) else None
    for arm in arms:
        for key, interval in arm.scores.items():
            difference, p = arm.differences.get(key, (None, None))
            apart = ("",) * 6 if difference is None else (
                percent(difference.mean), percent(difference.low), percent(difference.high),
                number(difference.p_value, 6), number(p, 6),
                verdict([(difference, p)]) if judged is None or key[1] in judged else "")
            rows.append((arm.setup, *key, percent(interval.mean), percent(interval.low),
                         percent(interval.high), *apart, interval.seeds, interval.problems,
                         f"{arm.rate_factor:g}", *(number(getattr(arm.used, name), 1)
                                                   for name in COLUMNS[15:])))
    return csv_text(COLUMNS, rows)


def name_of(metric: str) -> str:
    return {EXACT_MATCH: "exact match", EXACT_MATCH_LENIENT: "exact match, lenient"}.get(
        metric, metric.replace("pass", "Pass"))


def header(experiment: Experiment, metrics: Sequence[str]) -> list[str]:
    """The columns of a wide table."""
    return ["arm", *(f"{benchmark_title(benchmark).title}: {name_of(metric)}"
                     for benchmark in experiment.benchmarks for metric in metrics)]


def marked_titles(arms: Sequence[Arm], baseline: str) -> dict[str, str]:
    """{setup: title}, with a dagger if it used more than the baseline's budget."""
    beyond = beyond_budget(arms, baseline)
    return {arm.setup: setup_title(arm.setup) + (" †" if arm.setup in beyond else "")
            for arm in arms}


def score_rows(experiment: Experiment, arms: Sequence[Arm],
               metrics: Sequence[str]) -> list[list[str]]:
    """A row per arm: `mean [low, high]` in percent."""
    return [[setup_title(arm.setup), *(
        bracket(i.mean, i.low, i.high) if (i := arm.scores.get((benchmark, metric))) else NOTHING
        for benchmark in experiment.benchmarks for metric in metrics)] for arm in arms]


def difference_rows(experiment: Experiment, arms: Sequence[Arm], baseline: str) -> list[list[str]]:
    """A row per arm that has a difference: `+mean [low, high] (Holm's p)`, and the verdict by exact
    match."""
    titles, metrics = marked_titles(arms, baseline), metrics_of(experiment)
    return [[titles[arm.setup], *(
        difference_text(arm.differences.get((benchmark, metric)))
        for benchmark in experiment.benchmarks for metric in metrics),
        arm.verdict(EXACT_MATCH) or NOTHING] for arm in arms if arm.differences]


def who_beats(experiment: Experiment, arms: Sequence[Arm], baseline: str) -> str:
    """A list per metric of the arms that beat the baseline, and of those that do not. Where rates
    differ between arms, only for the metric that chose them."""
    title, titles = setup_title(baseline), marked_titles(arms, baseline)
    words = {"better": f"Better than {title} on a benchmark and worse on none",
             "better and worse": f"Better than {title} on one and worse on another",
             "worse": f"Worse than {title} on a benchmark and better on none",
             "no difference": f"Not distinguishable from {title}"}
    parts = []
    for metric in metrics_of(experiment):
        if metric != EXACT_MATCH and unlike_rates(arms):
            continue
        names: dict[str, list[str]] = {}
        for arm in arms:
            names.setdefault(arm.verdict(metric), []).append(titles[arm.setup])
        parts.append(f"By {name_of(metric)}:\n\n" + bullets(
            f"{text}: {'; '.join(names.get(key, ['none'])).removesuffix('.')}."
            for key, text in words.items()))
    return "\n".join([*parts, *(f"{note}\n" for note in verdict_notes(
        arms, baseline, sampled=metrics_of(experiment) != (EXACT_MATCH,)))])


def used_rows(arms: Sequence[Arm], baseline: str) -> list[list[str]]:
    """A row per arm: what it used, each part of the budget also relative to the baseline."""
    first = used_by(arms, baseline)

    def cell(arm: Arm, name: str) -> str:
        beside, whole = arm.used.updates_beside, spent(first, name) if first else 0.0
        return (f"{getattr(arm.used, name):,.0f}"
                + (f" + {beside:,.0f}" if name == "updates" and beside else "")
                + (f" ({spent(arm.used, name) / whole:.2f})" if whole else ""))

    return [[setup_title(arm.setup), f"{arm.rate_factor:g}", *(cell(arm, name) for name in BUDGET),
             f"{arm.used.generated_tokens:,.0f}", number(arm.used.minutes, 1)]
            for arm in arms if SETUPS[arm.setup].stages]


def transfer_rows(alone: Mapping[str, Experiment]) -> dict[tuple[str, str, str], Interval]:
    """{(setup, trained on, tested on): greedy exact match}."""
    rows = {}
    for trained, experiment in alone.items():
        for setup in experiment.setups:
            for tested in experiment.benchmarks:
                found = score(experiment, setup, tested, EXACT_MATCH)
                if found is not None:
                    rows[setup, trained, tested] = mean_interval(found.values)
    return rows


def arms_markdown(experiment: Experiment, arms: Sequence[Arm], baseline: str, tuned: Sequence,
                  transfer: Mapping[tuple[str, str, str], Interval]) -> str:
    """All tables with their notes."""
    shown, title = score_metrics(experiment), setup_title(baseline)
    wide, head = header(experiment, shown), header(experiment, metrics_of(experiment))
    parts = [f"# Comparison, experiment `{experiment.name}`\n",
             "Test problems, last checkpoint, strict unless marked lenient; percent, mean [95 % "
             "interval].\n",
             markdown_table(wide, score_rows(experiment, arms, shown), range(1, len(wide))),
             f"## Difference to {title}\n",
             "Percentage points, paired over problems [95 % interval] (p after Holm's correction "
             f"over all arms and benchmarks of one metric); bold below {SIGNIFICANT}. The verdict "
             "is by exact match. Each metric is corrected separately.\n",
             markdown_table([*head, "verdict"], difference_rows(experiment, arms, baseline),
                            range(1, len(head))), who_beats(experiment, arms, baseline),
             "## What each arm used\n",
             f"Per run, mean over seeds; in brackets relative to {title}. An arm whose numbers are "
             "not 1.00 has another budget. Updates after a + are of other trained weights than "
             "the policy's.\n",
             markdown_table(USED, used_rows(arms, baseline), range(1, len(USED))),
             *settings_part(experiment, baseline)]
    if tuned:
        parts += ["## Learning rates\n",
                  "On validation problems, mean over seeds: greedy exact match, which chose the "
                  "bold factor / share of correct samples in the last probe, for comparison.\n",
                  tuning_table(arms, tuned)]
    if transfer:
        seeds = sorted({interval.seeds for interval in transfer.values()})
        parts += ["## Transfer\n", "Greedy exact match of arms trained on one benchmark alone"
                  + (", with the learning rates chosen on both" if tuned else "") + (
                      "; one seed, so the intervals are over test problems only.\n"
                     if seeds == [1] else f"; {' to '.join(map(str, seeds))} seeds.\n"),
                  transfer_table(transfer, arms)]
    elif len(experiment.benchmarks) > 1:
        parts += ["## Transfer\n", "Not run. `--transfer N` trains every arm on each benchmark "
                  "alone, with the first N seeds.\n"]
    return "\n".join([*parts, bullets(notes(experiment, arms, tuned))])


def tuning_table(arms: Sequence[Arm], tuned: Sequence) -> str:
    """Exact match on validation problems and the share of correct samples in the last probe, by arm
    and factor; the chosen one in bold."""
    factors = sorted({t.factor for t in tuned})
    rows = []
    for arm in arms:
        scores = {factor: means_of(tuned, arm.setup, factor) for factor in factors}
        if any(scores.values()):
            texts = {factor: " / ".join(percent(share, 1) or NOTHING for share in found) or NOTHING
                     for factor, found in scores.items()}
            rows.append([setup_title(arm.setup), *(
                f"**{text}**" if factor == arm.rate_factor else text
                for factor, text in texts.items())])
    return markdown_table(["arm", *(f"× {factor:g}" for factor in factors)], rows,
                          range(1, len(factors) + 1))


def settings_part(experiment: Experiment, baseline: str) -> list[str]:
    """Settings of the loss and of sampling in which arms differ from the baseline, as Markdown.

    Some papers change GRPO in addition to how they combine SFT and RL.
    """
    rows = [[setup_title(setup), ", ".join(own)]
            for setup in experiment.setups if setup != baseline and SETUPS[setup].stages
            if (own := own_settings_of(experiment, setup, baseline))]
    if not rows:
        return []
    return ["## What else differs\n", "Settings in which an arm differs from "
            f"{setup_title(baseline)}, apart from its method's own settings and the learning "
            "rates. These changes to GRPO affect an arm's score too. Arms that are not listed have "
            "none.\n",
            markdown_table(("arm", "settings"), rows)]


def transfer_table(transfer: Mapping[tuple[str, str, str], Interval], arms: Sequence[Arm]) -> str:
    """A row per arm, a column per pair of benchmarks; the untrained base model comes first."""
    pairs = list(dict.fromkeys((trained, tested) for _, trained, tested in transfer))
    untrained = {("base", *pair): arm.scores[pair[1], EXACT_MATCH] for pair in pairs
                 for arm in arms if arm.setup == "base" and (pair[1], EXACT_MATCH) in arm.scores}
    transfer = untrained | dict(transfer)
    head = ["arm", *(f"{benchmark_title(one).title} → {benchmark_title(other).title}"
                     for one, other in pairs)]
    return markdown_table(head, [[setup_title(setup), *(
        bracket(i.mean, i.low, i.high) if (i := transfer.get((setup, *pair))) else NOTHING
        for pair in pairs)] for setup in dict.fromkeys(setup for setup, _, _ in transfer)],
        range(1, len(head)))


def arms_tex(experiment: Experiment, arms: Sequence[Arm], baseline: str) -> str:
    """The scores and the differences for LaTeX with booktabs, a table per benchmark."""
    both, apart = score_metrics(experiment), metrics_of(experiment)
    tables = []
    for caption, metrics, rows in (
            ("Scores, percent, mean [95 % interval]", both, score_rows(experiment, arms, both)),
            ("Difference to " + setup_title(baseline) + ", percentage points, p after Holm's "
             "correction", apart, difference_rows(experiment, arms, baseline))):
        names = [name_of(metric) for metric in metrics]
        for place, benchmark in enumerate(experiment.benchmarks):
            first = 1 + place * len(names)
            tables.append(tex_table(
                ["arm", *names], [[cell.replace("*", "") for cell in (
                    row[0], *row[first:first + len(names)])] for row in rows],
                f"{caption}: {benchmark_title(benchmark).title}."))
    return "\n".join(tables)

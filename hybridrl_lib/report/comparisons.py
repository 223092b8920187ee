"""Differences between setups with Holm's correction, and the gap from training to test problems."""

from dataclasses import dataclass

from ..setups import SETUPS, paper_setups
from .loading import Experiment, benchmark_title, paper_value, setup_title
from .scores import EXACT_MATCH, EXACT_MATCH_LENIENT, paired_family, score
from .statistics import SIGNIFICANT, Difference, gap_interval
from .text import NOTHING, bullets, csv_text, markdown_table, number, p_text, percent, plus, signed

# Lenient too, since training may improve the strict score by the form of the answer alone.
METRICS = {EXACT_MATCH: "greedy exact match, strict",
           EXACT_MATCH_LENIENT: "greedy exact match, lenient", "pass@1": "sampled Pass@1, strict"}
GAP_METRICS = {metric: METRICS[metric] for metric in (EXACT_MATCH, "pass@1")}
DIFFERENCE_COLUMNS = ("benchmark", "metric", "first", "second", "difference", "ci_low", "ci_high",
                      "p_value", "p_holm", "seeds_first", "seeds_second", "problems", "paper")
GAP_COLUMNS = ("setup", "benchmark", "metric", "train", "test", "gap", "ci_low", "ci_high", "seeds",
               "problems_train", "problems_test")


@dataclass(frozen=True)
class Comparison:
    """One line of differences.csv; the paper's difference is in percentage points."""

    benchmark: str
    metric: str
    first: str
    second: str
    difference: Difference
    p_holm: float
    paper: float | None


@dataclass(frozen=True)
class Gap:
    """One line of gap.csv, as shares."""

    setup: str
    benchmark: str
    metric: str
    train: float
    test: float
    difference: Difference
    problems: tuple[int, int]


def difference_text(both: tuple[Difference, float] | None) -> str:
    """`+mean [low, high] (p Holm's)` in percentage points, bold if significant."""
    if both is None:
        return NOTHING
    difference, p = both
    text = signed(difference.mean, difference.low, difference.high)
    return f"{f'**{text}**' if p < SIGNIFICANT else text} (p {p_text(p)})"


def pairs(experiment: Experiment) -> list[tuple[str, str]]:
    """The comparisons that the paper's claims need, among setups that ran.

    Each trained setup against the base model; RL, and RL after SFT, against SFT; RL after SFT
    against RL; each setup with entropy regularization against the same one without; and any other
    setup against RL after SFT, the baseline it has to beat.
    """
    paper = [name for name in paper_setups() if name != "base"]
    others = [name for name in experiment.setups if name not in (*paper, "base")]
    wanted = [(name, "base") for name in (*paper, *others)]
    wanted += [("rl", "sft"), ("sft_then_rl", "sft"), ("sft_then_rl", "rl")]
    wanted += [(name, name.removesuffix("_entropy")) for name in paper if SETUPS[name].entropy]
    wanted += [(name, "sft_then_rl") for name in others]
    return [pair for pair in wanted if set(pair) <= set(experiment.setups)]


def make_comparisons(experiment: Experiment) -> list[Comparison]:
    """All pairs by metric and benchmark; a Holm family is one metric over all benchmarks."""
    comparisons = []
    for metric in METRICS:
        family = paired_family(
            ((benchmark, first, second), *(score(experiment, setup, benchmark, metric)
                                           for setup in (first, second)))
            for benchmark in experiment.benchmarks for first, second in pairs(experiment))
        for (benchmark, first, second), (difference, p_holm) in family.items():
            paper = _paper_difference(first, second, benchmark, metric)
            comparisons.append(
                Comparison(benchmark, metric, first, second, difference, p_holm, paper))
    return comparisons


def _paper_difference(first: str, second: str, benchmark: str, metric: str) -> float | None:
    one, other = paper_value(first, benchmark), paper_value(second, benchmark)
    if metric != EXACT_MATCH or one is None or other is None:
        return None
    return one - other


def comparisons_csv(comparisons: list[Comparison]) -> str:
    """Long form, percentage points."""
    return csv_text(DIFFERENCE_COLUMNS, [
        (c.benchmark, c.metric, c.first, c.second, percent(c.difference.mean),
         percent(c.difference.low), percent(c.difference.high), number(c.difference.p_value, 5),
         number(c.p_holm, 5), *c.difference.seeds, c.difference.problems, number(c.paper, 1))
        for c in comparisons])


def comparisons_markdown(experiment: Experiment, comparisons: list[Comparison]) -> str:
    """A table per metric, the benchmarks side by side."""
    parts = [f"# Differences between setups, experiment `{experiment.name}`\n",
             "First minus second in percentage points [95 % interval]; p after Holm's correction, "
             f"bold below {SIGNIFICANT}.\n"]
    for metric, title in METRICS.items():
        chosen = [c for c in comparisons if c.metric == metric]
        if chosen:
            parts += [f"## {title[0].upper()}{title[1:]}\n", _comparison_table(experiment, chosen)]
    families = [sum(c.metric == metric for c in comparisons) for metric in METRICS]
    parts.append(bullets((
        "Problems are paired, since both setups answer the same ones. Seeds are not: equal seeds "
        "of two setups count as independent.",
        "Intervals cover problems, and the seeds of each setup that has more than one. They are "
        "not corrected for the number of comparisons.",
        "A Holm family is all comparisons of one metric over all benchmarks: "
        + ", ".join(str(count) for count in families if count)
        + ". The benchmarks are never pooled.",
        "The paper's differences come from single numbers without intervals.")))
    single = [setup_title(name) for name in experiment.setups
              if name != "base" and len(experiment.of(name)) == 1]
    if single:
        parts.append(bullets([f"One seed only ({', '.join(single)}): their differences do not "
                              "include the variance between seeds."]))
    return "\n".join(parts)


def _comparison_table(experiment: Experiment, comparisons: list[Comparison]) -> str:
    with_paper = any(c.paper is not None for c in comparisons)
    header = ["comparison"]
    for benchmark in experiment.benchmarks:
        header += [benchmark_title(benchmark).title, "p (Holm)"] + ["paper"] * with_paper
    by_pair: dict[tuple[str, str], dict[str, Comparison]] = {}
    for c in comparisons:
        by_pair.setdefault((c.first, c.second), {})[c.benchmark] = c
    rows = []
    for (first, second), found in by_pair.items():
        row = [f"{setup_title(first)} − {setup_title(second)}"]
        for benchmark in experiment.benchmarks:
            c = found.get(benchmark)
            if c is None:
                row += [NOTHING, NOTHING] + [NOTHING] * with_paper
                continue
            text = signed(c.difference.mean, c.difference.low, c.difference.high)
            row += [f"**{text}**" if c.p_holm < SIGNIFICANT else text, p_text(c.p_holm)]
            row += [plus(c.paper)] * with_paper
        rows.append(row)
    return markdown_table(header, rows, range(1, len(header)))


def make_gaps(experiment: Experiment) -> list[Gap]:
    """Training minus test problems for each setup, benchmark, and metric scored on both."""
    gaps = []
    for setup in experiment.setups:
        for benchmark in experiment.benchmarks:
            for metric in GAP_METRICS:
                train = score(experiment, setup, benchmark, metric + "_train")
                test = score(experiment, setup, benchmark, metric)
                seeds = sorted(set(train.seeds) & set(test.seeds)) if train and test else []
                if seeds:
                    difference = gap_interval(train.for_seeds(seeds), test.for_seeds(seeds))
                    gaps.append(Gap(setup, benchmark, metric, float(train.for_seeds(seeds).mean()),
                                    float(test.for_seeds(seeds).mean()), difference,
                                    (len(train.ids), len(test.ids))))
    return gaps


def gaps_csv(gaps: list[Gap]) -> str:
    """Long form, percent and percentage points."""
    return csv_text(GAP_COLUMNS, [
        (g.setup, g.benchmark, g.metric, percent(g.train), percent(g.test),
         percent(g.difference.mean), percent(g.difference.low), percent(g.difference.high),
         g.difference.seeds[0], *g.problems) for g in gaps])


def gaps_markdown(experiment: Experiment, gaps: list[Gap]) -> str:
    """A table per metric."""
    parts = [f"# Training against test problems, experiment `{experiment.name}`\n",
             "Training minus test in percentage points [95 % interval]. The base model saw "
             "neither, so its row shows which part is harder.\n"]
    for metric, title in GAP_METRICS.items():
        chosen = {(g.setup, g.benchmark): g for g in gaps if g.metric == metric}
        if not chosen:
            continue
        header = ["setup"]
        for benchmark in experiment.benchmarks:
            header += [f"{benchmark_title(benchmark).title}: training", "test", "gap"]
        rows = []
        for setup in experiment.setups:
            row = [setup_title(setup)]
            for benchmark in experiment.benchmarks:
                gap = chosen.get((setup, benchmark))
                row += [NOTHING] * 3 if gap is None else [
                    percent(gap.train, 1), percent(gap.test, 1),
                    signed(gap.difference.mean, gap.difference.low, gap.difference.high)]
            rows.append(row)
        parts += [f"## {title[0].upper()}{title[1:]}\n",
                  markdown_table(header, rows, range(1, len(header)))]
    parts.append(bullets(("The two parts have different problems and the same seeds. With one "
                          "seed, intervals cover problems only.",)))
    return "\n".join(parts)

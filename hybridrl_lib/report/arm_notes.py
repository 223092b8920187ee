"""Notes below a comparison: on its arms, budgets, and learning rates."""

import math
from collections import Counter
from collections.abc import Sequence

from ..setups import SETUPS
from .arms import SAME, Arm, below_budget, beyond_budget
from .hyperparameters import changes_of
from .loading import Experiment, Run, setup_title
from .table2 import interval_notes

STAGES = {"sft": "SFT", "rl": "RL"}


def verdict_notes(arms: Sequence[Arm], baseline: str, sampled: bool) -> list[str]:
    """Causes of a verdict other than the method.

    Args:
        sampled: whether there are differences in Pass@k.
    """
    title, found = setup_title(baseline), []
    if beyond_budget(arms, baseline):
        found.append(f"† used more than {title} of some part of the budget (more than "
                     f"{100 * (SAME - 1):.0f} % more), which the next table shows. This may "
                     "explain what it gains.")
    if below := below_budget(arms, baseline):
        found.append(f"{titles(arm for arm in arms if arm.setup in below)}: fewer rollouts or "
                     f"optimizer updates than {title} (see the next table). This may explain what "
                     "they lose.")
    if sampled and unlike_rates(arms):
        found.append("There is no verdict by Pass@k. The learning rates were chosen by exact "
                     "match and differ between arms, so the differences in Pass@k above come from "
                     "the rates as much as from the methods. `--grid 1` compares all arms at the "
                     "preset's rates.")
    if any(interval.seeds == 1 for arm in arms if SETUPS[arm.setup].stages
           for interval in arm.scores.values()):
        found.append("Where an arm or the baseline has one seed, the verdict holds for that run "
                     "only; another seed may reverse it.")
    return found


def unlike_rates(arms: Sequence[Arm]) -> bool:
    """Whether arms were trained with different factors of their learning rates."""
    return len({arm.rate_factor for arm in arms if SETUPS[arm.setup].stages}) > 1


def notes(experiment: Experiment, arms: Sequence[Arm], tuned: Sequence) -> list[str]:
    """How the numbers were made and what they do not include.

    Args:
        tuned: what each tuning run scored (`compare.Tuned`).
    """
    found = [*interval_notes(experiment),
             "Differences treat the seeds of the two arms as independent."]
    if changes := changes_of(experiment.runs, tuned=bool(tuned)):
        found.insert(0, f"Every run has {', '.join(changes)}.")
    found += unlike_their_names(experiment)
    found += tuning_notes(experiment, arms, tuned)
    found += beside_notes(experiment, arms)
    found += [note for note in experiment.notes if note.startswith("Left out")]
    if any(run.manifest.get("resumed_from") for run in experiment.runs):
        found.append("Some runs were interrupted and resumed; their minutes exclude lost work.")
    return found + ["Wall time includes evaluation and depends on other load on the machine."]


def titles(arms) -> str:
    """The titles of some arms."""
    return "; ".join(setup_title(arm.setup) for arm in arms)


def beside_notes(experiment: Experiment, arms: Sequence[Arm]) -> list[str]:
    """Which cost outside the policy is counted; older records lack some of it."""
    found = []
    for method, counted, missing in (
            ("pear", "the cost of the model that wrote their demonstrations is included: its SFT, "
             "if any, and the answers it sampled",
             "of the model that wrote their demonstrations, these records count only the tokens"),
            ("bridge", "updates after the + are those of the adapter and of the copy that its gain "
             "is measured against",
             "the updates of the adapter and of the copy that its gain is measured against are not "
             "in these records")):
        mine = [arm for arm in arms if SETUPS[arm.setup].method == method]
        whole = all(any("updates/beside" in line for line in run.metrics)
                    for arm in mine for run in experiment.of(arm.setup))
        if mine:
            found.append(f"{titles(mine)}: {counted if whole else missing}.")
    return found


# Arms whose name promises more than they did ------------------------------------------------------


def unlike_their_names(experiment: Experiment) -> list[str]:
    """Notes on stages that never began, and on arms with identical answers."""
    found = []
    for setup in experiment.setups:
        begun = {line.get("stage") for run in experiment.of(setup) for line in run.metrics}
        if never := [STAGES.get(stage, stage) for stage in SETUPS[setup].stages
                     if stage not in begun]:
            found.append(f"{setup_title(setup)}: no run reached the {' or '.join(never)} stage.")
    alike: dict[tuple, list[str]] = {}
    for setup in experiment.setups:
        if verdicts := verdicts_of(experiment.of(setup)):
            alike.setdefault(verdicts, []).append(setup_title(setup))
    return found + [f"{' and '.join(names)} solved the same problems with every seed. They still "
                    "count as separate arms." for names in alike.values() if len(names) > 1]


def verdicts_of(runs: Sequence[Run]) -> tuple:
    """(seed, benchmark, correct or not, correct samples) of the last weights on test problems;
    empty if all answers are correct or none is."""
    found = tuple(sorted((run.seed, benchmark, tuple(a.strict.tolist()), tuple(a.right.tolist()))
                         for run in runs for (checkpoint, part, benchmark), a in run.answers.items()
                         if (checkpoint, part) == ("last", "test")))
    return found if len({right for _, _, strict, _ in found for right in strict}) > 1 else ()


# Learning rates -----------------------------------------------------------------------------------


def tuning_notes(experiment: Experiment, arms: Sequence[Arm], tuned: Sequence) -> list[str]:
    """How learning rates were chosen, and where the choice was close."""
    if not tuned:
        return ["Nothing was tuned: the learning rates are those of the settings, times one factor "
                "for all arms."]
    seeds = " and ".join(map(str, sorted({t.seed for t in tuned})))
    problems = sorted({count for run in experiment.runs if (count := validation_problems(run))})
    return ["Learning rates: one factor multiplies all rates of a setup, and every arm tries the "
            "same factors. The factor with the best mean exact match on validation problems was "
            f"chosen, with the separate seeds {seeds}. This choice is noisy with "
            + (f"{problems[0]} validation problems" if problems else "few validation problems")
            + "; Pass@k might favor another rate.",
            *ties(arms, tuned), *grid_ends(arms, tuned), *by_samples(arms, tuned)]


def ties(arms: Sequence[Arm], tuned: Sequence) -> list[str]:
    """A note on the arms for which two factors were equally good."""
    found = []
    for arm in arms:
        scores = {factor: round(means[0], 9) for factor in sorted({t.factor for t in tuned})
                  if (means := means_of(tuned, arm.setup, factor))}
        best = [factor for factor, score in scores.items() if score == max(scores.values())]
        if len(best) > 1:
            found.append(f"{setup_title(arm.setup)} (× {' and '.join(f'{one:g}' for one in best)})")
    return [f"Ties between factors; the one nearest to 1 was taken: {'; '.join(found)}."] \
        if found else []


def by_samples(arms: Sequence[Arm], tuned: Sequence) -> list[str]:
    """A note on the arms that would have another factor if correct samples had chosen it."""
    factors, best = sorted({t.factor for t in tuned}), {}  # by setup
    for arm in arms:
        scores = {factor: round(means[1], 9) for factor in factors
                  if len(means := means_of(tuned, arm.setup, factor)) == 2}
        if scores:
            best[arm.setup] = max(scores, key=lambda factor, own=arm.rate_factor, scores=scores: (
                scores[factor], factor == own, -abs(math.log(factor))))
    other = sum(best.get(arm.setup, arm.rate_factor) != arm.rate_factor for arm in arms)
    if not other:
        return []
    return ["By the share of correct samples in the last probe, "
            f"{other} of {len(best)} arms would have another factor ("
            + ", ".join(f"× {factor:g}: {count}"
                        for factor, count in sorted(Counter(best.values()).items())) + ")."]


def means_of(tuned: Sequence, setup: str, factor: float) -> list[float]:
    """Means over the tuning runs of an arm at a factor: exact match and, if all were probed,
    correct samples; empty without such runs."""
    mine = [t for t in tuned if (t.setup, t.factor) == (setup, factor)]
    columns = [[t.validation for t in mine], [t.sampled for t in mine]]
    return [sum(column) / len(column) for column in columns if column and None not in column]


def grid_ends(arms: Sequence[Arm], tuned: Sequence) -> list[str]:
    """Notes on arms that took the first or the last factor; a better one may lie beyond."""
    factors = sorted({t.factor for t in tuned})
    trained = [arm for arm in arms if SETUPS[arm.setup].stages]
    return [f"{len(there)} of {len(trained)} arms took the {which} factor, {factor:g}, at the end "
            "of the grid." for which, factor in (("smallest", factors[0]), ("largest", factors[-1]))
            if (there := [arm for arm in trained if arm.rate_factor == factor])]


def validation_problems(run: Run) -> int:
    """How many validation problems a run had."""
    data = run.manifest.get("data") or {}
    return sum(((entry or {}).get("problems") or {}).get("validation", 0)
               for entry in data.values())

"""What to know before reading a comparison: sentences on its arms, budgets and learning rates."""

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
    """What may lie behind a verdict but the method.

    Args:
        sampled: whether there are differences in Pass@k.
    """
    title, found = setup_title(baseline), []
    if beyond_budget(arms, baseline):
        found.append(f"† used more than {title} of some part of the budget (more than "
                     f"{100 * (SAME - 1):.0f} % more): the next table says of which. What it wins "
                     "may be won by that.")
    if below := below_budget(arms, baseline):
        found.append(f"Fewer rollouts or optimizer updates than {title} (also in the next table) "
                     f"had {titles(arm for arm in arms if arm.setup in below)}: what they lose may "
                     "be lost by that.")
    if sampled and unlike_rates(arms):
        found.append("There is no verdict by Pass@k: arms have different factors of the learning "
                     "rates, chosen by exact match, and Pass@k may ask for others. Its differences "
                     "above are of the rates as much as of the methods; `--grid 1` compares all "
                     "arms at the preset's.")
    if any(interval.seeds == 1 for arm in arms if SETUPS[arm.setup].stages
           for interval in arm.scores.values()):
        found.append("Where an arm or the baseline has one seed, the verdict is of that run alone, "
                     "over test problems: another seed may turn it round.")
    return found


def unlike_rates(arms: Sequence[Arm]) -> bool:
    """Whether arms were trained with different factors of their learning rates."""
    return len({arm.rate_factor for arm in arms if SETUPS[arm.setup].stages}) > 1


def notes(experiment: Experiment, arms: Sequence[Arm], tuned: Sequence) -> list[str]:
    """How the numbers were made and what they leave out.

    Args:
        tuned: what each tuning run scored (`compare.Tuned`).
    """
    found = [*interval_notes(experiment),
             "Differences count the seeds of the two arms as independent."]
    if changes := changes_of(experiment.runs, tuned=bool(tuned)):
        found.insert(0, f"Every run has {', '.join(changes)}.")
    found += unlike_their_names(experiment)
    found += tuning_notes(experiment, arms, tuned)
    found += beside_notes(experiment, arms)
    found += [note for note in experiment.notes if note.startswith("Left out")]
    if any(run.manifest.get("resumed_from") for run in experiment.runs):
        found.append("Some runs were cut off and went on: their minutes leave out what was lost.")
    return found + ["Wall time holds evaluation, and depends on what else the machine did."]


def titles(arms) -> str:
    """The titles of some arms in a row."""
    return "; ".join(setup_title(arm.setup) for arm in arms)


def beside_notes(experiment: Experiment, arms: Sequence[Arm]) -> list[str]:
    """What is counted beside the policy, or is not, as in records of older versions."""
    found = []
    for method, counted, missing in (
            ("pear", "what the model that wrote their demonstrations took in the run is counted: "
             "its SFT, if it had one, and the answers it sampled",
             "what the model that wrote their demonstrations took is not in these records, but for "
             "its tokens"),
            ("bridge", "updates after the + are those of the adapter, and of the copy that the "
             "gain compares with",
             "the updates of the adapter, and of the copy that the gain compares with, are not in "
             "these records")):
        mine = [arm for arm in arms if SETUPS[arm.setup].method == method]
        whole = all(any("updates/beside" in line for line in run.metrics)
                    for arm in mine for run in experiment.of(arm.setup))
        if mine:
            found.append(f"{titles(mine)}: {counted if whole else missing}.")
    return found


# Arms that were not what they are called ----------------------------------------------------------


def unlike_their_names(experiment: Experiment) -> list[str]:
    """Sentences on stages that never began, and on arms that cannot be told from another."""
    found = []
    for setup in experiment.setups:
        begun = {line.get("stage") for run in experiment.of(setup) for line in run.metrics}
        if never := [STAGES.get(stage, stage) for stage in SETUPS[setup].stages
                     if stage not in begun]:
            found.append(f"{setup_title(setup)}: no run had a stage of {' or '.join(never)}.")
    alike: dict[tuple, list[str]] = {}
    for setup in experiment.setups:
        if verdicts := verdicts_of(experiment.of(setup)):
            alike.setdefault(verdicts, []).append(setup_title(setup))
    return found + [f"{' and '.join(names)} were right on the same problems with every seed: they "
                    "cannot be told apart here, and count as several arms all the same."
                    for names in alike.values() if len(names) > 1]


def verdicts_of(runs: Sequence[Run]) -> tuple:
    """(seed, benchmark, right or not, right samples) of all last weights on test problems; empty
    where that says nothing, since all answers are right or none is."""
    found = tuple(sorted((run.seed, benchmark, tuple(a.strict.tolist()), tuple(a.right.tolist()))
                         for run in runs for (checkpoint, part, benchmark), a in run.answers.items()
                         if (checkpoint, part) == ("last", "test")))
    return found if len({right for _, _, strict, _ in found for right in strict}) > 1 else ()


# Learning rates -----------------------------------------------------------------------------------


def tuning_notes(experiment: Experiment, arms: Sequence[Arm], tuned: Sequence) -> list[str]:
    """How learning rates were chosen, and where that choice was not clear."""
    if not tuned:
        return ["Nothing was tuned for this comparison: learning rates are those of the settings, "
                "times one factor for all arms."]
    seeds = " and ".join(map(str, sorted({t.seed for t in tuned})))
    problems = sorted({count for run in experiment.runs if (count := validation_problems(run))})
    return ["Learning rates: all of a setup times one factor, the same factors for every arm; the "
            f"best mean of exact match on the validation problems with the seeds {seeds}, which "
            "are no test seeds. That choice is noisy with "
            + (f"{problems[0]} validation problems" if problems else "few validation problems")
            + ", and it is for greedy exact match: another rate may be better for Pass@k.",
            *ties(arms, tuned), *grid_ends(arms, tuned), *by_samples(arms, tuned)]


def ties(arms: Sequence[Arm], tuned: Sequence) -> list[str]:
    """A sentence on the arms for which two factors were equally good."""
    found = []
    for arm in arms:
        scores = {factor: round(means[0], 9) for factor in sorted({t.factor for t in tuned})
                  if (means := means_of(tuned, arm.setup, factor))}
        best = [factor for factor, score in scores.items() if score == max(scores.values())]
        if len(best) > 1:
            found.append(f"{setup_title(arm.setup)} (× {' and '.join(f'{one:g}' for one in best)})")
    return [f"Equally good factors had {'; '.join(found)}: the one nearest to 1 was taken."] \
        if found else []


def by_samples(arms: Sequence[Arm], tuned: Sequence) -> list[str]:
    """A sentence on the arms that would have another factor, had right samples chosen it."""
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
    return ["By the share of right samples in the last probe "
            f"{other} of {len(best)} arms would have another factor ("
            + ", ".join(f"× {factor:g}: {count}"
                        for factor, count in sorted(Counter(best.values()).items()))
            + ")."]


def means_of(tuned: Sequence, setup: str, factor: float) -> list[float]:
    """Means over the tuning runs of an arm at a factor: exact match and, where all were probed,
    right samples; empty where there is no such run."""
    mine = [t for t in tuned if (t.setup, t.factor) == (setup, factor)]
    columns = [[t.validation for t in mine], [t.sampled for t in mine]]
    return [sum(column) / len(column) for column in columns if column and None not in column]


def grid_ends(arms: Sequence[Arm], tuned: Sequence) -> list[str]:
    """Sentences on arms that took the first or the last factor: a better one may lie beyond."""
    factors = sorted({t.factor for t in tuned})
    trained = [arm for arm in arms if SETUPS[arm.setup].stages]
    return [f"{len(there)} of {len(trained)} arms took the {which} factor, {factor:g}: beyond it "
            "nothing was tried."
            for which, factor in (("smallest", factors[0]), ("largest", factors[-1]))
            if (there := [arm for arm in trained if arm.rate_factor == factor])]


def validation_problems(run: Run) -> int:
    """How many validation problems a run had."""
    data = run.manifest.get("data") or {}
    return sum(((entry or {}).get("problems") or {}).get("validation", 0)
               for entry in data.values())

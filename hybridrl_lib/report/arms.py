"""An arm of a comparison: its scores, what it used, its differences to the baseline."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .loading import Experiment, Run
from .scores import EXACT_MATCH, EXACT_MATCH_LENIENT, paired_family, pass_ks, score
from .statistics import SIGNIFICANT, Difference, Interval, mean_interval

BUDGET = ("rollouts", "updates", "demonstration_tokens")  # what an equal budget is equal in
SAME = 1.05  # budgets up to this ratio count as equal


@dataclass(frozen=True)
class Used:
    """What a run of an arm used, the mean over its seeds.

    Attributes:
        rollouts: answers sampled to learn from, in groups or not, by the policy or by a model that
            writes demonstrations.
        updates: optimizer updates of the policy.
        updates_beside: updates of other weights: an adapter, a copy, the model that writes the
            demonstrations.
        demonstration_tokens: tokens of demonstrations in updates, counted in each epoch.
        generated_tokens: tokens sampled in training, by the policy or a model that writes
            demonstrations, without probes and evaluation.
        minutes: wall time, including evaluation.
    """

    rollouts: float
    updates: float
    updates_beside: float
    demonstration_tokens: float
    generated_tokens: float
    minutes: float


@dataclass(frozen=True)
class Arm:
    """One arm: its scores and differences by (benchmark, metric), as shares.

    A difference is the arm minus the baseline, with Holm's p-value. The baseline and the base model
    have none.
    """

    setup: str
    rate_factor: float
    used: Used
    scores: dict[tuple[str, str], Interval]
    differences: dict[tuple[str, str], tuple[Difference, float]]

    def verdict(self, metric: str) -> str:
        """The verdict by one metric; empty if there is no difference."""
        found = [both for (_, own), both in self.differences.items() if own == metric]
        return verdict(found) if found else ""


def metrics_of(experiment: Experiment) -> tuple[str, ...]:
    """Those measured of greedy exact match, Pass@1, and Pass@8 or the largest smaller k."""
    largest = max((k for k in pass_ks(experiment) if k <= 8), default=1)
    return tuple(metric for metric in dict.fromkeys((EXACT_MATCH, "pass@1", f"pass@{largest}"))
                 if any(score(experiment, setup, benchmark, metric) for setup in experiment.setups
                        for benchmark in experiment.benchmarks))


def score_metrics(experiment: Experiment) -> tuple[str, ...]:
    """The same with lenient exact match, since training may change only the answer's form."""
    return tuple(name for metric in metrics_of(experiment)
                 for name in ((metric, EXACT_MATCH_LENIENT) if metric == EXACT_MATCH
                              else (metric,)))


def make_arms(experiment: Experiment, baseline: str, factors: Mapping[str, float]) -> list[Arm]:
    """Scores every setup; a Holm family is one metric over all arms and benchmarks.

    Args:
        factors: of the learning rates, by setup.
    """
    scores: dict[str, dict[tuple[str, str], Interval]] = {name: {} for name in experiment.setups}
    found: dict[str, dict[tuple[str, str], tuple[Difference, float]]] = {
        name: {} for name in experiment.setups}
    for metric in score_metrics(experiment):
        measured = {(name, benchmark): score(experiment, name, benchmark, metric)
                    for benchmark in experiment.benchmarks for name in experiment.setups}
        for (name, benchmark), mine in measured.items():
            if mine is not None:
                scores[name][benchmark, metric] = mean_interval(mine.values)
        if metric == EXACT_MATCH_LENIENT:
            continue
        for (name, benchmark), both in paired_family(
                (key, mine, measured.get((baseline, key[1]))) for key, mine in measured.items()
                if key[0] not in (baseline, "base")).items():
            found[name][benchmark, metric] = both
    return [Arm(name, factors.get(name, 1.0), used(experiment.of(name)), scores[name], found[name])
            for name in experiment.setups]


def used(runs: Sequence[Run]) -> Used:
    """What the runs of one arm used, from their logs and manifests."""
    def of(run: Run) -> tuple[float, ...]:
        counts = [line["groups/correct_counts"] for line in run.metrics
                  if line.get("groups/correct_counts")]
        tokens = run.manifest.get("tokens") or {}
        beside = sum(line.get("groups/beside", 0) for line in run.metrics)
        return (sum(sum(groups) * (len(groups) - 1) for groups in counts) + beside,
                sum(line.get("updates", 0) for line in run.metrics),
                sum(line.get("updates/beside", 0) for line in run.metrics),
                tokens.get("demonstrations", 0) + tokens.get("behavior_demonstrations", 0),
                tokens.get("rollouts", 0) + tokens.get("behavior", 0),
                (run.manifest.get("seconds/wall") or 0.0) / 60)

    return Used(*(sum(column) / len(runs) for column in zip(*map(of, runs), strict=True)))


def beyond_budget(arms: Sequence[Arm], baseline: str) -> set[str]:
    """The arms that used more of some part of the budget than the baseline."""
    whole = used_by(arms, baseline)
    return set() if whole is None else {
        arm.setup for arm in arms
        if any(spent(arm.used, name) > SAME * spent(whole, name) for name in BUDGET)}


def spent(used: Used, part: str) -> float:
    """A part of the budget; updates include those of other weights."""
    return getattr(used, part) + (used.updates_beside if part == "updates" else 0.0)


def below_budget(arms: Sequence[Arm], baseline: str) -> set[str]:
    """The arms with fewer rollouts or fewer updates of the policy than the baseline."""
    whole = used_by(arms, baseline)
    return set() if whole is None else {
        arm.setup for arm in arms if arm.differences
        if any(SAME * getattr(arm.used, name) < getattr(whole, name)
               for name in ("rollouts", "updates"))}


def used_by(arms: Sequence[Arm], setup: str) -> Used | None:
    """What one of the arms used; None if it is not among them."""
    return next((arm.used for arm in arms if arm.setup == setup), None)


def verdict(differences: Iterable[tuple[Difference, float]]) -> str:
    """Summarizes an arm's differences to the baseline, given with Holm's p-values."""
    signs = {difference.mean > 0 for difference, p in differences if p < SIGNIFICANT}
    return {(): "no difference", (True,): "better", (False,): "worse"}.get(
        tuple(signs), "better and worse")

"""An arm of a comparison: its scores, what it used, its differences to the baseline."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .loading import Experiment, Run
from .scores import EXACT_MATCH, EXACT_MATCH_LENIENT, paired_family, pass_ks, score
from .statistics import SIGNIFICANT, Difference, Interval, mean_interval

BUDGET = ("rollouts", "updates", "demonstration_tokens")  # what an equal budget is equal in
SAME = 1.05  # times the baseline's: within it a part of the budget counts as equal


@dataclass(frozen=True)
class Used:
    """What a run of an arm used, the mean over its seeds.

    Attributes:
        rollouts: answers sampled to learn from, those beside the groups among them, by the policy
            or by a model that wrote demonstrations.
        updates: optimizer updates of the policy.
        updates_beside: those of what is trained beside it: an adapter, a copy, the model that wrote
            the demonstrations.
        demonstration_tokens: tokens of demonstrations in updates, epochs counted.
        generated_tokens: sampled while training, by the policy or a model that wrote
            demonstrations; those of probes and evaluation are not in it.
        minutes: wall time, evaluation included.
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

    A difference is the arm minus the baseline, with Holm's p-value; the baseline and the base model
    have none.
    """

    setup: str
    rate_factor: float
    used: Used
    scores: dict[tuple[str, str], Interval]
    differences: dict[tuple[str, str], tuple[Difference, float]]

    def verdict(self, metric: str) -> str:
        """Of one metric, which is a family of its own; empty where there is no difference."""
        found = [both for (_, own), both in self.differences.items() if own == metric]
        return verdict(found) if found else ""


def metrics_of(experiment: Experiment) -> tuple[str, ...]:
    """Greedy exact match, Pass@1, and Pass@8 or the largest k below that was asked for; without
    those that no run measured."""
    largest = max((k for k in pass_ks(experiment) if k <= 8), default=1)
    return tuple(metric for metric in dict.fromkeys((EXACT_MATCH, "pass@1", f"pass@{largest}"))
                 if any(score(experiment, setup, benchmark, metric) for setup in experiment.setups
                        for benchmark in experiment.benchmarks))


def score_metrics(experiment: Experiment) -> tuple[str, ...]:
    """The same, and lenient exact match: what training adds may be the form of the answer alone."""
    return tuple(name for metric in metrics_of(experiment)
                 for name in ((metric, EXACT_MATCH_LENIENT) if metric == EXACT_MATCH
                              else (metric,)))


def make_arms(experiment: Experiment, baseline: str, factors: Mapping[str, float]) -> list[Arm]:
    """Every setup of an experiment, scored; Holm's family is one metric, all arms and benchmarks.

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
    """What the runs of one arm used, from their step logs and manifests."""
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
    """The arms that used more than the baseline of some part of its budget."""
    whole = used_by(arms, baseline)
    return set() if whole is None else {
        arm.setup for arm in arms
        if any(spent(arm.used, name) > SAME * spent(whole, name) for name in BUDGET)}


def spent(used: Used, part: str) -> float:
    """A part of the budget; the updates with those beside the policy."""
    return getattr(used, part) + (used.updates_beside if part == "updates" else 0.0)


def below_budget(arms: Sequence[Arm], baseline: str) -> set[str]:
    """The arms that used less than the baseline of the answers that it samples, or whose policy had
    fewer updates."""
    whole = used_by(arms, baseline)
    return set() if whole is None else {
        arm.setup for arm in arms if arm.differences
        if any(SAME * getattr(arm.used, name) < getattr(whole, name)
               for name in ("rollouts", "updates"))}


def used_by(arms: Sequence[Arm], setup: str) -> Used | None:
    """What one of the arms used; None where it is not among them."""
    return next((arm.used for arm in arms if arm.setup == setup), None)


def verdict(differences: Iterable[tuple[Difference, float]]) -> str:
    """What differences with their Holm's p say together of an arm against the baseline."""
    signs = {difference.mean > 0 for difference, p in differences if p < SIGNIFICANT}
    return {(): "not told apart", (True,): "better", (False,): "worse"}.get(
        tuple(signs), "better and worse")

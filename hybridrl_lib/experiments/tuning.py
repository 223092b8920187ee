"""Tunes the learning rates of every arm on validation problems."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from ..config.fields import show
from ..config.methods import METHODS
from ..config.presets import load_settings, sections_of
from ..config.settings import Settings
from ..records.run_folder import RunFolder
from ..setups import Setup
from ..system.errors import UserError
from .plan import Plan, given, run_job, work

DEVELOPMENT_SEEDS = (1000, 1001)
# Runs for transfer only have a greedy answer per problem, and tuning runs are only scored on
# validation problems; both are probed at their ends only, unless the method decides by its probes.
GREEDY = ("evaluation.samples=0", "evaluation.train_samples=0", "evaluation.train_limit=0")
UNPROBED = "probe.every=1000000"


@dataclass(frozen=True)
class Tuned:
    """The score of a tuning run's last weights on validation problems.

    Attributes:
        validation: greedy exact match, which chooses the factor.
        sampled: fraction of correct samples in the last probe; None without probes.
    """

    setup: str
    factor: float
    seed: int
    validation: float
    sampled: float | None = None


def rates(plan: Plan, arm: Setup, factor: float) -> tuple[str, ...]:
    """The settings that multiply an arm's learning rates by a factor."""
    if factor == 1 or not arm.stages:
        return ()
    chosen = load_settings(plan.preset, given(arm, plan.settings), setup=arm)
    return tuple(f"{key}={show(rate * factor)}" for key, rate in learning_rates(chosen).items())


def learning_rates(settings: Settings) -> dict[str, float]:
    """{section.key: rate} of all learning rates that are set, including the method's own."""
    found = {f"{section.section}.{field.name}": getattr(section, field.name)
             for section in sections_of(settings) for field in fields(section)
             if field.name.endswith("learning_rate")}
    return {key: rate for key, rate in found.items() if rate is not None}


def tune(plan: Plan, say: Callable[[str], None]) -> tuple[dict[str, float], list[Tuned]]:
    """({arm: its factor}, the score of every tuning run); one factor leaves nothing to tune."""
    if len(plan.grid) == 1:
        return {arm.name: plan.grid[0] for arm in plan.arms}, []
    trained = [arm for arm in plan.arms if arm.stages]
    jobs = {(arm.name, factor, seed): run_job(
                plan, arm, seed, f"{plan.experiment}-tuning-{factor:g}",
                (*given(arm, plan.settings), *rates(plan, arm, factor), *greedy_alone(arm),
                 "data.test_limits=1"))
            for arm in trained for factor in plan.grid for seed in DEVELOPMENT_SEEDS}
    say(f"{len(jobs)} tuning runs: {len(trained)} arms, learning rates times "
        f"{', '.join(f'{factor:g}' for factor in plan.grid)}, seeds "
        f"{' and '.join(map(str, DEVELOPMENT_SEEDS))}, scored on validation problems")
    work(plan, list(jobs.values()), say)
    tuned = [tuned_by(job.record, *key) for key, job in jobs.items()]
    return {arm.name: choose(tuned, arm.name) if arm.stages else 1.0 for arm in plan.arms}, tuned


def greedy_alone(arm: Setup) -> tuple[str, ...]:
    """The settings that leave out sampling that neither training nor the method needs."""
    return GREEDY if METHODS[arm.method].reads_probes else (*GREEDY, UNPROBED)


def tuned_by(record: RunFolder, setup: str, factor: float, seed: int) -> Tuned:
    """The score of a tuning run, from its record.

    Raises:
        UserError: there are no validation problems.
    """
    probe, validation = record.lines("probe.jsonl"), record.lines("validation.jsonl")
    if not validation:
        raise UserError("There are no validation problems to choose learning rates with; change "
                        "data.validation_fraction and data.validation_limits, or use a grid of one "
                        "factor.")
    return Tuned(setup, factor, seed, float(validation[-1]["strict"]),
                 float(probe[-1]["reward"]) if probe else None)


def choose(tuned: Sequence[Tuned], setup: str) -> float:
    """The factor with the best mean; among equals the one nearest to 1, then the smaller."""
    def merit(factor: float) -> tuple[float, float, float]:
        scores = [t.validation for t in tuned if (t.setup, t.factor) == (setup, factor)]
        return round(sum(scores) / len(scores), 9), -abs(math.log(factor)), -factor

    return max({t.factor for t in tuned if t.setup == setup}, key=merit)

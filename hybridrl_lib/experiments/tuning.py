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
# Of runs for transfer one greedy answer is asked for, and tuning runs are judged on validation
# problems alone; both are probed at their ends alone unless the method decides by its probes.
GREEDY = ("evaluation.samples=0", "evaluation.train_samples=0", "evaluation.train_limit=0")
UNPROBED = "probe.every=1000000"


@dataclass(frozen=True)
class Tuned:
    """What one tuning run of an arm scored with its last weights on validation problems.

    Attributes:
        validation: greedy exact match, which chooses the factor.
        sampled: share of right samples in the last probe; None where there was none.
    """

    setup: str
    factor: float
    seed: int
    validation: float
    sampled: float | None = None


# Learning rates -----------------------------------------------------------------------------------


def rates(plan: Plan, arm: Setup, factor: float) -> tuple[str, ...]:
    """The settings that multiply an arm's learning rates."""
    if factor == 1 or not arm.stages:
        return ()
    chosen = load_settings(plan.preset, given(arm, plan.settings), setup=arm)
    return tuple(f"{key}={show(rate * factor)}" for key, rate in learning_rates(chosen).items())


def learning_rates(settings: Settings) -> dict[str, float]:
    """{section.key: rate} of all that are set, a method's own among them."""
    found = {f"{section.section}.{field.name}": getattr(section, field.name)
             for section in sections_of(settings) for field in fields(section)
             if field.name.endswith("learning_rate")}
    return {key: rate for key, rate in found.items() if rate is not None}


def tune(plan: Plan, say: Callable[[str], None]) -> tuple[dict[str, float], list[Tuned]]:
    """({arm: its factor}, every tuning run's score); with one factor there is nothing to choose."""
    if len(plan.grid) == 1:
        return {arm.name: plan.grid[0] for arm in plan.arms}, []
    trained = [arm for arm in plan.arms if arm.stages]
    jobs = {(arm.name, factor, seed): run_job(
                plan, arm, seed, f"{plan.experiment}-tuning-{factor:g}",
                (*given(arm, plan.settings), *rates(plan, arm, factor), *tuning_settings(arm)))
            for arm in trained for factor in plan.grid for seed in DEVELOPMENT_SEEDS}
    say(f"{len(jobs)} tuning runs: {len(trained)} arms, learning rates times "
        f"{', '.join(f'{factor:g}' for factor in plan.grid)}, seeds "
        f"{' and '.join(map(str, DEVELOPMENT_SEEDS))}, judged on validation problems")
    work(plan, list(jobs.values()), say)
    tuned = [tuned_by(job.record, *key) for key, job in jobs.items()]
    return {arm.name: choose(tuned, arm.name) if arm.stages else 1.0 for arm in plan.arms}, tuned


def tuning_settings(arm: Setup) -> tuple[str, ...]:
    """What a tuning run leaves out, and the method does not need."""
    return (*greedy_alone(arm), "data.test_limits=1")


def greedy_alone(arm: Setup) -> tuple[str, ...]:
    """The settings that leave out what is sampled beside training, and the method does not need."""
    return GREEDY if METHODS[arm.method].reads_probes else (*GREEDY, UNPROBED)


def tuned_by(record: RunFolder, setup: str, factor: float, seed: int) -> Tuned:
    """What the record of a tuning run says.

    Raises:
        UserError: there are no validation problems.
    """
    probe = record.lines("probe.jsonl")
    return Tuned(setup, factor, seed, last_validation(record),
                 float(probe[-1]["reward"]) if probe else None)


def last_validation(record: RunFolder) -> float:
    """Exact match of the last weights on the validation problems."""
    lines = record.lines("validation.jsonl")
    if not lines:
        raise UserError("There are no validation problems to choose learning rates with; set "
                        "data.validation_fraction and data.validation_limits so that there are, or "
                        "take a grid of one factor.")
    return float(lines[-1]["strict"])


def choose(tuned: Sequence[Tuned], setup: str) -> float:
    """The factor with the best mean; among equals the one nearest to 1, then the smaller."""
    def merit(factor: float) -> tuple[float, float, float]:
        scores = [t.validation for t in tuned if (t.setup, t.factor) == (setup, factor)]
        return round(sum(scores) / len(scores), 9), -abs(math.log(factor)), -factor

    return max({t.factor for t in tuned if t.setup == setup}, key=merit)

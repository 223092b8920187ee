"""Detects training that goes wrong, from the rows of metrics.jsonl, and gives advice.

A detector measures one symptom. Its warning begins when the level reaches `begins` and ends when it
is below `ends`, which is lower (except for counts) to avoid flicker. All state comes from the rows,
so `replay` of a record gives the same warnings. No torch here.

If a healthy value depends on the model or its vocabulary, the level is relative to the stage's
first steps. The thresholds lie between the published runs of the preset `tiny` (six setups, five
seeds; none may warn, see tests/records/test_health.py) and runs that failed: `rl.learning_rate` at
1e-3 and 5e-3, `sft.learning_rate` at 3e-2, `rl.gamma` at 1, and RL from a SmolLM2 (`smollm2`) that
is never correct. The docstrings have the numbers of both. One failure may cause several warnings;
the first one is closest to the cause.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from statistics import fmean, median
from typing import Any, ClassVar

Row = Mapping[str, Any]
Rows = Sequence[Row]

# Steps that a symptom is averaged over: at least 512 completions in every preset. The shortest
# stage of a preset has 8 steps (smollm2).
WINDOW = 8
# Steps that define a stage's start. Relative to its first step alone, a healthy run's entropy rises
# to 1.75 times in RL after SFT; relative to three, to 1.4 times. More could hide an early failure.
START = 3


@dataclass
class Alarm:
    """A warning: its name, its steps, what was measured, and advice.

    Attributes:
        ended: the first step without it; None if it lasts to the last row.
    """

    name: str
    stage: str
    step: int
    sentence: str
    advice: str
    ended: int | None = None

    @property
    def steps(self) -> str:
        """The steps of the warning in words."""
        if self.ended is None:
            return f"from {self.step} on"
        last = self.ended - 1
        return f"{self.step}" if last == self.step else f"{self.step} to {last}"

    def __str__(self) -> str:
        return f"step {self.step}: {self.sentence} {self.advice}"


class Health:
    """Watches a run row by row.

    Attributes:
        active: the warnings that hold after the newest row, by name.
        alarms: all warnings so far, in order.
    """

    def __init__(self):
        self.rows: list[Row] = []  # of the current stage
        self.stage: str | None = None
        self.active: dict[str, Alarm] = {}
        self.alarms: list[Alarm] = []

    def see(self, row: Row) -> list[Alarm]:
        """Takes a row of metrics.jsonl.

        Returns:
            The warnings that begin with it.
        """
        if row["stage"] != self.stage:  # other data, another loss, a fresh optimizer
            self.stage, self.rows = row["stage"], []
            self._end(list(self.active), row["step"])
        self.rows.append(row)
        begun = []
        for detector in DETECTORS:
            level, name = detector.level(self.rows), detector.name
            if level is None:
                continue
            if name in self.active and level < detector.ends:
                self._end([name], row["step"])
            elif name not in self.active and level >= detector.begins:
                alarm = Alarm(name, self.stage, row["step"], *detector.words(self.rows, level))
                self.active[name] = alarm
                begun.append(alarm)
        self.alarms += begun
        return begun

    def see_probe(self, row: Row) -> None:
        """Takes a row of probe.jsonl, the only place where the KL divergence of SFT is measured."""
        if self.rows and "kl/base" in row:
            self.rows[-1] = {**self.rows[-1], "kl/base": row["kl/base"]}

    def _end(self, names: Iterable[str], step: int) -> None:
        for name in names:
            self.active.pop(name).ended = step


def replay(metrics: Rows, probe: Rows = ()) -> Health:
    """The health of a run after all its rows; a probe follows the step of its number."""
    health = Health()
    rows = [(row["step"], 0, row) for row in metrics] + [(row["step"], 1, row) for row in probe]
    for _, is_probe, row in sorted(rows, key=lambda entry: entry[:2]):
        (health.see_probe if is_probe else health.see)(row)
    return health


# The detectors ----------------------------------------------------------------------------------


class Detector:
    """One symptom.

    Attributes:
        name: as in the rows' `warnings`.
        begins, ends: levels; see the module's docstring.
    """

    name: ClassVar[str]
    begins: ClassVar[float]
    ends: ClassVar[float]

    def level(self, rows: Rows) -> float | None:
        """How strong the symptom is after the newest row; None if unknown (yet)."""
        raise NotImplementedError

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        """What was measured, and advice, a sentence each."""
        raise NotImplementedError


class EntropyCollapse(Detector):
    """The entropy is a small part of its start value, so there is nothing left to explore.

    RL learns while entropy falls: over many models 73 % of it was gone after a twelfth of the
    steps, with three quarters of the gain (arXiv 2505.22617). In the published runs up to 85 %
    goes. The threshold is 95 %.
    """

    name, begins, ends = "entropy_collapse", 20.0, 10.0

    def level(self, rows: Rows) -> float | None:
        found = entropies(rows)
        return found and found[0] / max(found[1], 1e-9)

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        return (f"The entropy is {entropies(rows)[1]:.2g} nat per token, {1 / level:.1%} of its "
                "start value in this stage: the policy is almost certain of every token.",
                f"Lower {rows[-1]['stage']}.learning_rate, use the entropy term or raise its "
                f"{rows[-1]['stage']}.gamma; if the answers are good, stop here.")


class EntropyExplosion(Detector):
    """The entropy is a multiple of its start value: the policy becomes noise.

    It rises to at most 1.4 times in the published runs, 2.2 times with the entropy term and no
    reward (smollm2), and 4 times at a learning rate that is far too high.
    """

    name, begins, ends = "entropy_explosion", 2.0, 1.5
    floor = 0.01  # nat per token, where a policy is deterministic and a ratio is noise

    def level(self, rows: Rows) -> float | None:
        found = entropies(rows)
        return found and found[1] / max(found[0], self.floor)

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        return (f"The entropy is {entropies(rows)[1]:.2g} nat per token, {level:.1f} times its "
                "start value in this stage: the policy drifts toward noise.",
                f"Lower {brakes(rows[-1])}.")


class KLRunaway(Detector):
    """The policy is far from the base model.

    At 1 nat per token its own tokens are e times less likely under the base model (geometric mean).
    The largest value of a healthy run is 0.7 (smollm2); a learning rate that ruined the model gave
    2.6 to 6. The estimate has a long tail (exp of a log-ratio), so two measurements in a row are
    needed.
    """

    name, begins, ends = "kl_runaway", 1.0, 0.5

    def level(self, rows: Rows) -> float | None:
        found = newest(rows, 2, "kl/reference", "kl/base")
        return min(found) if len(found) == 2 else None

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        return (f"The KL divergence from the base model is {level:.2g} nat per token or more, "
                "twice in a row: the policy is far from the base model.",
                f"Lower {brakes(rows[-1])}; in RL rl.kl_anchor=reference with a larger rl.beta "
                "pulls back.")


class RewardFall(Detector):
    """The reward is less than half of its best: RL undoes what was learned.

    In the published runs the best window is up to 1.34 times a later one; at 7 times the preset's
    learning rate it was 4 times. The best window must reach 0.1 (51 of 512 correct answers), below
    which windows differ twofold by chance.
    """

    name, begins, ends = "reward_fall", 2.0, 1.5
    least = 0.1

    def level(self, rows: Rows) -> float | None:
        best, now = self._windows(rows)
        return best / max(now, 1e-9) if best >= self.least else None

    def _windows(self, rows: Rows) -> tuple[float, float]:
        """The highest mean reward of a window so far, and the newest window's."""
        sums = [0.0, *accumulate(row["reward"] for row in rows if "reward" in row)]
        means = [(later - earlier) / WINDOW
                 for earlier, later in zip(sums, sums[WINDOW:], strict=False)]
        return max(means, default=0.0), means[-1] if means else 0.0

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        best, now = self._windows(rows)
        return (f"The reward of the last {WINDOW} steps is {now:.2f}, after {best:.2f} at its best "
                "in this stage: training undoes what was learned.",
                f"Lower {brakes(rows[-1])}.")


class RewardZero(Detector):
    """No completion of a window earned a reward, so RL cannot learn.

    `verdicts` of the rows tells why. A model that is correct once in 100 tries fails 512 times in a
    row with probability 0.6 %.
    """

    name, begins, ends = "reward_zero", 1.0, 0.75  # share of steps

    def level(self, rows: Rows) -> float | None:
        rewards = newest(rows, WINDOW, "reward")
        return fmean(r == 0 for r in rewards) if len(rewards) == WINDOW else None

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        share, fault, advice = commonest_fault(rows)
        return (f"No answer has earned a reward in {WINDOW} steps: {share:.0%} {fault}.", advice)


class NoSignal(Detector):
    """Almost no group has both correct and wrong answers, so almost none has an advantage.

    Up to 62 % of a window's groups have none in the published runs, and 84 % in those of smollm2
    that learn. If nothing is correct, `RewardZero` says so.
    """

    name, begins, ends = "no_signal", 0.95, 0.9  # share of groups

    def level(self, rows: Rows) -> float | None:
        shares = newest(rows, WINDOW, "frac_reward_zero_std")
        if len(shares) < WINDOW:
            return None
        return fmean(shares) if any(newest(rows, WINDOW, "reward")) else 0.0

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        counts = newest(rows, WINDOW, "groups/correct_counts")
        wrong, right = sum(c[0] for c in counts), sum(c[-1] for c in counts)
        said = f"In {level:.0%} of the groups of the last {WINDOW} steps all answers earn the same"
        if right >= wrong:
            return (f"{said}, mostly 1: they teach nothing more.",
                    "These problems are learned: stop here or take harder ones.")
        share, fault, advice = commonest_fault(rows)
        return (f"{said}, mostly 0: they teach nothing. Of the failing answers "
                f"{share:.0%} {fault}.", advice)


class LengthLimit(Detector):
    """Completions do not end by themselves; a truncated one earns nothing.

    1 % in a window of the published runs, up to 81 % if SmolLM2 was not taught to end.
    """

    name, begins, ends = "length_limit", 0.9, 0.75  # share of completions

    def level(self, rows: Rows) -> float | None:
        shares = newest(rows, WINDOW, "completions/clipped_ratio")
        return fmean(shares) if len(shares) == WINDOW else None

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        return (f"{level:.0%} of the answers of the last {WINDOW} steps reached the length limit; "
                "such an answer earns nothing.", FAULTS["truncated"][1])


class GradientSpike(Detector):
    """One step's gradient is far larger than those before it.

    The largest in the published runs is 6 times the median of the 20 steps before. Steps without
    signal do not count; their gradient is that of the KL or the entropy only.
    """

    name, begins, ends = "gradient_spike", 10.0, 5.0
    before = 20

    def level(self, rows: Rows) -> float | None:
        norms = self._norms(rows)[-self.before - 1:]
        return norms[-1] / median(norms[:-1]) if len(norms) > WINDOW else None

    def _norms(self, rows: Rows) -> list[float]:
        return [row["grad_norm"] for row in rows
                if row.get("grad_norm") and row.get("frac_reward_zero_std", 0) < 1]

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        return (f"The gradient's norm is {self._norms(rows)[-1]:.3g}, {level:.0f} times the median "
                "of the steps before.",
                "training.gradient_clip limits a single such step; if they recur, "
                f"lower {rows[-1]['stage']}.learning_rate.")


class NotFinite(Detector):
    """An update had a non-finite gradient and did not change the weights."""

    name, begins, ends = "not_finite", 1.0, 1.0  # steps of a window

    def level(self, rows: Rows) -> float | None:
        return float(sum("updates_not_finite" in row for row in rows[-WINDOW:]))

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        return ("The gradient of an update was not finite; the weights stayed as they were.",
                "In fp16 this is normal in the first steps, until the loss scale is found; "
                f"elsewhere lower {rows[-1]['stage']}.learning_rate or set model.precision=fp32.")


DETECTORS: tuple[Detector, ...] = (
    NotFinite(), GradientSpike(), KLRunaway(), EntropyCollapse(), EntropyExplosion(),
    LengthLimit(), RewardZero(), NoSignal(), RewardFall())

LOOK = "Look at the answers in samples.jsonl."
FORMAT = "Run SFT first, which teaches the format, and look at the answers in samples.jsonl."
TOO_HARD = ("The problems are too hard for this model: run SFT first, take easier ones "
            "(data.max_level, data.max_solution_steps), or raise rl.group_size.")
# By the verdict's reason (`rewards.REASONS`): what such answers did, and what to do.
FAULTS = {
    "wrong": ("were wrong", TOO_HARD),
    "truncated": ("were cut off at the length limit",
                  "Raise rl.max_new_tokens, or run SFT first, which teaches answers to end."),
    "no_box": ("had no boxed answer", FORMAT),
    "conflicting_boxes": ("had boxes that differ", FORMAT),
    "unparsable": ("could not be parsed", FORMAT),
    "time_out": ("took the verifier too long", "Raise verifier.time_limit. " + LOOK),
}


# Reading rows -----------------------------------------------------------------------------------


def newest(rows: Rows, count: int, *keys: str) -> list[Any]:
    """The values of the newest rows that have one of the keys, newest first, at most `count`."""
    found = (row[key] for row in reversed(rows) for key in keys if row.get(key) is not None)
    return list(islice(found, count))


def commonest_fault(rows: Rows) -> tuple[float, str, str]:
    """Of a window's answers without reward: the largest share, its fault, and advice."""
    counts = Counter()
    for verdicts in newest(rows, WINDOW, "verdicts"):
        counts.update(verdicts)
    del counts["right"]
    reason, count = max(counts.items(), key=lambda item: item[1], default=("wrong", 0))
    return count / max(1, counts.total()), *FAULTS.get(reason, (f"were judged '{reason}'", LOOK))


def brakes(row: Row) -> str:
    """The settings that slow down a policy that moves too far."""
    names = ("gamma", "learning_rate") if row.get("gamma") else ("learning_rate",)
    return " or ".join(f"{row['stage']}.{name}" for name in names)


def entropies(rows: Rows) -> tuple[float, float] | None:
    """The mean entropy of the stage's first steps, and the median of the newest window.

    Steps on rollouts are not compared with steps on demonstrations.
    """
    alike = [row["entropy"] for row in rows if row.get("entropy") is not None
             and ("reward" in row) == ("reward" in rows[-1])]
    if len(alike) <= WINDOW:
        return None
    return fmean(alike[:START]), median(alike[-WINDOW:])

"""Training that says when it is sick: detectors over the rows of metrics.jsonl, each with advice.

A detector measures one symptom. Its warning begins when the level reaches `begins` and ends when
the level is back under `ends`, which is lower (but for counts), so that a level on the threshold
does not warn at every other step. All state comes from the rows: reading a record again (`replay`)
gives the same warnings, which is how a resumed run goes on and how a finished run is looked at. No
torch here.

Where a healthy value depends on the model or its vocabulary, the level is relative to the stage's
own first steps. The thresholds lie between the published runs of the preset `tiny` (six setups,
five seeds; none may warn, see tests/test_health.py) and runs that were sick: with
`rl.learning_rate` at 1e-3 and 5e-3, `sft.learning_rate` at 3e-2, `rl.gamma` at 1, and RL from a
SmolLM2 (`smollm2`) that is never right. The docstrings have the numbers of both. One illness may
set off several warnings; the first one is nearest to its cause.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from statistics import fmean, median
from typing import Any, ClassVar

Row = Mapping[str, Any]
Rows = Sequence[Row]

# Steps that a symptom is averaged over. They hold 512 completions or more in every preset, so that
# one batch's luck does not warn, and the shortest stage of a preset has 8 steps (smollm2).
WINDOW = 8
# Steps that say what a stage began with. By its first step alone, a healthy run's entropy seems to
# rise to 1.75 times in RL after SFT; by three, to 1.4 times. More would hide a sickness at once.
START = 3


@dataclass
class Alarm:
    """A warning: which one, from which step to which, what was seen and what to do.

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
        """The steps of the warning, as a person says them."""
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
        alarms: all that began so far, in order.
    """

    def __init__(self):
        self.rows: list[Row] = []  # of the stage that goes on
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
        """Takes a row of probe.jsonl: only there is the KL divergence of SFT measured."""
        if self.rows and "kl/base" in row:
            self.rows[-1] = {**self.rows[-1], "kl/base": row["kl/base"]}

    def _end(self, names: Iterable[str], step: int) -> None:
        for name in names:
            self.active.pop(name).ended = step


def replay(metrics: Rows, probe: Rows = ()) -> Health:
    """The health of a run after all its rows so far; a probe comes after the step of its number."""
    health = Health()
    rows = [(row["step"], 0, row) for row in metrics] + [(row["step"], 1, row) for row in probe]
    for _, is_probe, row in sorted(rows, key=lambda entry: entry[:2]):
        (health.see_probe if is_probe else health.see)(row)
    return health


# The detectors ----------------------------------------------------------------------------------


class Detector:
    """One symptom.

    Attributes:
        name: what stands in the rows' `warnings`.
        begins, ends: levels; see the module's docstring.
    """

    name: ClassVar[str]
    begins: ClassVar[float]
    ends: ClassVar[float]

    def level(self, rows: Rows) -> float | None:
        """How strong the symptom is after the newest row, None if that cannot be said (yet)."""
        raise NotImplementedError

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        """What was seen and what to do, a sentence each."""
        raise NotImplementedError


class EntropyCollapse(Detector):
    """The entropy is a small part of what it was: nothing is left to explore.

    Falling entropy is how RL learns: over many models 73 % of it was gone after a twelfth of the
    steps, and three quarters of the gain were made (arXiv 2505.22617). In the published runs up to
    85 % goes. Here it is 95 %.
    """

    name, begins, ends = "entropy_collapse", 20.0, 10.0

    def level(self, rows: Rows) -> float | None:
        found = entropies(rows)
        return found and found[0] / max(found[1], 1e-9)

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        return (f"The entropy is {entropies(rows)[1]:.2g} nat per token, {1 / level:.1%} of what "
                "this stage began with: the policy is all but certain of every token.",
                f"Lower {rows[-1]['stage']}.learning_rate, use the entropy term or raise its "
                f"{rows[-1]['stage']}.gamma; if the answers are good, stop here.")


class EntropyExplosion(Detector):
    """The entropy is a multiple of what it was: the policy becomes noise.

    In the published runs it rises to 1.4 times its start at most. With the entropy term and no
    reward it was 2.2 times (smollm2), at a learning rate far too high 4 times.
    """

    name, begins, ends = "entropy_explosion", 2.0, 1.5
    floor = 0.01  # nat per token, where a policy is deterministic and a ratio is noise

    def level(self, rows: Rows) -> float | None:
        found = entropies(rows)
        return found and found[1] / max(found[0], self.floor)

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        return (f"The entropy is {entropies(rows)[1]:.2g} nat per token, {level:.1f} times what "
                "this stage began with: the policy drifts towards noise.",
                f"Lower {brakes(rows[-1])}.")


class KLRunaway(Detector):
    """The policy has left the base model.

    1 nat per token: the policy's own tokens are e times less likely under the base model, in the
    geometric mean. The largest single value of a healthy run is 0.7 (smollm2), and a learning rate
    that ruined the model gave 2.6 to 6. The estimate has a long tail (exp of a log-ratio), so that
    it takes two measurements in a row.
    """

    name, begins, ends = "kl_runaway", 1.0, 0.5

    def level(self, rows: Rows) -> float | None:
        found = newest(rows, 2, "kl/reference", "kl/base")
        return min(found) if len(found) == 2 else None

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        return (f"The KL divergence from the base model is {level:.2g} nat per token or more, "
                "twice in a row: the policy has left the model it came from.",
                f"Lower {brakes(rows[-1])}; in RL rl.kl_anchor=reference with a larger rl.beta "
                "pulls back.")


class RewardFall(Detector):
    """The reward is less than half of what it was: RL undoes what there was.

    In the published runs the best window is up to 1.34 times a later one; at 7 times the preset's
    learning rate it was 4 times. The best window has to reach 0.1, below which two windows differ
    twofold by luck: 51 right answers of 512, in groups that are right together.
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
                "in this stage: training undoes what there was.",
                f"Lower {brakes(rows[-1])}.")


class RewardZero(Detector):
    """No completion of a window earned anything, so RL has nothing to go by.

    `verdicts` of the rows tells why. A model that is right once in 100 tries fails 512 times in a
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
    """Hardly a group has both right and wrong answers, so that hardly one has an advantage.

    Up to 62 % of a window's groups have none in the published runs, 84 % in those of smollm2 that
    learn. Where nothing at all is right, `RewardZero` says so.
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
            return (f"{said}, mostly all of them 1: they teach nothing any more.",
                    "These problems are learned: stop here or take harder ones.")
        share, fault, advice = commonest_fault(rows)
        return (f"{said}, mostly all of them 0: they teach nothing. Of the failing answers "
                f"{share:.0%} {fault}.", advice)


class LengthLimit(Detector):
    """The completions do not end by themselves, and one that is cut off earns nothing.

    1 % in a window of the published runs, up to 81 % where SmolLM2 was not taught to end.
    """

    name, begins, ends = "length_limit", 0.9, 0.75  # share of completions

    def level(self, rows: Rows) -> float | None:
        shares = newest(rows, WINDOW, "completions/clipped_ratio")
        return fmean(shares) if len(shares) == WINDOW else None

    def words(self, rows: Rows, level: float) -> tuple[str, str]:
        return (f"{level:.0%} of the answers of the last {WINDOW} steps ran into the length limit; "
                "such an answer earns nothing.", FAULTS["truncated"][1])


class GradientSpike(Detector):
    """One step's gradient is far larger than those before it.

    The largest of the published runs is 6 times the median of the 20 steps before. Steps without
    signal do not count: their gradient is only that of the KL or the entropy.
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
                "training.gradient_clip takes the edge off one such step; if they come again, "
                f"lower {rows[-1]['stage']}.learning_rate.")


class NotFinite(Detector):
    """An update had a gradient that is not finite, and the weights stayed as they were."""

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
    """The values of the newest rows that have one of the keys, newest first, `count` at most."""
    found = (row[key] for row in reversed(rows) for key in keys if row.get(key) is not None)
    return list(islice(found, count))


def commonest_fault(rows: Rows) -> tuple[float, str, str]:
    """Of a window's answers that earned nothing: the largest share, its fault, and what to do."""
    counts = Counter()
    for verdicts in newest(rows, WINDOW, "verdicts"):
        counts.update(verdicts)
    del counts["right"]
    reason, count = max(counts.items(), key=lambda item: item[1], default=("wrong", 0))
    return count / max(1, counts.total()), *FAULTS.get(reason, (f"were judged '{reason}'", LOOK))


def brakes(row: Row) -> str:
    """The settings that a policy which moves too far is slowed down by."""
    names = ("gamma", "learning_rate") if row.get("gamma") else ("learning_rate",)
    return " or ".join(f"{row['stage']}.{name}" for name in names)


def entropies(rows: Rows) -> tuple[float, float] | None:
    """The mean entropy of the stage's first steps, and the median of the newest window.

    Where a stage has steps of both kinds, those on rollouts are not compared with those on
    demonstrations.
    """
    alike = [row["entropy"] for row in rows if row.get("entropy") is not None
             and ("reward" in row) == ("reward" in rows[-1])]
    if len(alike) <= WINDOW:
        return None
    return fmean(alike[:START]), median(alike[-WINDOW:])

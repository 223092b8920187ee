"""Verdicts on completions: whether the answer is the gold answer, strictly and leniently.

Strict, for the reward and Table 2: the completion ended with EOS, has a box, and all its boxes are
equivalent to the gold answer. Lenient, reported in addition: the last box, or else the last `####
x`, or else the last number, is equivalent to it.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..system.errors import UserError
from .answers import MAX_ANSWER_CHARACTERS, canonical, extract_lenient, is_malformed, scan_boxes
from .numeric import decide, is_plain
from .workers import WorkerPool

REASONS = (
    "right", "wrong", "truncated", "no_box", "conflicting_boxes", "unparsable", "time_out",
)  # fmt: skip
MAX_BOXES = 8
"""A completion with more different boxes is guessing and is wrong."""

_CACHE_SIZE = 200_000


@dataclass(frozen=True)
class Verdict:
    """Whether a completion is correct, strictly and leniently, and the reason of the strict
    verdict.

    `reason` is one of `REASONS`; "right" if and only if `strict`.
    """

    strict: bool
    lenient: bool
    reason: str


@dataclass(frozen=True)
class _Reading:
    """The answers in a completion on which the two verdicts depend."""

    gold: str
    boxes: tuple[str, ...]  # different ones only; empty if `reason` is already known
    reason: str | None
    lenient: str | None

    def questions(self) -> list[tuple[str, str]]:
        answers = (*self.boxes, *([] if self.lenient is None else [self.lenient]))
        return [(self.gold, answer) for answer in answers]


class Verifier:
    """Checks completions against gold answers.

    Plain numbers and words are decided here. The rest goes to worker processes, which are started
    when first needed, and killed and replaced when an answer takes longer than `time_limit`
    seconds. Outcomes are cached. A context manager; threads may share it.

    `counts` counts the reasons of all verdicts and, as "worker_restarts", replaced processes.
    """

    def __init__(self, workers: int = 1, time_limit: float = 5.0) -> None:
        """Args: up to `workers` processes, `time_limit` seconds per answer."""
        if workers < 1 or time_limit <= 0:
            raise ValueError("A verifier needs at least one worker and a time limit above 0 s.")
        self.counts: Counter[str] = Counter()
        self._pool = WorkerPool(workers, time_limit)
        self._outcomes: dict[tuple[str, str], str] = {}
        self._lock = threading.RLock()
        self._finalizer = weakref.finalize(self, self._pool.close)  # also runs at exit

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def verify(
        self, golds: Sequence[str], texts: Sequence[str], finished: Sequence[bool]
    ) -> list[Verdict]:
        """One verdict per completion.

        Args:
            golds: the gold answers.
            texts: the completions without their EOS.
            finished: whether each ended with EOS.

        Raises:
            UserError: a gold answer cannot be parsed.
        """
        readings = [
            _read(gold, text, bool(ended))
            for gold, text, ended in zip(golds, texts, finished, strict=True)]
        with self._lock:
            restarts = self._pool.restarts
            self._settle([q for reading in readings for q in reading.questions()])
            verdicts = [self._verdict(reading) for reading in readings]
            self.counts.update(verdict.reason for verdict in verdicts)
            self.counts["worker_restarts"] += self._pool.restarts - restarts
            if len(self._outcomes) > _CACHE_SIZE:
                self._outcomes.clear()
        return verdicts

    def can_parse(self, gold: str) -> bool:
        """Whether `gold` can serve as a gold answer."""
        if is_malformed(gold):
            return False
        if is_plain(gold):
            return True
        with self._lock:
            return self._pool.ask([(canonical(gold), canonical(gold))])[0] in ("right", "wrong")

    def _settle(self, questions: list[tuple[str, str]]) -> None:
        """Puts the outcome of every (gold, answer) into the cache."""
        undecided: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for question in dict.fromkeys(questions):
            if question in self._outcomes:
                continue
            outcome = decide(*question)
            if outcome is not None:
                self._outcomes[question] = outcome
            else:  # spellings of one answer are asked once
                same = (canonical(question[0]), canonical(question[1]))
                undecided.setdefault(same, []).append(question)
        for same, outcome in zip(undecided, self._pool.ask(list(undecided)), strict=True):
            if outcome == "bad_gold":
                raise _bad_gold(undecided[same][0][0])
            self._outcomes.update(dict.fromkeys(undecided[same], outcome))

    def _verdict(self, reading: _Reading) -> Verdict:
        reason = reading.reason
        if reason is None:
            outcomes = [self._outcomes[reading.gold, box] for box in reading.boxes]
            if all(outcome == "right" for outcome in outcomes):
                reason = "right"
            else:
                reason = "conflicting_boxes" if "right" in outcomes else outcomes[-1]
        lenient = reading.lenient is not None and (
            self._outcomes[reading.gold, reading.lenient] == "right")
        return Verdict(strict=reason == "right", lenient=lenient or reason == "right",
                       reason=reason)  # fmt: skip


def _read(gold: str, text: str, finished: bool) -> _Reading:
    if is_malformed(gold):
        raise _bad_gold(gold)
    boxes, unclosed = scan_boxes(text)
    boxes = [_cut(box) for box in boxes]
    different = tuple({canonical(box): box for box in boxes}.values())
    reason = None
    if not finished:
        reason = "truncated"
    elif unclosed:
        reason = "unparsable"
    elif not boxes:
        reason = "no_box"
    elif len(different) > MAX_BOXES:
        reason = "conflicting_boxes"
    lenient = boxes[-1] if boxes else extract_lenient(text)
    lenient = None if lenient is None else _cut(lenient)
    return _Reading(gold, different if reason is None else (), reason, lenient)


def _cut(answer: str) -> str:
    """Shortens an answer that is too long to be parsed, so that it does not fill the caches."""
    return answer[: MAX_ANSWER_CHARACTERS + 1]


def _bad_gold(gold: str) -> UserError:
    return UserError(
        f"The gold answer {gold[:80]!r} cannot be parsed; correct it or leave its problem out.")


_gold_verifier: Verifier | None = None


def check_gold(gold: str, problem_id: str) -> None:
    """Raises a `UserError` that names the problem if its gold answer cannot be parsed."""
    global _gold_verifier
    if _gold_verifier is None:
        _gold_verifier = Verifier(time_limit=10.0)
    if not isinstance(gold, str) or not _gold_verifier.can_parse(gold):
        raise UserError(
            f"The gold answer {str(gold)[:80]!r} of problem {problem_id} cannot be parsed; "
            "correct it or leave the problem out.")

"""A queue of jobs: notebooks and training runs as processes, longest first, with progress lines.

Where a process runs is not decided here: `process.py` starts it on this machine, `cluster.py` on a
Ray cluster.
"""

import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..records.run_folder import RunFolder
from ..system.errors import Stopped, printable
from ..system.paths import hide_home
from ..training.observer import duration

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_LOOKS = 0.1
TRAINING_SHARE = 0.85  # fraction of a run's time; the rest is loading and evaluation
STEP = re.compile(rb"step (\d+)/(\d+)")
SENTENCE_LENGTH = 400
NO_KERNEL = b"Kernel died before replying to kernel_info"
MOST_STARTS = 3


@dataclass(frozen=True)
class Job:
    """A notebook or a run to execute.

    Attributes:
        name: for people.
        command: the process.
        folder: its working directory.
        output: the executed notebook; for a run, a file that does not exist.
        log: what the process prints.
        weight: relative duration; longer jobs start first.
        seed: of the run.
        record: the run that must be complete afterwards; None if there is none.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    output: Path
    log: Path
    weight: float
    seed: int = 0
    record: RunFolder | None = None


class Process(Protocol):
    """What the queue needs of a process, on this machine or on a node of a cluster."""

    returncode: int | None

    def poll(self) -> int | None:
        """The exit code; None while the job waits or runs."""

    def wait(self) -> int | None:
        """Waits until it has ended."""

    def interrupt(self) -> None:
        """Asks it to finish its step and write a checkpoint."""

    def end(self) -> None:
        """Ends it at once."""


# (job, environment, slot) -> the process of the job
Start = Callable[[Job, dict[str, str], int], Process]


@dataclass
class Running:
    """A job with its process."""

    job: Job
    process: Process
    slot: int
    began: float


class TimeLeft:
    """How long the jobs will take, judging by those that are done or running."""

    def __init__(self, jobs: Sequence[Job], slots: int):
        self.total, self.slots = sum(job.weight for job in jobs), slots
        self.done = self.busy = 0.0

    def finished(self, running: Running) -> None:
        self.done += running.job.weight
        self.busy += time.monotonic() - running.began

    def text(self, running: Sequence[Running]) -> str:
        """`, about 5 min left`; empty while there is nothing to judge by."""
        done = self.done + sum(r.job.weight * TRAINING_SHARE * training_done(r.job)
                               for r in running)
        busy = self.busy + sum(time.monotonic() - r.began for r in running)
        if done <= 0:
            return ""
        left = max(0.0, self.total - done) * busy / done / self.slots
        return f", about {duration(left)} left" if left > 0 else ""


class Queue:
    """Jobs that wait, run, or have ended.

    Args:
        jobs: what to run.
        slots: how many at a time.
        environment: environment variables of every process.
        say: takes a line of progress.
        start: starts the process of a job.
    """

    def __init__(self, jobs: Sequence[Job], slots: int, environment: dict[str, str],
                 say: Callable[[str], None], start: Start):
        # sorted is stable: jobs of equal weight keep their order
        self.waiting = sorted(jobs, key=lambda job: -job.weight)
        self.running: list[Running] = []
        self.failures: dict[Job, str] = {}
        self.slots, self.environment, self.say, self.start = slots, environment, say, start
        self.total, self.ended, self.last_line = len(jobs), 0, time.monotonic()
        self.starts: Counter[Job] = Counter()
        self.time_left = TimeLeft(jobs, slots)

    def run(self) -> dict[Job, str]:
        """Runs all jobs, longest first; a failed job does not stop the others.

        Returns:
            {job: why it failed, in one sentence}.

        Raises:
            Stopped: by Ctrl-C or SIGTERM, after every running job has finished its step and written
                its checkpoint.
        """
        with terminate_as_interrupt():
            try:
                while self.waiting or self.running:
                    self._start_waiting()
                    self._collect_ended()
                    self._report_progress()
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            except KeyboardInterrupt:
                stop(self.running, self.say)
                raise Stopped(
                    f"Stopped after {self.ended} of {self.total}; the same command reads what is "
                    "finished and resumes the others from their checkpoints.") from None
            except BaseException:
                end_at_once(self.running)
                raise
            finally:
                for one in self.running:
                    hide_home_in(one.job)
        return self.failures

    def _start_waiting(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            slot = min(set(range(self.slots)) - {one.slot for one in self.running})
            job = self.waiting.pop(0)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.output.unlink(missing_ok=True)  # an older one must not pass for this one's
            process = self.start(job, self.environment, slot)
            self.running.append(Running(job, process, slot, time.monotonic()))
            self.starts[job] += 1
            self.say(f"started {job.name}")

    def _collect_ended(self) -> None:
        for one in [one for one in self.running if one.process.poll() is not None]:
            self.running.remove(one)
            if had_no_kernel(one) and self.starts[one.job] < MOST_STARTS:
                self._line(f"{one.job.name}: its kernel did not start; starting it again")
                self.waiting.insert(0, one.job)
                continue
            self.time_left.finished(one)
            self.ended += 1
            hide_home_in(one.job)
            reason = why_failed(one)
            if reason:
                self.failures[one.job] = reason
            self._line(f"{'FAILED' if reason else 'finished'} {one.job.name} in "
                       f"{duration(time.monotonic() - one.began)} "
                       f"({self.ended} of {self.total}{self._left()})"
                       + (f": {reason}" if reason else ""))

    def _report_progress(self) -> None:
        if self.running and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            names = ", ".join(one.job.name + (f" ({share:.0%} of its steps)" if (
                share := training_done(one.job)) else "") for one in self.running)
            self._line(f"running {names} ({self.ended} of {self.total} done{self._left()})")

    def _left(self) -> str:
        return self.time_left.text(self.running) if self.waiting or self.running else ""

    def _line(self, line: str) -> None:
        self.last_line = time.monotonic()
        self.say(line)


def hide_home_in(job: Job) -> None:
    """Removes the user's home folder from what an ended job wrote."""
    try:
        hide_home(job.log)
        hide_home(job.output)
    except OSError:  # such as a full disk; the other jobs continue
        pass


# Progress ---------------------------------------------------------------------------------------


def training_done(job: Job) -> float:
    """Fraction of its training steps that a job has taken, from its log; 0 if unknown."""
    found = STEP.findall(tail(job.log))
    return min(1.0, int(found[-1][0]) / max(1, int(found[-1][1]))) if found else 0.0


def tail(path: Path, size: int = 8192) -> bytes:
    """The end of a file; empty if it cannot be read."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - size))
            return stream.read()
    except OSError:
        return b""


# Failures ---------------------------------------------------------------------------------------


def had_no_kernel(ended: Running) -> bool:
    """Whether a notebook's kernel ended before its first cell.

    Jupyter looks for free ports, releases them, and passes them to the kernel. If another process
    takes one in between, such as another notebook's kernel, this kernel dies; nothing has run then.
    """
    return ended.process.returncode != 0 and NO_KERNEL in tail(ended.job.log)


def why_failed(ended: Running) -> str:
    """Why an ended job failed, in one sentence; empty if it did not."""
    code, job = ended.process.returncode, ended.job
    if code == 0:
        if job.record is not None and not job.record.is_complete:
            return "it ended without an error but left no finished run"
        return ""
    return (error_in_notebook(job.output) or last_line_of(job.log)
            or f"the process ended with code {code} and no message")


def error_in_notebook(path: Path) -> str:
    """The error of the failed cell: the sentence of our own errors, `Type: text` of others."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        errors = [output for cell in cells for output in cell.get("outputs", ())
                  if output.get("output_type") == "error"]
    except (OSError, ValueError, KeyError):
        return ""
    if not errors:
        return ""
    name, text = errors[-1].get("ename", ""), errors[-1].get("evalue", "")
    ours = name in ("UserError", "UsageError", "Stopped")
    return shorten(text if ours else f"{name}: {text}")


def last_line_of(path: Path) -> str:
    lines = [line for line in tail(path).decode("utf-8", "replace").splitlines() if line.strip()]
    return shorten(lines[-1]) if lines else ""


def shorten(text: str) -> str:
    """The first line that is not empty, at most SENTENCE_LENGTH characters."""
    line = printable(next((line.strip() for line in text.splitlines() if line.strip()), ""))
    return line if len(line) <= SENTENCE_LENGTH else line[:SENTENCE_LENGTH - 3] + "..."


# Stopping ---------------------------------------------------------------------------------------


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM (which schedulers send) acts like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(running: Sequence[Running], say: Callable[[str], None]) -> None:
    """Asks every job to stop after its step, and waits; a second Ctrl-C ends them at once."""
    running = [r for r in running if r.process.poll() is None]
    if not running:
        return
    say("stopping: every running job finishes its step and writes a checkpoint; press Ctrl-C again "
        "to end them at once")
    try:
        for one in running:
            one.process.interrupt()
        for one in running:
            one.process.wait()
    except KeyboardInterrupt:
        end_at_once(running)


def end_at_once(running: Sequence[Running]) -> None:
    """Kills jobs with all their processes; their last checkpoints remain."""
    for one in running:
        one.process.end()

"""Notebooks and runs as processes: some at a time, the longest first, told of in plain lines."""

import json
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..records.run_folder import RunFolder
from ..system.errors import Stopped, printable
from ..system.paths import hide_home
from ..training.observer import duration
from .cluster import Cluster, RemoteProcess
from .process import JobProcess

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_LOOKS = 0.1
TRAINING_SHARE = 0.85  # of a run's time; the rest is loading and evaluation
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
        folder: it runs in there.
        output: the executed notebook; a run has none, and no such file.
        log: what the process prints.
        weight: about how long it takes, in any unit; longer ones start first.
        seed: the seed it gets.
        record: the run that must be complete afterwards; None where there is none.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    output: Path
    log: Path
    weight: float
    seed: int = 0
    record: RunFolder | None = None


@dataclass
class Running:
    """A job whose process is there, on this machine or on a node of a cluster."""

    job: Job
    process: "JobProcess | RemoteProcess"
    slot: int
    began: float


class Clock:
    """How long the jobs will still take, judged by those that are done or under way."""

    def __init__(self, jobs: Sequence[Job], slots: int):
        self.total, self.slots = sum(job.weight for job in jobs), slots
        self.done = self.busy = 0.0

    def finished(self, running: Running) -> None:
        self.done += running.job.weight
        self.busy += time.monotonic() - running.began

    def left(self, running: Sequence[Running]) -> str:
        """`, about 5 min left`; empty while there is nothing to judge by."""
        done = self.done + sum(r.job.weight * TRAINING_SHARE * progress(r.job) for r in running)
        busy = self.busy + sum(time.monotonic() - r.began for r in running)
        if done <= 0:
            return ""
        left = max(0.0, self.total - done) * busy / done / self.slots
        return f", about {duration(left)} left" if left > 0 else ""


class Queue:
    """Jobs that wait, run and have ended.

    Args:
        jobs: what to run.
        slots: how many at a time.
        environment: of every process.
        say: takes a line of progress.
        gpus: GPUs to share among the slots; 0 for none.
        cluster: where the jobs run; None for this machine.
    """

    def __init__(self, jobs: Sequence[Job], slots: int, environment: dict[str, str],
                 say: Callable[[str], None], gpus: int = 0, cluster: "Cluster | None" = None):
        self.cluster = cluster
        # sorted is stable: equal weights keep the order they came in
        self.waiting = sorted(jobs, key=lambda job: -job.weight)
        self.running: list[Running] = []
        self.failures: dict[Job, str] = {}
        self.slots, self.environment, self.say, self.gpus = slots, environment, say, gpus
        self.total, self.ended, self.last_line = len(jobs), 0, time.monotonic()
        self.starts: Counter[Job] = Counter()
        self.clock = Clock(jobs, slots)

    def run(self) -> dict[Job, str]:
        """Runs all jobs, the longest first; one that fails keeps no other from running.

        Returns:
            Job -> why it failed, in one sentence, of those that did.

        Raises:
            Stopped: by Ctrl-C or SIGTERM, after every running job has finished its step and
                written its checkpoint.
        """
        with terminate_as_interrupt():
            try:
                while self.waiting or self.running:
                    self._start_waiting()
                    self._collect_ended()
                    self._tell_now_and_then()
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            except KeyboardInterrupt:
                stop(self.running, self.say)
                raise Stopped(
                    f"Stopped by you after {self.ended} of {self.total}; the same "
                    "command reads what is finished and goes on from the checkpoints of the "
                    "others.") from None
            except BaseException:
                end_at_once(self.running)
                raise
            finally:
                for one in self.running:
                    anonymize(one.job)
        return self.failures

    def _start_waiting(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            slot = min(set(range(self.slots)) - {one.slot for one in self.running})
            job = self.waiting.pop(0)
            self.running.append(start(job, slot, self.environment, self.gpus, self.cluster))
            self.starts[job] += 1
            self.say(f"started {job.name}")

    def _collect_ended(self) -> None:
        for one in [one for one in self.running if one.process.poll() is not None]:
            self.running.remove(one)
            if had_no_kernel(one) and self.starts[one.job] < MOST_STARTS:
                self._line(f"{one.job.name}: its kernel did not come up, so it is started again")
                self.waiting.insert(0, one.job)
                continue
            self.clock.finished(one)
            self.ended += 1
            anonymize(one.job)
            reason = why_failed(one)
            if reason:
                self.failures[one.job] = reason
            self._line(f"{'FAILED' if reason else 'finished'} {one.job.name} in "
                       f"{duration(time.monotonic() - one.began)} "
                       f"({self.ended} of {self.total}{self._left()})"
                       + (f": {reason}" if reason else ""))

    def _tell_now_and_then(self) -> None:
        if self.running and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            names = ", ".join(f"{one.job.name}{percent(one.job)}" for one in self.running)
            self._line(f"running {names} ({self.ended} of {self.total} done{self._left()})")

    def _left(self) -> str:
        return self.clock.left(self.running) if self.waiting or self.running else ""

    def _line(self, line: str) -> None:
        self.last_line = time.monotonic()
        self.say(line)


def start(job: Job, slot: int, environment: dict[str, str], gpus: int,
          cluster: "Cluster | None" = None) -> Running:
    """Starts a job's process, on the GPU of its slot or somewhere in a cluster.

    The process gets a session of its own: Ctrl-C in the terminal reaches this process alone, which
    then asks each kernel to finish its step. papermill itself would kill the kernel.
    """
    if gpus > 1 and cluster is None:
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment = environment | {"CUDA_VISIBLE_DEVICES": visible.split(",")[slot % gpus]}
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.output.unlink(missing_ok=True)  # an older one must not pass for this one's
    if cluster is not None:
        return Running(job, cluster.start(job, environment), slot, time.monotonic())
    with job.log.open("wb") as log:
        process = JobProcess(job.command, cwd=job.folder, env=environment, stdout=log,
                             stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                             start_new_session=True)
    return Running(job, process, slot, time.monotonic())


def anonymize(job: Job) -> None:
    """Takes the user's home folder out of what an ended job wrote."""
    try:
        hide_home(job.log)
        hide_home(job.output)
    except OSError:  # a full disk, say: that is no reason to lose the others
        pass


# Progress ---------------------------------------------------------------------------------------


def progress(job: Job) -> float:
    """Share of its training steps that a job has taken, as its log says; 0 where it says none."""
    found = STEP.findall(tail(job.log))
    return min(1.0, int(found[-1][0]) / max(1, int(found[-1][1]))) if found else 0.0


def percent(job: Job) -> str:
    share = progress(job)
    return f" ({share:.0%} of its steps)" if share else ""


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

    Jupyter looks for free ports, lets go of them, and gives them to the kernel. What takes one in
    between, another notebook's kernel or a cluster, leaves it without; nothing has run then.
    """
    return ended.process.returncode != 0 and NO_KERNEL in tail(ended.job.log)


def why_failed(ended: Running) -> str:
    """Why an ended job failed, in one sentence; empty if it did not."""
    code, job = ended.process.returncode, ended.job
    if code == 0:
        if job.record is not None and not job.record.is_complete:
            return "it ran to its end and left no finished run"
        return ""
    return (error_in_notebook(job.output) or last_line_of(job.log)
            or f"the process ended with code {code} and said nothing")


def error_in_notebook(path: Path) -> str:
    """What the cell that failed says: the sentence of our own errors, `Type: text` of others."""
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
    """One line that a person reads to its end."""
    line = printable(next((line.strip() for line in text.splitlines() if line.strip()), ""))
    return line if len(line) <= SENTENCE_LENGTH else line[:SENTENCE_LENGTH - 3] + "..."


# Stopping ---------------------------------------------------------------------------------------


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM (what schedulers send) is a Ctrl-C."""
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
    """Asks every kernel to stop after its step and waits; a second Ctrl-C ends them at once."""
    running = [r for r in running if r.process.poll() is None]
    if not running:
        return
    say("stopping: each that is running finishes its step and writes a checkpoint; Ctrl-C again "
        "ends them at once")
    try:
        for one in running:
            one.process.interrupt()
        for one in running:
            one.process.wait()
    except KeyboardInterrupt:
        end_at_once(running)


def end_at_once(running: Sequence[Running]) -> None:
    """Kills jobs with all their processes; their last checkpoints stay."""
    for one in running:
        one.process.end()

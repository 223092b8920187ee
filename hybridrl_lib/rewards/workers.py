"""Worker processes that can be killed, and their pool.

Uses `subprocess` and pipes, not `multiprocessing`, which would import the calling program again. So
it works from a notebook, a script without a main guard, and any thread.
"""

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ..system.errors import UserError
from ..system.paths import PACKAGE

START_LIMIT_SECONDS = 120.0
MEMORY_LIMIT_BYTES = 1 << 30
IDLE_SHARE = 0.1
"""Below this share of its time limit in processor time, a worker was held up by other processes."""
_PACKAGE_PARENT = str(PACKAGE.parent)


class Worker:
    """One child process that runs math-verify; started on the first question, replaced when killed.
    """

    def __init__(self, time_limit: float, memory_limit: int = MEMORY_LIMIT_BYTES) -> None:
        """Args: `time_limit` in seconds per answer, `memory_limit` in bytes."""
        self.time_limit = time_limit
        self.memory_limit = memory_limit
        self.restarts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._deadline: object | None = None  # the message whose reply is waited for
        self._expired = False
        self._held_up = False

    def ask(self, gold: str, answer: str) -> str:
        """The outcome of `math_check.check`, "time_out", or "unparsable" if the worker broke."""
        for _ in range(2):
            self._ensure_started()
            reply = self._exchange(
                {"gold": gold, "answer": answer, "seconds": self.time_limit}, self.time_limit)
            if reply is not None:
                return reply["outcome"]
            self.stop()
            self.restarts += 1
            if self._expired and not self._held_up:
                return "time_out"
            # It died by itself, of this answer or because something else killed it, or it was kept
            # from computing, as on a machine that slept. Try once more.
        return "time_out" if self._expired else "unparsable"

    def stop(self) -> None:
        """Kills the process, if any. A process forked from this one leaves the worker alone."""
        process, self.process = self.process, None
        if process is None or os.getpid() != self._owner:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # a request that nobody will read
                stream.close()

    def kill(self) -> None:
        """Ends the process from another thread; the thread that waits for its reply cleans up."""
        process = self.process
        if process is not None:
            process.kill()

    def _ensure_started(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        if self.process is not None:  # it died between two answers
            self.stop()
            self.restarts += 1
        reply = self._start()
        if reply is None:  # something else may have killed it or held it up
            self.stop()
            self.restarts += 1
            reply = self._start()
        if reply is None or "error" in reply:
            self.stop()
            reason = (reply or {}).get("error", "its process ended at once, or did not get ready")
            raise UserError(
                f"The answer checker math-verify could not be started ({reason}); "
                "install the project's requirements again.")

    def _start(self) -> dict | None:
        """Starts a process; returns what it says when ready, or None if it died or was killed."""
        environment = dict(os.environ)
        paths = [_PACKAGE_PARENT, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment["PYTHONSAFEPATH"] = "1"  # modules in the working directory must not be imported
        environment["PYTHONHASHSEED"] = "0"  # SymPy's order of terms must not change a verdict
        # In a session of its own, Ctrl-C in the terminal reaches the parent alone.
        apart = (
            {"start_new_session": True}
            if os.name == "posix" else {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hybridrl_lib.rewards.math_check", str(self.memory_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            **apart)
        return self._exchange(None, START_LIMIT_SECONDS)

    def _exchange(self, request: dict | None, seconds: float) -> dict | None:
        """Sends `request` and waits for the reply; None if the process died or was killed."""
        from .math_check import read_message, write_message

        with self._lock:
            mine = self._deadline = object()
            self._expired = False
        idle_until = processor_seconds(self.process) + IDLE_SHARE * seconds
        timer = threading.Timer(seconds, self._expire, [mine, idle_until])
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                write_message(self.process.stdin, request)
            return read_message(self.process.stdout)
        except (OSError, ValueError):  # the pipe is broken, or the reply is not a message
            return None
        except BaseException:  # Ctrl-C: a late reply must not be taken for the next one
            self.stop()
            raise
        finally:
            with self._lock:
                self._deadline = None
            timer.cancel()

    def _expire(self, message: object, idle_until: float = 0.0) -> None:
        with self._lock:
            if self._deadline is message:
                self._expired = True
                self._held_up = processor_seconds(self.process) < idle_until
                self.kill()


def processor_seconds(process: subprocess.Popen[bytes] | None) -> float:
    """How long a process has computed; 0 if it is gone."""
    import psutil

    try:
        times = psutil.Process(process.pid).cpu_times()
    except (psutil.Error, AttributeError):
        return 0.0
    return times.user + times.system


class WorkerPool:
    """Workers that share each batch of questions."""

    def __init__(self, workers: int, time_limit: float) -> None:
        """Args: `workers` is their number; no process is started before the first question."""
        self.workers = [Worker(time_limit) for _ in range(workers)]

    @property
    def restarts(self) -> int:
        """How many processes have been replaced so far."""
        return sum(worker.restarts for worker in self.workers)

    def ask(self, questions: Sequence[tuple[str, str]]) -> list[str]:
        """The outcome of each (gold, answer), in order."""
        lanes = min(len(self.workers), len(questions))
        if lanes <= 1:
            return [self.workers[0].ask(*question) for question in questions]
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(len(questions)):
            waiting.put(place)
        outcomes = [""] * len(questions)
        given_up = threading.Event()

        def run_lane(worker: Worker) -> None:
            while not given_up.is_set():
                try:
                    place = waiting.get_nowait()
                except queue.Empty:
                    return
                outcomes[place] = worker.ask(*questions[place])

        with ThreadPoolExecutor(lanes) as executor:
            futures = [executor.submit(run_lane, worker) for worker in self.workers[:lanes]]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                given_up.set()
                for worker in self.workers:
                    worker.kill()
                raise
        return outcomes

    def close(self) -> None:
        """Ends all processes; a later question starts them again."""
        for worker in self.workers:
            worker.stop()

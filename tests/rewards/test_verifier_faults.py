"""The verifier survives answers made to break it, and whatever happens to its workers."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hybridrl_lib.rewards import math_check
from hybridrl_lib.rewards.verifier import Verifier
from hybridrl_lib.rewards.workers import Worker, WorkerPool
from hybridrl_lib.system.errors import UserError

ROOT = str(Path(__file__).resolve().parents[2])
HARMLESS = (r"\sqrt{2}", r"2^{1/2}")  # right, and takes a worker
ENDLESS = (r"9^{9^{9^9}}", r"(10^9)!", r"\binom{10^7}{5000000}")
MALFORMED = {"braces": r"\boxed{" + "{" * 50_000 + "}" * 50_000 + "}",
             "opened braces": r"\boxed{" + "{" * 100_000, "opened boxes": r"\boxed{" * 15_000,
             "nested boxes": r"\boxed{" * 15_000 + "5" + "}" * 15_000, "NUL": "\\boxed{5\0}",
             "surrogate": "\\boxed{\ud8005}", "undecodable": "\\boxed{5\ufffd}",
             "unclosed environment": r"\boxed{\begin{pmatrix} 1 & 2}", "unclosed box": r"\boxed{",
             "digits beyond Python's limit": r"\boxed{" + "9" * 5_000 + "}", "empty": r"\boxed{}"}


@pytest.fixture()
def worker():
    """A worker with a time limit that no honest answer comes near."""
    one = Worker(time_limit=60.0)
    yield one
    one.stop()


def test_malformed_answers_earn_nothing_at_once():
    """They are unparsable, are counted, and start no worker."""
    wrong = []
    with Verifier() as verifier:
        for name, text in MALFORMED.items():
            for gold in ("5", r"\sqrt{2}"):
                verdict = verifier.verify([gold], [text], [True])[0]
                if verdict.strict or verdict.lenient or verdict.reason != "unparsable":
                    wrong.append((name, gold, verdict))
        assert not wrong
        assert verifier.counts["unparsable"] == 2 * len(MALFORMED)
        assert all(worker.process is None for worker in verifier._pool.workers)
    with Verifier(time_limit=60.0) as verifier:
        text = r"\boxed{" + "9" * 1_900 + "}"
        assert [v.reason for v in verifier.verify(["5", r"\sqrt{2}"], [text] * 2, [True] * 2)] == [
            "wrong", "wrong"]


def test_endless_answers_are_cut_off_and_the_rest_is_judged():
    """Computations that no signal interrupts are killed and earn 0; the next answer is judged."""
    golds = ["5"] * len(ENDLESS) + [HARMLESS[0]]
    texts = [rf"\boxed{{{answer}}}" for answer in (*ENDLESS, HARMLESS[1])]
    with Verifier(workers=2, time_limit=3.0) as verifier:
        verdicts = verifier.verify(golds, texts, [True] * len(golds))
        assert [v.reason for v in verdicts] == ["time_out"] * len(ENDLESS) + ["right"]
        assert not any(v.lenient for v in verdicts[:-1])
        assert verifier.counts["time_out"] == len(ENDLESS)
        restarts = verifier.counts["worker_restarts"]
        assert restarts == len(ENDLESS)
        verifier.verify(golds, texts, [True] * len(golds))
        assert verifier.counts["worker_restarts"] == restarts  # remembered, not tried again


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS binds on Linux")
def test_memory_is_limited():
    """A worker cannot take the memory that the training needs."""
    done = run_python("-c", "from hybridrl_lib.rewards import math_check\n"
                      "math_check._limit_memory(300 << 20)\ntry: bytearray(1 << 30)\n"
                      "except MemoryError: print('refused')\n")
    assert done.stdout == "refused\n", done.stderr


def test_answer_that_breaks_its_worker(worker, monkeypatch):
    """Out of memory or stack: tried once more, then unparsable; the next answer is judged."""
    exchange = worker._exchange

    def die_of_it(request, seconds):
        if request is not None:
            worker.process.kill()
        return exchange(request, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "_exchange", die_of_it)
        assert worker.ask(*HARMLESS) == "unparsable"
    assert worker.restarts == 2
    assert worker.ask(*HARMLESS) == "right"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_worker_that_is_interrupted_or_killed(worker):
    """SIGINT and a late timer do nothing; after a kill an honest answer keeps its reward."""
    assert worker.ask(*HARMLESS) == "right"
    assert os.getsid(worker.process.pid) != os.getsid(0)
    os.kill(worker.process.pid, signal.SIGINT)
    assert worker.ask(*HARMLESS) == "right"
    worker._expire(object())  # the timer of an answer that has arrived
    assert worker.process.poll() is None and worker.restarts == 0
    worker.process.kill()
    worker.process.wait()
    assert worker.ask(*HARMLESS) == "right"
    assert worker.restarts == 1


def test_worker_killed_while_it_starts_is_replaced(worker, monkeypatch):
    """A run continues even if something killed a worker before it was ready."""
    exchange, killed = worker._exchange, []

    def die_at_first(request, seconds):
        if not killed:
            killed.append(worker.process.kill())
        return exchange(request, seconds)

    monkeypatch.setattr(worker, "_exchange", die_at_first)
    assert worker.ask(*HARMLESS) == "right"
    assert worker.restarts == 1


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_worker_that_hangs_is_replaced(worker, monkeypatch):
    """An honest answer keeps its reward even if its worker was stopped from outside."""
    assert worker.ask(*HARMLESS) == "right"
    exchange = worker._exchange

    def patient(request, seconds):
        worker.time_limit = 60.0  # for the worker that takes over
        return exchange(request, seconds)

    monkeypatch.setattr(worker, "_exchange", patient)
    os.kill(worker.process.pid, signal.SIGSTOP)
    worker.time_limit = 0.3
    assert worker.ask(*HARMLESS) == "right"
    assert worker.restarts == 1


def test_interrupted_wait_leaves_no_stale_reply(worker, monkeypatch):
    """After Ctrl-C while waiting for a reply, that reply is not taken for the next answer's."""
    assert worker.ask(*HARMLESS) == "right"

    def interrupted(stream):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(math_check, "read_message", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.ask(r"\sqrt{2}", "3")
    assert worker.process is None
    assert worker.ask(*HARMLESS) == "right"


def test_batch_uses_all_workers_in_order():
    """Many answers are judged by several workers and returned in order."""
    questions = [(rf"\sqrt{{{n}}}", rf"{m}^{{1/2}}") for n in (2, 3, 5) for m in (2, 3, 5)]
    pool = WorkerPool(3, time_limit=60.0)
    try:
        expected = ["right" if n == m else "wrong" for n in (2, 3, 5) for m in (2, 3, 5)]
        assert pool.ask(questions) == expected
        assert sum(worker.process is not None for worker in pool.workers) == 3
    finally:
        pool.close()


def test_works_from_threads():
    """Several threads may share a verifier, none of them the main thread."""
    def is_right(n):
        return verifier.verify([rf"\sqrt{{{n}}}"], [rf"\boxed{{{n}^{{1/2}}}}"], [True])[0].strict

    with Verifier(workers=2, time_limit=60.0) as verifier, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, (2, 3, 5, 7)))


def run_python(*words, **more):
    """A fresh interpreter that can import the library."""
    return subprocess.run([sys.executable, *words], env={**os.environ, "PYTHONPATH": ROOT},
                          capture_output=True, text=True, timeout=300, **more)


def test_script_without_main_guard_and_without_close(tmp_path):
    """As in a notebook: nothing is imported again, and the workers end with the program."""
    script = tmp_path / "script.py"
    script.write_text(
        "from hybridrl_lib import Verifier\nprint('started')\n"
        "verifier = Verifier(workers=2, time_limit=60)\n"
        r"texts = [r'\boxed{2^{1/2}}', r'\boxed{3^{1/2}}']" "\n"
        r"found = verifier.verify([r'\sqrt{2}'] * 2, texts, [True] * 2)" "\n"
        "print([v.strict for v in found], [w.process.pid for w in verifier._pool.workers])\n")
    done = run_python(str(script), cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first == "started" and second.startswith("[True, False]")
    for pid in eval(second.partition("] ")[2]):
        if os.name == "posix":
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_a_missing_checker_is_an_error(monkeypatch):
    """Without math-verify, the first answer that needs it ends the run with an error."""
    monkeypatch.setenv("PYTHONHOME", os.path.join(ROOT, "no-such-folder"))
    with Verifier() as verifier, pytest.raises(UserError, match="math-verify"):
        verifier.verify([HARMLESS[0]], [rf"\boxed{{{HARMLESS[1]}}}"], [True])

"""The faults: each hits a trial's run at a random moment and leaves the rest to the trial."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hybridrl_lib.records.run_folder import LOGS
from hybridrl_lib.training.checkpoints import Checkpoints

from .moments import Moments
from .power import Recorder, rebuild
from .runs import Child, Trial

TMPFS_LARGE = "200m"
YEARS = 10 * 365 * 24 * 3600.0


def strike_by_signal(trial: Trial, number: signal.Signals,
                     prepare: Callable[[], None] = lambda: None) -> Child:
    """A run that gets a signal: before a random operation on its folder, or at a random time."""
    by_moment = trial.chance.random() < 0.5
    at = trial.chance.randint(1, trial.reference.moments)

    def begin() -> None:
        prepare()
        if by_moment:
            sent = []

            def send() -> None:
                if not sent:
                    sent.append(os.kill(os.getpid(), number))

            Moments(trial.results, at, send)

    child = trial.start(begin)
    if not by_moment:
        time.sleep(trial.some_seconds())
        child.signal(number)
    trial.was_hit |= child.wait() != 0
    return child


def killed(trial: Trial) -> None:
    """SIGKILL, once to three times in a row."""
    for _ in range(trial.chance.randint(1, 3)):
        strike_by_signal(trial, signal.SIGKILL)
        trial.look()


def terminated(trial: Trial) -> None:
    """SIGTERM, as schedulers send it."""
    child = strike_by_signal(trial, signal.SIGTERM)
    if child.wait() > 0:
        trial.check_end(child)
    trial.look()


def interrupted(trial: Trial) -> None:
    """Ctrl-C, and sometimes a second one shortly after."""
    if trial.chance.random() < 0.7:
        child = strike_by_signal(trial, signal.SIGINT)
    else:
        child = trial.start()
        time.sleep(trial.some_seconds())
        child.signal(signal.SIGINT)
        time.sleep(trial.chance.uniform(0, 0.1))
        child.signal(signal.SIGINT)
    trial.check_end(child)
    trial.look()


def power_cut(trial: Trial) -> None:
    """A kill, after which what was not synced is taken back; then perhaps a second one."""
    for number in range(trial.chance.randint(1, 2)):
        store = trial.folder / f"synced-{number}"
        store.mkdir()
        trial.results.mkdir(exist_ok=True)
        strike_by_signal(trial, signal.SIGKILL, lambda store=store: Recorder(
            trial.results, store).begin())
        rebuild(trial.results, store, trial.chance if trial.chance.random() < 0.7 else None)
        trial.look()


def failing_operations(trial: Trial, number: int) -> None:
    """From a random operation on, every one that changes the folder fails."""
    at = trial.chance.randint(1, trial.reference.changes)

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    trial.check_end(trial.start(lambda: Moments(trial.results, at, fail, changes_only=True)))


def full_disk(trial: Trial) -> None:
    """No space: a small tmpfs, a limit on the size of files, or an error at some operation."""
    way = trial.chance.choice(("tmpfs", "limit", "error") if trial.may_mount else
                              ("limit", "error"))
    if way == "error":
        failing_operations(trial, trial.chance.choice((errno.ENOSPC, errno.EDQUOT)))
    elif way == "limit":
        # The largest file has about 5 MB; what is printed, to a file too, has less than 4 kB.
        size = int(10 ** trial.chance.uniform(3.6, 6.9))
        trial.check_end(trial.start(
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))))
    else:
        trial.results.mkdir()
        size = int(10 ** trial.chance.uniform(4.3, 7.4))
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", trial.results)
        trial.unmount.append(trial.results)
        trial.check_end(trial.start())
        trial.look()
        mount("-o", f"remount,size={TMPFS_LARGE}", trial.results)
    trial.look()


def read_only(trial: Trial) -> None:
    """The folder becomes read-only, from the start or in the middle: a mount, or errors."""
    if not trial.may_mount or trial.chance.random() < 0.4:
        failing_operations(trial, trial.chance.choice((errno.EROFS, errno.EACCES)))
        trial.look()
        return
    trial.results.mkdir()
    mount("--bind", trial.results, trial.results)
    trial.unmount.append(trial.results)
    if trial.chance.random() < 0.3:
        mount("-o", "remount,ro,bind", trial.results)
        child = trial.start()
    else:
        child = trial.start()
        time.sleep(trial.some_seconds())
        while not mount("-o", "remount,ro,bind", trial.results, must=False):
            time.sleep(0.01)  # a file is open for writing
    trial.check_end(child)
    trial.look()
    mount("-o", "remount,rw,bind", trial.results)


def mount(*words, must: bool = True) -> bool:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0 or not must, done.stderr
    return done.returncode == 0


def damaged_files(trial: Trial) -> None:
    """After a kill, files of checkpoints and logs are cut off, changed, emptied or taken away."""
    strike_by_signal(trial, signal.SIGKILL)
    trial.look()
    if trial.run.is_complete:
        return
    for _ in range(trial.chance.randint(1, 3)):
        paths = [trial.run.path / name for name in LOGS]
        paths += [path for _, folder in Checkpoints(trial.run).found()
                  for path in sorted(folder.iterdir())]
        paths = [path for path in paths if path.exists() and path.stat().st_size]
        if paths:
            damage(trial.chance.choice(paths), trial.chance)
            trial.was_hit = True
    trial.look(promises_hold=False)


def damage(path: Path, chance) -> None:
    """Does to a file what disks and hands do."""
    content, way = bytearray(path.read_bytes()), chance.choice(("cut", "flip", "zero", "remove"))
    place = chance.randrange(len(content))
    if way == "remove":
        path.unlink()
        return
    if way == "cut":
        del content[place:]
    elif way == "flip":
        content[place] ^= 1 << chance.randrange(8)
    else:
        content[place:place + 4096] = bytes(len(content[place:place + 4096]))
    path.write_bytes(content)


def two_processes(trial: Trial) -> None:
    """Two at once, and sometimes the first is killed: the other is refused, or reads the result."""
    first = trial.start()
    if trial.chance.random() < 0.7:
        time.sleep(trial.some_seconds())
    second = trial.start()
    if trial.chance.random() < 0.5:
        time.sleep(trial.some_seconds() / 2)
        first.signal(signal.SIGKILL)
    codes = [first.wait(), second.wait()]
    trial.was_hit |= codes != [0, 0]
    for child in (first, second):
        if child.wait() > 0:
            trial.check_end(child)
            if not any(str(one.pid) in child.output.read_text() for one in (first, second)):
                trial.lost("a process was refused for another reason than the other one")
    if all(code > 0 for code in codes):
        trial.lost("two processes refused each other")
    trial.look()


def clock_jumps(trial: Trial) -> None:
    """The clock jumps by years at every look, files get any date, and the run is killed."""
    def jump() -> None:
        chance = trial.chance
        time.time = lambda: max(0.0, 1.7e9 + chance.uniform(-YEARS, YEARS))
        time.time_ns = lambda: int(time.time() * 1e9)

    for _ in range(2):
        strike_by_signal(trial, signal.SIGKILL, jump)
        for path in sorted(trial.results.rglob("*")):
            moment = 1.7e9 + trial.chance.uniform(-YEARS, YEARS)
            os.utime(path, (moment, moment))
        trial.look()
    child = trial.start(jump)
    trial.check_end(child)


def verifier_faults(trial: Trial) -> None:
    """Every answer goes through a worker process, and one of these is killed or stopped."""
    def use_workers() -> None:
        from hybridrl_lib.rewards import verifier, workers

        verifier.decide = lambda gold, answer: None
        workers.START_LIMIT_SECONDS = 20.0

    child = trial.start(use_workers)
    number = trial.chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
    struck = False
    while not child.has_ended():
        time.sleep(trial.chance.uniform(0.02, 0.5))
        workers = workers_of(child.pid)
        if workers and not struck and trial.chance.random() < 0.4:
            struck = True
            os.kill(workers[0], number)
    trial.check_end(child)
    trial.was_hit = struck
    if child.wait():
        trial.lost("a run that a verifier's worker has stopped")
    trial.look()


def workers_of(pid: int) -> list[int]:
    """Process numbers of a run's verifier workers."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children()
                if any("math_check" in word for word in child.cmdline())]
    return []


def kernel_restarts(trial: Trial) -> None:
    """A notebook's kernel is restarted in the middle, and the notebook run from the top."""
    from .notebooks import run_in_kernel

    code = run_in_kernel(trial)
    if code:
        trial.lost("a notebook that does not run again")
    trial.look()


def papermill_killed(trial: Trial) -> None:
    """papermill is killed, or its kernel, and papermill started again until it is through."""
    from .notebooks import start_papermill, wait_for_papermill

    process = start_papermill(trial, "first")
    begun = wait_for_papermill(trial, process)
    time.sleep(0.7 * trial.some_seconds() if begun else 0)
    victims = [process.pid]
    if trial.chance.random() < 0.5:
        from hybridrl_lib.experiments.process import kernels_of

        victims = kernels_of(process) or victims
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    trial.was_hit = process.wait() != 0
    trial.look()
    for number in range(5):  # the kernel that papermill has left behind may take a second to end
        if start_papermill(trial, str(number)).wait() == 0:
            break
        time.sleep(0.5)
    else:
        trial.lost("papermill does not go on")
    trial.look()


KINDS: dict[str, Callable[[Trial], None]] = {
    "SIGKILL": killed, "SIGTERM": terminated, "Ctrl-C": interrupted, "power cut": power_cut,
    "disk full": full_disk, "read-only": read_only, "damaged files": damaged_files,
    "two processes": two_processes, "clock jumps": clock_jumps, "verifier": verifier_faults,
    "kernel restart": kernel_restarts, "papermill": papermill_killed}


NOTEBOOKS = ("kernel restart", "papermill")


@contextlib.contextmanager
def cleaned_up(trial: Trial) -> Iterator[None]:
    """Takes away the trial's mounts and files behind it, unless it lost something."""
    try:
        yield
    finally:
        for place in trial.unmount:
            subprocess.run(["umount", "--lazy", str(place)], capture_output=True)
        if not trial.losses:
            shutil.rmtree(trial.folder, ignore_errors=True)

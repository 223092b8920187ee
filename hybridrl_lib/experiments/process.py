"""Starts the process of a job on this machine, and stops it."""

import os
import signal
import subprocess

from .jobs import Job, Start


class JobProcess(subprocess.Popen):
    """The process of a job on this machine."""

    def interrupt(self) -> None:
        """Asks the kernels in it, or the run itself, to stop after the current step."""
        kernels = kernels_of(self)
        for kernel in kernels:
            signal_quietly(kernel, signal.SIGINT)
        if not kernels:  # a run, or a notebook whose kernel has not started yet
            self.terminate()

    def end(self) -> None:
        """Kills it with all its processes."""
        import psutil

        try:
            family = psutil.Process(self.pid).children(recursive=True)
        except psutil.Error:
            family = []
        for number in (self.pid, *(child.pid for child in family)):
            signal_quietly(number, signal.SIGKILL)
        self.wait()


def start_here(gpus: int) -> Start:
    """A function that starts jobs on this machine.

    A process gets its own session, so Ctrl-C in the terminal reaches only this process, which then
    asks each kernel to finish its step. papermill itself would kill the kernel.
    """
    def start(job: Job, environment: dict[str, str], slot: int) -> JobProcess:
        if gpus > 1:
            visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            environment = environment | {"CUDA_VISIBLE_DEVICES": visible.split(",")[slot % gpus]}
        with job.log.open("wb") as log:
            return JobProcess(job.command, cwd=job.folder, env=environment, stdout=log,
                              stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                              start_new_session=True)

    return start


def kernels_of(process: subprocess.Popen) -> list[int]:
    """The process ids of the kernels that a papermill process has started."""
    import psutil

    try:
        return [child.pid for child in psutil.Process(process.pid).children()
                if any("ipykernel" in word for word in child.cmdline())]
    except psutil.Error:  # it has just ended
        return []


def signal_quietly(number: int, what: signal.Signals) -> None:
    """Sends a signal to a process that may have ended already."""
    try:
        os.kill(number, what)
    except ProcessLookupError:
        pass

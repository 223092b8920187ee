"""The local process of a job."""

import os
import signal
import subprocess


class JobProcess(subprocess.Popen):
    """The process of a job on this machine."""

    def interrupt(self) -> None:
        """Asks every kernel in it, or the run that it is, to stop after its step."""
        kernels = kernels_of(self)
        for kernel in kernels:
            signal_quietly(kernel, signal.SIGINT)
        if not kernels:  # a run, or nothing is under way yet
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


def kernels_of(process: subprocess.Popen) -> list[int]:
    """The process numbers of the kernels that a papermill process has started."""
    import psutil

    try:
        return [child.pid for child in psutil.Process(process.pid).children()
                if any("ipykernel" in word for word in child.cmdline())]
    except psutil.Error:  # it has just ended
        return []


def signal_quietly(number: int, what: signal.Signals) -> None:
    try:
        os.kill(number, what)
    except ProcessLookupError:
        pass

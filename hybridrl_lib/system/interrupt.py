"""Ctrl-C as a request: the step is finished and the checkpoint written before the run stops."""

import signal
import threading


class Interrupt:
    """While open, the first Ctrl-C (or SIGTERM) sets `asked`; a second one stops at once.

    Outside the main thread signals cannot be caught, and nothing changes.
    """

    def __init__(self):
        self.asked = False
        self._previous: dict[int, object] = {}

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

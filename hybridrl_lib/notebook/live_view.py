"""The live view of a run: curves and a few completions, or plain lines without an audience."""

import time

from IPython.display import display

from ..system.errors import printable
from ..training.observer import Lines, Observer
from .answers import completions_table
from .curves import draw_live, png
from .place import is_headless
from .tables import escaped

MOST_SHARE_OF_TIME = 0.05  # share of the time that drawing may take
COMPLETIONS = 4


def live(setup: str) -> Observer:
    """The observer of a run: the live view, or plain lines if nobody watches."""
    return Lines(name=setup) if is_headless() else LiveRun(setup)


class LiveRun(Observer):
    """Redraws its curves and completions every few seconds, in place.

    Args:
        setup: prefix of its lines.
        seconds: minimum time between drawings; longer if drawing is slow.
        show: puts something on the page and returns a handle (`IPython.display.display`).
    """

    def __init__(self, setup: str, seconds: float = 3.0, show=display):
        self.setup, self.seconds, self.show = printable(setup), seconds, show
        self.metrics: list[dict] = []
        self.probe: list[dict] = []
        self.samples: list[dict] = []
        self.warnings: dict[str, str] = {}  # that hold now
        self.status = ""
        self.lines = Lines(0.0, self.setup, write=self._set_status)
        self.picture = self.page = None
        self.due = 0.0

    def _set_status(self, line: str) -> None:
        self.status = printable(line)

    def note(self, sentence: str) -> None:
        print(f"{self.setup}: {printable(sentence)}", flush=True)

    def on_warning(self, name: str, sentence: str) -> None:
        self.warnings[name] = sentence
        self.note(f"warning {name} at {sentence}")  # this line stays when the warning ends

    def on_step(self, row: dict, total: int) -> None:
        self.metrics.append(row)
        held = row.get("warnings", ())
        self.warnings = {name: text for name, text in self.warnings.items() if name in held}
        self.lines.on_step(row, total)
        if row["step"] == total:
            self.status = f"{self.setup}: training is over after {total} steps"
        if row["step"] == total or time.monotonic() >= self.due:
            self.draw()

    def on_probe(self, row: dict) -> None:
        self.probe.append(row)

    def on_sample(self, row: dict) -> None:
        self.samples = [*self.samples, row][-COMPLETIONS:]

    def draw(self) -> None:
        """Shows the newest curves and completions."""
        began = time.monotonic()
        try:
            self._put("picture", {"image/png": png(draw_live(self.metrics, self.probe)),
                                  "text/plain": self.status})
            self._put("page", {"text/html": self.html(), "text/plain": self.status})
        except Exception as error:  # drawing must never end a run
            self.note(f"the live view failed ({error!r}) and is off; training continues")
            self.due = float("inf")
            return
        now = time.monotonic()
        self.due = now + max(self.seconds, (now - began) / MOST_SHARE_OF_TIME)

    def html(self) -> str:
        """The state of the run, its active warnings, and its newest completions, as HTML."""
        page = f"<p>{escaped(self.status)}</p>" + "".join(
            f"<p><b>{escaped(name)}</b> since {escaped(text)}</p>"
            for name, text in self.warnings.items())
        return page + (completions_table(self.samples) if self.samples else "")

    def _put(self, name: str, bundle: dict) -> None:
        handle = getattr(self, name)
        if handle is None:
            setattr(self, name, self.show(bundle, raw=True, display_id=True))
        else:
            handle.update(bundle, raw=True)

"""What a run reports during training, and how long it took."""

import time


class Observer:
    """Receives the events of a run. This one ignores them; subclasses show them."""

    def note(self, sentence: str) -> None: ...

    def on_step(self, row: dict, total: int) -> None: ...

    def on_warning(self, name: str, sentence: str) -> None: ...

    def on_probe(self, row: dict) -> None: ...

    def on_validation(self, row: dict) -> None: ...

    def on_sample(self, row: dict) -> None: ...


class Lines(Observer):
    """Plain lines for logs and notebooks.

    Args:
        seconds: minimum time between two lines of progress.
        name: prefix of every line.
        write: receives a line.
    """

    def __init__(self, seconds: float = 15.0, name: str = "", write=None):
        self.seconds, self.name = seconds, name
        self.write = write or (lambda line: print(line, flush=True))
        self.began = self.last = time.monotonic()
        self.first_step: int | None = None

    def note(self, sentence: str) -> None:
        self.write(f"{self.name}: {sentence}" if self.name else sentence)

    def on_step(self, row: dict, total: int) -> None:
        now, step = time.monotonic(), row["step"]
        if self.first_step is None:
            self.first_step = step - 1
        if now - self.last < self.seconds and step != total:
            return
        self.last = now
        left = (now - self.began) / max(1, step - self.first_step) * (total - step)
        facts = [f"step {step}/{total} ({row['stage']}, epoch {row['epoch']:.1f})"]
        if "reward" in row:
            facts.append(f"reward {row['reward']:.2f}")
            facts.append(f"groups without signal {row['frac_reward_zero_std']:.0%}")
        if "loss/sft" in row:
            facts.append(f"SFT loss {row['loss/sft']:.3f}")
        if row.get("entropy") is not None:
            facts.append(f"entropy {row['entropy']:.2f}")
        facts.append(f"gradient norm {row['grad_norm']:.2f}" if "grad_norm" in row else
                     "gradient not finite")
        facts.append(f"about {duration(left)} left")
        self.note(", ".join(facts))

    def on_warning(self, name: str, sentence: str) -> None:
        self.note(f"warning {name} at {sentence}")

    def on_validation(self, row: dict) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.note(f"validation after epoch {row['epoch']:.0f}: exact match "
                      f"{row['strict']:.1%}, token loss {row['loss']:.3f}")


class Stopwatch:
    """Wall-clock and processor seconds of a run, over all processes that worked on it.

    Work that was lost after the last checkpoint is not included.
    """

    def __init__(self):
        self._began = time.monotonic(), time.process_time()
        self._before = (0.0, 0.0)

    def read(self) -> list[float]:
        """[wall, processor] so far."""
        now = time.monotonic(), time.process_time()
        return [round(earlier + moment - began, 2) for earlier, moment, began
                in zip(self._before, now, self._began, strict=True)]

    def resume_from(self, before: list[float]) -> None:
        """Adds the reading that is in the checkpoint being resumed."""
        self._before = tuple(before)


def duration(seconds: float) -> str:
    """A duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

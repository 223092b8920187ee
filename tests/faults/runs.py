"""Runs as processes, what they leave, and how that is compared."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from hybridrl_lib.records.run_folder import LOGS, RunFolder
from hybridrl_lib.training.checkpoints import Checkpoints
from hybridrl_lib.training.trainer import Trainer

EXPERIMENT = "tiny-smoke"
SETTINGS = ("training.checkpoint_every=2", "verifier.time_limit=4")
TRIES = 8
BROKEN = 70  # the exit code of a process that ended in a traceback


@dataclass(frozen=True)
class Command:
    """A kind of run: its name for people, its setup, its settings and its notebook."""

    name: str
    setup: str
    notebook: str
    settings: tuple[str, ...] = SETTINGS

    @property
    def words(self) -> list[str]:
        return ["run", self.setup, "--set", *self.settings]

    def folder(self, results: Path) -> RunFolder:
        return RunFolder(results / EXPERIMENT / self.setup / "seed-0")


COMMANDS = (Command("SFT", "sft", "10_sft"), Command("RL", "rl", "11_rl"),
            Command("hybrid", "sft_then_rl_entropy", "15_sft_then_rl_entropy"),
            Command("adapter", "sft_then_rl_entropy", "15_sft_then_rl_entropy",
                    (*SETTINGS, "model.adapter=lora")))


@dataclass
class Child:
    """A forked run."""

    pid: int
    output: Path
    code: int | None = None

    def wait(self) -> int:
        """The exit code; minus the signal's number if one ended it."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def has_ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def signal(self, number: signal.Signals) -> None:
        if not self.has_ended():
            os.kill(self.pid, number)

    def complaint(self) -> str:
        """What was wrong with its end: a traceback, or a failure without its one sentence."""
        text = self.output.read_text(errors="replace")
        sentences = [line for line in text.splitlines() if line.startswith("hybridrl: ")]
        if self.wait() == BROKEN or "Traceback" in text:
            return "a traceback: " + text.strip().splitlines()[-1]
        if self.code > 0 and len(sentences) != 1:
            return f"exit code {self.code} with {len(sentences)} sentences"
        return ""


def start(command: Command, results: Path, prepare: Callable[[], None] = lambda: None,
          body: Callable[[], int] | None = None) -> Child:
    """Forks a process that runs a command into a results folder."""
    results.mkdir(parents=True, exist_ok=True)
    output = results.parent / f"output-{time.monotonic_ns()}.txt"
    sys.stdout.flush()
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until the child is ready for them
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return Child(pid, output)
    code = BROKEN
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        number = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(number, 1)
        os.dup2(number, 2)
        os.environ["HYBRIDRL_RESULTS_DIR"] = str(results)
        from hybridrl_lib.cli import main

        prepare()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        code = body() if body else main(command.words)
    except KeyboardInterrupt:  # outside of the command
        code = 130
        print("hybridrl: stopped before it began")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)


def keep_promises(place: Path) -> None:
    """In a run's process: notes each checkpoint and manifest as soon as it was written."""
    save, write = Checkpoints.save, RunFolder.write

    def note(line: str) -> None:
        with place.open("a") as stream:
            stream.write(line + "\n")

    def noted_save(self, step, fill):
        save(self, step, fill)
        note(str(step))

    def noted_write(self, name, value):
        write(self, name, value)
        if name == "manifest.json":
            note("complete")

    Checkpoints.save, RunFolder.write = noted_save, noted_write


def without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith("seconds")}


def record(folder: RunFolder) -> dict:
    """All that must repeat: answers and weights as bytes, logs and manifest without times."""
    manifest = folder.read("manifest.json") or {}
    final = folder.path / "checkpoint" / "final"
    verdicts = {name: number for name, number in manifest.get("verdicts", {}).items()
                if name != "worker_restarts"}
    return {
        **{name: [without_times(row) for row in folder.lines(name)] for name in LOGS},
        "eval.jsonl": (folder.path / "eval.jsonl").read_bytes(),
        "weights": {path.name: path.read_bytes() for path in final.glob("*.safetensors")},
        "manifest.json": {**{name: manifest.get(name) for name in (
            "setup", "seed", "steps", "tokens", "best_on_validation", "model", "data",
            "complete")}, "verdicts": verdicts},
        "files": sorted(path.name for path in folder.path.iterdir() if is_read(path.name))}


def is_read(name: str) -> bool:
    """Whether any reader uses a file: not locks and partial files that a kill leaves."""
    return not name.endswith((".lock", ".tmp"))


def difference(kept: dict, found: dict) -> str:
    """What of two records differs; empty if nothing."""
    return ", ".join(name for name in kept if kept[name] != found[name])


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file() and is_read(path.name)}


@dataclass
class Reference:
    """What an uninterrupted run left, and how long it took."""

    record: dict
    weights: dict[int, bytes]
    moments: int
    changes: int
    seconds: float


def make_reference(command: Command, folder: Path) -> Reference:
    """Runs a command without faults."""
    from .moments import Moments

    results, kept = folder / "runs", folder / "kept"
    kept.mkdir(parents=True)

    def watched() -> int:
        from hybridrl_lib.cli import main

        after_step = Trainer._after_step

        def keep(self, *arguments, **more):
            after_step(self, *arguments, **more)
            save_file(self.copy_of_weights(), kept / str(self.step))

        Trainer._after_step = keep
        moments = Moments(results, 1, lambda: None)
        code = main(command.words)
        (folder / "counts").write_text(f"{moments.count} {moments.changes}")
        return code

    began = time.monotonic()
    child = start(command, results, body=watched)
    assert child.wait() == 0, child.output.read_text()
    seconds = time.monotonic() - began
    moments, changes = map(int, (folder / "counts").read_text().split())
    return Reference(record(command.folder(results)), {
        int(path.name): path.read_bytes() for path in kept.iterdir()}, moments, changes, seconds)


class Trial:
    """One run under one fault: its folder, its processes, and what was found lost."""

    def __init__(self, command: Command, reference: Reference, folder: Path, chance):
        self.command, self.reference, self.folder = command, reference, folder
        self.chance, self.results = chance, folder / "runs"
        self.run = command.folder(self.results)
        self.losses: list[str] = []
        self.was_hit = False
        self.finished: dict[str, bytes] | None = None
        self.promises = folder / "promises"
        folder.mkdir(parents=True)

    def start(self, prepare: Callable[[], None] = lambda: None) -> Child:
        """Starts the command, with its promises noted."""
        def begin() -> None:
            keep_promises(self.promises)
            prepare()

        return start(self.command, self.results, begin)

    def some_seconds(self) -> float:
        """A random time within a run."""
        return self.chance.uniform(0, 1.05) * self.reference.seconds

    def lost(self, sentence: str) -> None:
        self.losses.append(sentence)

    def check_end(self, child: Child) -> None:
        """A process that was not killed must have succeeded, or failed with one sentence."""
        self.was_hit |= child.wait() != 0
        if child.complaint():
            self.lost(child.complaint())

    def look(self, promises_hold: bool = True) -> None:
        """After a fault: what exists is complete, and what was written is still there."""
        try:
            complete = self.run.is_complete
        except Exception as error:
            self.lost(f"manifest.json: {error}")
            return
        if complete:
            self.check_finished()
        elif self.finished:
            self.lost("a finished result is gone")
        answers = self.run.path / "eval.jsonl"
        if answers.exists() and answers.read_bytes() != self.reference.record["eval.jsonl"]:
            self.lost("half of eval.jsonl")
        whole = []
        checkpoints = Checkpoints(self.run)
        for step, folder in checkpoints.found():
            if not checkpoints._fault(folder):
                whole.append(step)
                kept = (folder / "weights.safetensors").read_bytes()
                if kept != self.reference.weights[step]:
                    self.lost(f"a checkpoint of step {step} that reads as whole and is not")
        if promises_hold and not complete and self.promises.exists():
            promised = self.promises.read_text().split()
            if "complete" in promised:
                self.lost("a manifest that had been written")
            elif max(whole, default=0) < max(map(int, promised)):
                self.lost(f"the checkpoint of step {max(map(int, promised))}, which had been "
                          f"written (there are {whole})")

    def check_finished(self) -> None:
        """The record of a finished run is that of the uninterrupted one, and never changes."""
        different = difference(self.reference.record, record(self.run))
        if different:
            self.lost(f"another result: {different}")
        now = {name: content for name, content in file_bytes(self.run.path).items()
               if not name.startswith("checkpoint/step-")}
        if self.finished is not None and now != self.finished:
            names = [name for name in {*now, *self.finished}
                     if now.get(name) != self.finished.get(name)]
            self.lost(f"a finished result was changed: {', '.join(sorted(names))}")
        self.finished = now

    def finish(self) -> None:
        """Repeats the command until the run is complete, then once more, which changes nothing."""
        for _ in range(TRIES):
            child = start(self.command, self.results)
            if child.wait() == 0:
                break
            time.sleep(0.5)
        else:
            self.lost(f"not complete after {TRIES} tries: "
                      + child.output.read_text(errors="replace").strip()[-300:])
            return
        self.check_finished()
        if start(self.command, self.results).wait():
            self.lost("a finished run cannot be read")
        if Checkpoints(self.run).left_over():
            self.lost("what only an unfinished run needs is left over")
        self.check_finished()

    def report(self) -> str:
        return json.dumps({"command": self.command.name, "hit": self.was_hit, "lost": self.losses})

"""Many trials, and their summary."""

import itertools
import random
import time
from pathlib import Path

import hybridrl_lib.experiments.run  # noqa: F401  once, for all processes that are forked
from hybridrl_lib.training.observer import duration

from .kinds import KINDS, NOTEBOOKS, cleaned_up
from .runs import COMMANDS, Command, Trial, make_reference


def run_trials(folder: Path, trials: int, seed: int, only: list[str], each_once: bool,
               may_mount: bool) -> int:
    """Runs trials of all kinds in turn and prints their outcome."""
    began = time.monotonic()
    plan = make_plan(only or list(KINDS), trials, each_once)
    count = len(plan)
    references = {}
    for command in COMMANDS:
        if any(one == command for _, one in plan):
            references[command] = make_reference(command, folder / f"reference-{command.name}")
    print(f"{len(references)} undisturbed runs in {duration(time.monotonic() - began)}; "
          + ("mounts" if may_mount else "no mounts: full disks and read-only folders are limits "
             "and errors"), flush=True)
    done = []
    for number, (kind, command) in enumerate(plan):
        trial = Trial(command, references[command], folder / f"trial-{number:04d}",
                      random.Random(f"{seed}/{number}/{kind}"))
        trial.may_mount, trial.unmount = may_mount, []
        with cleaned_up(trial):
            try:
                KINDS[kind](trial)
                trial.finish()
            except Exception as error:  # the trial's own, or a reader that did not expect the fault
                trial.lost(f"{type(error).__name__}: {error}")
        done.append((kind, trial))
        if trial.losses or (number + 1) % 10 == 0:
            print(f"{number + 1}/{count} after {duration(time.monotonic() - began)}: {kind}, "
                  f"{command.name}: " + ("; ".join(trial.losses) or "survived"), flush=True)
    return summary(done, time.monotonic() - began)


def make_plan(kinds: list[str], trials: int, each_once: bool) -> list[tuple[str, Command]]:
    """(kind, command) of every trial; notebooks, which take longest, come in every third round."""
    count = len(kinds) if each_once else trials
    turns = itertools.chain.from_iterable(
        [kind for kind in kinds if number % 3 == 0 or kind not in NOTEBOOKS]
        for number in itertools.count())
    used = dict.fromkeys(kinds, 0)
    plan = []
    for kind in itertools.islice(turns, count):
        place = kinds.index(kind) + used[kind]
        plan.append((kind, COMMANDS[place % len(COMMANDS)]))
        used[kind] += 1
    return plan


def summary(done: list[tuple[str, Trial]], seconds: float) -> int:
    """Prints trials, how many were hit before their end, and what was lost, by kind."""
    print(f"\n{'fault':16} {'trials':>6} {'hit':>4} {'survived':>8}  by run")
    for kind in dict.fromkeys(kind for kind, _ in done):
        mine = [trial for name, trial in done if name == kind]
        runs = [trial.command.name for trial in mine]
        print(f"{kind:16} {len(mine):6} {sum(t.was_hit for t in mine):4} "
              f"{sum(not t.losses for t in mine):8}  "
              + ", ".join(f"{name} {runs.count(name)}" for name in dict.fromkeys(runs)))
    lost = [(kind, trial) for kind, trial in done if trial.losses]
    print(f"{'all':16} {len(done):6} {sum(t.was_hit for _, t in done):4} {len(done) - len(lost):8}"
          f"  in {duration(seconds)}")
    print("lost: " + ("nothing" if not lost else ""))
    for kind, trial in lost:
        print(f"  {kind}, {trial.command.name} ({trial.folder.name}): {'; '.join(trial.losses)}")
    return 1 if lost else 0

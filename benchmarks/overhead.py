"""What a method adds to a step of the plain loop besides its own passes through the model.

Steps of every method and of SFT, then RL are taken on the same problems, in processor time. Time in
passes through the model (sampling, scores, gradients) and in the verifier is left out: what remains
is the loop's and the method's own code, its optimizers and what it puts into the losses included.
The overhead is how much more of it a method's median step has than the plain loop's median step of
the same stage, over that whole step. See README.md in this folder.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from common import add_threads_and_json, finish, machine, positive_number, print_table, run

from hybridrl_lib.config.presets import get_setup, load_settings
from hybridrl_lib.experiments.compare import choose_arms
from hybridrl_lib.learning.learner import Learner
from hybridrl_lib.learning.update import Totals, Update
from hybridrl_lib.methods.registry import make_method
from hybridrl_lib.policy import sampling as rollouts
from hybridrl_lib.policy.loading import load_policy
from hybridrl_lib.policy.policy import Policy
from hybridrl_lib.problems.splits import load_parts
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.rewards.verifier import Verifier
from hybridrl_lib.setups import SETUPS, Setup
from hybridrl_lib.training.observer import Observer
from hybridrl_lib.training.trainer import Trainer

PLAIN = "sft_then_rl"
# Nothing between the steps: no probe, validation or checkpoint but those at the ends.
QUIET = ("probe.every=1000000", "probe.prompts=1", "probe.samples=2", "data.validation_limits=1,1",
         "training.validate_every=1000000", "training.checkpoint_every=1000000")


class Passes:
    """Processor seconds inside the functions that stand for the model; calls within calls once."""

    def __init__(self):
        self.seconds, self.inside, self.since = 0.0, False, 0.0

    def _turn(self, inside: bool) -> None:
        now = time.process_time()
        if self.inside:
            self.seconds += now - self.since
        self.inside, self.since = inside, now

    def counted(self, function, inside: bool = True):
        """The function, whose time counts as that of a pass; or not, within one."""
        def called(*arguments, **more):
            before = self.inside
            self._turn(inside)
            try:
                return function(*arguments, **more)
            finally:
                self._turn(before)

        return called

    def accumulate(self, learner: Learner, update: Update, totals: Totals) -> bool:
        """A pass, but for the losses that a method puts in: these are its own code."""
        if update.demonstration_loss is not None:
            update.demonstration_loss = self.counted(update.demonstration_loss, inside=False)
        return self._accumulate(learner, update, totals)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Counts inside the `with` block, wherever the package calls these functions."""
        places = [(owner, name) for owner, name in (
            (Policy, "score"), (Learner, "scores"), (Learner, "accumulate"),
            (Verifier, "verify"), (torch.autograd, "grad"))]
        places += [(module, "sample") for name, module in list(sys.modules.items())
                   if name.startswith("hybridrl_lib")
                   and getattr(module, "sample", None) is rollouts.sample]
        before = [getattr(owner, name) for owner, name in places]
        self._accumulate = Learner.accumulate
        for (owner, name), function in zip(places, before, strict=True):
            mine = (lambda *given: self.accumulate(*given)) if name == "accumulate" else function
            setattr(owner, name, self.counted(mine))
        try:
            yield
        finally:
            for (owner, name), function in zip(places, before, strict=True):
                setattr(owner, name, function)


def steps_of(setup: Setup, problems: int, epochs: int) -> dict[str, list[tuple[float, float]]]:
    """(whole, outside the passes) processor seconds of every step after the first, by stage."""
    settings = load_settings("tiny", (f"data.train_limits={problems},{problems}",
                                      f"training.epochs={epochs}", *QUIET),
                             smoke=False, setup=setup)
    found, passes = defaultdict(list), Passes()
    with tempfile.TemporaryDirectory() as folder, \
            Verifier(settings.verifier.workers, settings.verifier.time_limit) as verifier:
        trainer = Trainer(load_policy(settings.model), make_method(setup, settings),
                          load_parts(settings.data), settings, with_entropy=setup.entropy, seed=0,
                          folder=RunFolder(Path(folder)), verifier=verifier, observer=Observer())
        take = trainer._one_step

        def timed(progress):
            began, inside = time.process_time(), passes.seconds
            take(progress)
            whole = time.process_time() - began
            if progress.step:  # the first one warms up
                found[progress.stage.name].append((whole, whole - passes.seconds + inside))

        trainer._one_step = timed
        with passes.watched():
            trainer.train()
    return found


def overheads(mine: dict, plain: dict) -> dict[str, float]:
    """By stage, what a method adds, as a share of the plain loop's whole step."""
    def middle(steps, part):
        return statistics.median(step[part] for step in steps)

    return {stage: (middle(steps, 1) - middle(plain[stage], 1)) / middle(plain[stage], 0)
            for stage, steps in mine.items() if steps and plain.get(stage)}


def main(argv: Sequence[str] | None = None) -> dict:
    """Measures, prints a table and the JSON line; returns what the line holds."""
    parser = argparse.ArgumentParser(description="What a method adds to a step of the plain loop.")
    parser.add_argument("--setups", nargs="+", default=[], metavar="NAME",
                        help="setups or methods; default: one of each method")
    parser.add_argument("--problems", type=positive_number, default=64,
                        help="training problems of each benchmark; default: 64")
    parser.add_argument("--epochs", type=positive_number, default=4,
                        help="passes over them; default: 4")
    add_threads_and_json(parser)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads or 1)
    plain = steps_of(get_setup(PLAIN), arguments.problems, arguments.epochs)
    record = machine("overhead", torch.device("cpu")) | {
        "model": "tiny-v1", "plain": PLAIN, "problems": arguments.problems,
        "epochs": arguments.epochs, "plain_milliseconds": {
            stage: round(1000 * statistics.median(whole for whole, _ in steps), 2)
            for stage, steps in plain.items()}, "overhead": {}}
    for setup in choose_arms(arguments.setups):
        if setup.stages and SETUPS[setup.name].method != "staged":
            record["overhead"][setup.name] = {
                stage: round(share, 4) for stage, share in overheads(
                    steps_of(setup, arguments.problems, arguments.epochs), plain).items()}
    print("Overhead over the plain loop, as a share of its step "
          f"({', '.join(f'{s} {t} ms' for s, t in record['plain_milliseconds'].items())})\n")
    print_table(("setup", "stage", "overhead"),
                [(name, stage, f"{100 * share:+.1f} %")
                 for name, found in record["overhead"].items() for stage, share in found.items()])
    return finish(record, arguments.json)


if __name__ == "__main__":
    sys.exit(run(main))

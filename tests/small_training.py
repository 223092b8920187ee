"""Trainers over a handful of problems, and a look at every gradient they compute."""

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from hybridrl_lib.config.presets import get_setup, load_settings, settings_to_dict
from hybridrl_lib.config.settings import Settings
from hybridrl_lib.learning.progress import Progress
from hybridrl_lib.methods.registry import make_method
from hybridrl_lib.problems.problem import Problem
from hybridrl_lib.problems.splits import ProblemParts, load_parts
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.rewards.verifier import Verdict
from hybridrl_lib.system.errors import UsageError
from hybridrl_lib.training.observer import Observer
from hybridrl_lib.training.trainer import Trainer


def as_overrides(settings: dict) -> tuple[str, ...]:
    """Settings as plain data, written as after --set."""
    return tuple(f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
                 for section, values in settings.items() for key, value in values.items())


# Every setting has a value here, so no test depends on what a preset says today.
SMALL = (*as_overrides(settings_to_dict(Settings())),
         "data.train_limits=[4]", "data.validation_limits=[2]", "data.test_limits=[2]",
         "training.epochs=2", "training.warmup_steps=0", "training.checkpoint_every=1000",
         "training.gradient_clip=1000", "sft.batch_size=8", "rl.prompts_per_step=8",
         "rl.group_size=4", "rl.max_new_tokens=12", "evaluation.samples=2",
         "evaluation.train_samples=2", "evaluation.pass_at=[1,2]", "evaluation.max_new_tokens=12",
         "evaluation.train_limit=2", "probe.prompts=2", "probe.samples=2", "probe.every=1000")


class Coin:
    """In place of a `Verifier`: the answer's checksum decides.

    A random model is never right; this way half of the groups have a signal.
    """

    def __init__(self, *_):
        self.counts = Counter()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def verify(self, golds, texts, finished):
        verdicts = []
        for gold, text in zip(golds, texts, strict=True):
            right = zlib.crc32(f"{gold}|{text}".encode()) % 2 == 0
            verdicts.append(Verdict(right, right, "right" if right else "wrong"))
            self.counts[verdicts[-1].reason] += 1
        return verdicts


class Fixed(Coin):
    """Gives the verdicts of a list of 0 and 1, over and over."""

    def __init__(self, rewards):
        super().__init__()
        self.rewards, self.next = rewards, 0

    def verify(self, golds, texts, finished):
        verdicts = []
        for _ in texts:
            right = bool(self.rewards[self.next % len(self.rewards)])
            self.next += 1
            verdicts.append(Verdict(right, right, "right" if right else "wrong"))
        return verdicts


def small_settings(*overrides, setup=None):
    """The defaults with 8 problems, one batch per epoch, and two epochs; then the setup's own."""
    chosen = get_setup(setup) if setup else None
    return load_settings("tiny", [*SMALL, *(chosen.settings if chosen else ()), *overrides],
                         smoke=False, setup=chosen)


parts_of = cache(load_parts)  # the tiny worlds take longer to make than a small run to train


def not_refused(setup: str | None, refused: dict[str | Sequence[str], str]) -> list:
    """The settings that are not refused with an error that names the key.

    Args:
        refused: {settings that must be refused: the key that the error must start with}.
    """
    wrong = []
    for overrides, key in refused.items():
        try:
            small_settings(*([overrides] if isinstance(overrides, str) else overrides), setup=setup)
        except UsageError as error:
            if str(error).startswith(f"{key} ") and "\n" not in str(error):
                continue
            wrong.append((overrides, str(error)))
        else:
            wrong.append((overrides, "accepted"))
    return wrong


def make_trainer(setup, *overrides, policy, folder: Path, seed=0, verifier=None, observer=None,
                 train=None, validation=()):
    """A trainer on the settings' training problems; without validation it only trains."""
    settings = small_settings(*overrides, setup=setup)
    chosen = get_setup(setup)
    parts = ProblemParts(train=parts_of(settings.data).train if train is None else train,
                         validation=tuple(validation), test=())
    return Trainer(policy, make_method(chosen, settings), parts, settings,
                   with_entropy=chosen.entropy, seed=seed, folder=RunFolder(folder),
                   verifier=verifier or Coin(), observer=observer or Observer())


def rows_of(trainer) -> list[dict]:
    """The lines of metrics.jsonl."""
    return trainer.folder.lines("metrics.jsonl")


def snapshot(trainer) -> dict[str, torch.Tensor]:
    """Copies of the trained weights as they are now."""
    return {k: v.detach().clone() for k, v in trainer.policy.trained_weights().items()}


def flat(trainer) -> torch.Tensor:
    """The trained weights as they are now, or a dictionary of weights, in one vector."""
    weights = trainer if isinstance(trainer, dict) else snapshot(trainer)
    return torch.cat([weight.detach().flatten() for weight in weights.values()])


def first_progress(trainer) -> Progress:
    """Where a run stands before its first step."""
    stage = trainer.method.stages[0]
    return Progress(stage, 0, trainer.steps_of(stage), 0, trainer.seed)


def first_batch(trainer) -> list[Problem]:
    """The 8 problems of the first step's rollouts."""
    return trainer._batch(first_progress(trainer), "prompts", 8)


def take_first_step(trainer) -> None:
    """One step of the first stage, and nothing else."""
    trainer.learner.new_optimizer()
    trainer._one_step(first_progress(trainer))


def give_verifier(trainer, verifier) -> None:
    """Replaces the verifier of answers and demonstrations."""
    trainer.judge.verifier = trainer.verifier = verifier
    trainer.method.run = replace(trainer.method.run, verifier=verifier)


def trained(make_trainer, *arguments, **more):
    """A trainer after its run."""
    trainer = make_trainer(*arguments, **more)
    trainer.train()
    return trainer


def same_ends(make_trainer, *runs: Sequence[str], **more) -> bool:
    """Whether runs, each (setup, *overrides), end with equal weights, bit for bit, that moved."""
    ends = []
    for number, (setup, *overrides) in enumerate(runs):
        trainer = make_trainer(setup, *overrides, folder=f"end-{number}", **more)
        start = flat(trainer)
        trainer.train()
        ends.append(flat(trainer))
        assert not torch.equal(start, ends[-1]), (setup, overrides)
    return all(torch.equal(ends[0], end) for end in ends[1:])


def watch(trainer) -> SimpleNamespace:
    """Records what every update sees, in lists that grow while the trainer works.

    Returns:
        gradients: the flat gradient of every update, before clipping.
        weights: {name: weight} that every update starts from.
        micro_batches: backward passes of every update.
        groups: the rollouts of every step.
    """
    seen = SimpleNamespace(gradients=[], weights=[], micro_batches=[], passes=0)
    accelerator = trainer.learner.accelerator
    clip, backward = accelerator.clip_grad_norm_, accelerator.backward

    def noted_backward(loss, **arguments):
        seen.passes += 1
        return backward(loss, **arguments)

    def noted_clip(parameters, *arguments, **more):
        parameters = list(parameters)
        seen.gradients.append(torch.cat([
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten().clone()
            for p in parameters]))
        seen.weights.append(snapshot(trainer))
        seen.micro_batches.append(seen.passes)
        seen.passes = 0
        return clip(parameters, *arguments, **more)

    accelerator.clip_grad_norm_, accelerator.backward = noted_clip, noted_backward
    return seen


def watch_rollouts(monkeypatch) -> list:
    """A list that collects the groups of every step's rollouts."""
    from hybridrl_lib.training import judge

    taken, sample = [], judge.sample

    def noted(*arguments, **more):
        taken.append(sample(*arguments, **more))
        return taken[-1]

    monkeypatch.setattr(judge, "sample", noted)
    return taken


def distance(one, other) -> float:
    """Size of the difference of two vectors, relative to the second."""
    return float((one - other).norm() / other.norm().clamp(min=1e-30))

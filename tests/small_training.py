"""Trainers over a handful of problems, and a look at every gradient they compute."""

import json
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

from hybridrl_lib.config.presets import get_setup, load_settings, settings_to_dict
from hybridrl_lib.config.settings import Settings
from hybridrl_lib.methods.registry import make_method
from hybridrl_lib.problems.splits import ProblemParts, load_parts
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.rewards.verifier import Verdict
from hybridrl_lib.training.observer import Observer
from hybridrl_lib.training.trainer import Trainer


def as_overrides(settings: dict) -> tuple[str, ...]:
    """Settings as plain data, written as after --set."""
    return tuple(f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
                 for section, values in settings.items() for key, value in values.items())


# Every setting has a value here, so that no test depends on what a preset says today.
SMALL = (*as_overrides(settings_to_dict(Settings())),
         "data.train_limits=[4]", "data.validation_limits=[2]", "data.test_limits=[2]",
         "training.epochs=2", "training.warmup_steps=0", "training.checkpoint_every=1000",
         "training.gradient_clip=1000", "sft.batch_size=8", "rl.prompts_per_step=8",
         "rl.group_size=4", "rl.max_new_tokens=12", "evaluation.samples=2",
         "evaluation.train_samples=2", "evaluation.pass_at=[1,2]", "evaluation.max_new_tokens=12",
         "evaluation.train_limit=2", "probe.prompts=2", "probe.samples=2", "probe.every=1000")


class Coin:
    """In place of a `Verifier`: tosses a coin by the answer's checksum.

    A random model is never right; with a coin half of the groups have a signal.
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
    """The defaults with 8 problems, one batch an epoch, two epochs; the setup's own on top."""
    chosen = get_setup(setup) if setup else None
    return load_settings("tiny", [*SMALL, *(chosen.settings if chosen else ()), *overrides],
                         smoke=False, setup=chosen)


def make_trainer(setup, *overrides, policy, folder: Path, seed=0, verifier=None, observer=None,
                 train=None, validation=()):
    """A trainer on the settings' training problems; without validation it only trains."""
    settings = small_settings(*overrides, setup=setup)
    chosen = get_setup(setup)
    parts = ProblemParts(train=load_parts(settings.data).train if train is None else train,
                         validation=tuple(validation), test=())
    return Trainer(policy, make_method(chosen, settings), parts, settings,
                   with_entropy=chosen.entropy, seed=seed, folder=RunFolder(folder),
                   verifier=verifier or Coin(), observer=observer or Observer())


def watch(trainer) -> SimpleNamespace:
    """Notes what every update sees, in lists that fill while the trainer works.

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
        seen.weights.append({k: v.detach().clone() for k, v in trainer.weights().items()})
        seen.micro_batches.append(seen.passes)
        seen.passes = 0
        return clip(parameters, *arguments, **more)

    accelerator.clip_grad_norm_, accelerator.backward = noted_clip, noted_backward
    return seen


def watch_rollouts(monkeypatch) -> list:
    """A list that takes up the groups of every step's rollouts (and of every probe)."""
    from hybridrl_lib.training import judge as judging
    from hybridrl_lib.training import trainer as training

    taken, sample = [], judging.sample

    def noted(*arguments, **more):
        taken.append(sample(*arguments, **more))
        return taken[-1]

    for module in (judging, training):
        monkeypatch.setattr(module, "sample", noted)
    return taken


def distance(one, other) -> float:
    """Size of the difference of two vectors, relative to the second."""
    return float((one - other).norm() / other.norm().clamp(min=1e-30))

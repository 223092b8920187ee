"""How long a run would take on a T4: estimated from what it computes, not measured.

Every part is the larger of its arithmetic and its reading of memory, each at a stated share of what
the maker says the device can do. Lengths are assumed, too: no problem is read and no model loaded.
"""

import math
from dataclasses import dataclass

from .catalogue import training_problems
from .config import Settings
from .memory_estimate import FULL, HALF
from .methods import make_method
from .methods.method import Progress
from .model_shapes import Shape
from .setups import Setup


@dataclass(frozen=True)
class Device:
    """What a maker says of a device: operations a second in fp32 and in half precision, bytes a
    second."""

    name: str
    full: float
    half: float
    bandwidth: float


T4 = Device("T4", 8.1e12, 65e12, 320e9)  # NVIDIA's data sheet
SHARE_FULL, SHARE_HALF, SHARE_BANDWIDTH = 0.6, 0.25, 0.65  # of it reached; assumed
ANSWER = 0.75  # mean length of an answer as a share of its cap; the last one goes to the cap
PROMPT, DEMONSTRATION = 140, 150  # tokens, GSM8K's with the project's prompt; MATH-500's are longer
STEP = 0.003  # seconds of a decoding step beside its products: launching, drawing, book-keeping
UPDATE, ANSWER_SECONDS = 0.3, 0.01  # of an optimiser update, and of judging an answer
START, CHECKPOINT = 120.0, 2.0  # importing, fetching and loading the model; writing a checkpoint


class Clock:
    """Seconds of the parts of a run.

    Args:
        shape: of the model.
        settings: of the run.
        precision: of the products; a T4 has no bf16.
    """

    def __init__(self, shape: Shape, settings: Settings, precision: str, device: Device = T4):
        self.shape, self.settings = shape, settings
        self.number = FULL if precision == "fp32" else HALF
        self.speed = (device.full * SHARE_FULL if precision == "fp32"
                      else device.half * SHARE_HALF)
        self.bandwidth = device.bandwidth * SHARE_BANDWIDTH

    def forward(self, tokens: float) -> float:
        """Scoring: two operations a weight and token."""
        return 2 * (self.shape.linear + self.shape.embedding) * tokens / self.speed

    def update(self, tokens: float, predicted: float) -> float:
        """Forwards and backwards; whole weights need their own gradient, checkpoints a second pass.

        Args:
            tokens: read; predicted: those of completions, whose logits are computed twice.
        """
        whole = 2 * (self.settings.model.adapter == "none")
        layers = 4 + whole + 2 * self.settings.model.gradient_checkpointing
        words = 6 + whole
        return UPDATE + (layers * self.shape.linear * tokens
                         + words * self.shape.embedding * predicted) / self.speed

    def sample(self, prompts: int, samples: int, length: int) -> float:
        """Sampling and judging `samples` answers to each prompt, in batches that fit."""
        at_once = max(1, self.settings.evaluation.batch_size // samples)
        seconds = 0.0
        while prompts > 0:
            rows = min(prompts, at_once) * samples
            weights = self.number * (self.shape.linear + self.shape.embedding)
            cache = rows * (PROMPT / samples + length / 2) * (
                2 * self.number * self.shape.layers * self.shape.keys)
            words = 8 * FULL * rows * self.shape.vocabulary  # reading and writing the logits
            step = STEP + max(self.forward(rows), (weights + cache) / self.bandwidth) + (
                words / self.bandwidth)
            seconds += self.forward(rows / samples * PROMPT) + length * step + ANSWER_SECONDS * rows
            prompts -= at_once
        return seconds


def minutes(setup: Setup, settings: Settings, shape: Shape, precision: str,
            device: Device = T4) -> dict[str, float]:
    """Minutes of a run of the setup: sampling, updates, probes, evaluation and the rest.

    Every group counts as one with a signal: without the entropy term those without one are skipped,
    and a run is faster.
    """
    clock = Clock(shape, settings, precision, device)
    rl, sft, probe, evaluation = settings.rl, settings.sft, settings.probe, settings.evaluation
    problems, method = training_problems(settings), make_method(setup, settings)
    benchmarks = len(settings.data.benchmarks)
    answer = ANSWER * rl.max_new_tokens
    parts = dict.fromkeys(("start and checkpoints", "sampling", "updates", "probes and validation",
                           "evaluation"), 0.0)
    total = 0
    for stage in method.stages:
        batch = sft.batch_size if stage.name == "sft" else rl.prompts_per_step
        steps = stage.epochs * math.ceil(problems / batch)
        weights = method.weights(Progress(stage, 0, steps))
        total += steps
        if weights.sft > 0:
            parts["updates"] += steps * clock.update(batch * (PROMPT + DEMONSTRATION),
                                                     batch * DEMONSTRATION)
        if weights.rl > 0:
            written = batch * rl.group_size * answer
            parts["sampling"] += steps * clock.sample(batch, rl.group_size, rl.max_new_tokens)
            parts["updates"] += steps * (
                clock.update(batch * PROMPT + written, written)
                + (rl.updates_per_rollout - 1) * UPDATE
                + clock.forward(written) / rl.reference_every)
        held_out = sum(settings.data.validation_limits) or problems // 10
        parts["probes and validation"] += (
            stage.epochs // settings.training.validate_every
            * (clock.sample(held_out, 1, evaluation.max_new_tokens)
               + clock.forward(held_out * (PROMPT + DEMONSTRATION))))
    parts["probes and validation"] += (total / probe.every + 1) * (
        clock.sample(probe.prompts, probe.samples, rl.max_new_tokens)
        + 2 * clock.forward(probe.prompts * probe.samples * answer))
    test = sum(settings.data.test_limits) or problems // 2
    train = min(problems, benchmarks * (evaluation.train_limit or problems))
    train_samples = evaluation.train_samples or (0 if method.stages else rl.group_size)
    for count, samples in ((test, 1), (test, evaluation.samples), (train, 1),
                           (train, train_samples), (test, 1 if method.stages else 0)):
        if samples:
            parts["evaluation"] += clock.sample(count, samples, evaluation.max_new_tokens)
    parts["start and checkpoints"] = START + CHECKPOINT * (
        total / settings.training.checkpoint_every + len(method.stages))
    return {name: seconds / 60 for name, seconds in parts.items()}


def assumptions(device: Device = T4) -> str:
    """What the estimate rests on, in a sentence."""
    return (f"{device.name}: {device.full / 1e12:g} TFLOP/s in fp32, {device.half / 1e12:g} in "
            f"fp16, {device.bandwidth / 1e9:g} GB/s, of which {SHARE_FULL:.0%}, {SHARE_HALF:.0%} "
            f"and {SHARE_BANDWIDTH:.0%} are assumed to be reached; answers of {ANSWER:.0%} of "
            "their cap")

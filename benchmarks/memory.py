"""The memory model against what is measured: every phase of a run, at its caps.

Models are built from a shape with random weights. Each one is a process of its own; its phases are
those of `hybridrl_lib.machine.memory_estimate`, and each phase has its own peak. Both the estimate
and the measurement are what the run adds to a process that has imported everything and has already
trained a model of a few weights. See README.md in this folder.
"""

import argparse
import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from common import add_threads_and_json, current_memory, finish, machine, print_table, run
from networks import make_policy

from hybridrl_lib.config.presets import load_settings
from hybridrl_lib.config.settings import Settings
from hybridrl_lib.learning.learner import Learner
from hybridrl_lib.learning.update import Totals, Update
from hybridrl_lib.machine.memory_estimate import estimate
from hybridrl_lib.machine.shapes import KNOWN_SHAPES, Shape
from hybridrl_lib.policy.device import choose_device
from hybridrl_lib.policy.packing import PromptCompletion
from hybridrl_lib.policy.sampling import sample

SMALL = Shape(vocabulary=100, width=32, layers=1, heads=2, key_value_heads=1, head_size=16,
              feed_forward=64, tied=True, biases=True)
# Weights of 0.1 to 0.2 GB: a process's own ups and downs, some MiB, matter little beside them.
WIDE = Shape(20_000, 448, 6, 7, 1, 64, 2432, True, True)  # Qwen2.5-0.5B, half as wide
WORDY = Shape(151_936, 128, 2, 2, 1, 64, 640, True, True)
UNTIED = Shape(20_000, 512, 6, 8, 8, 64, 1408, False, False)
LENGTHS = ("model.device=auto", "data.max_prompt_tokens=64", "data.max_demonstration_tokens=64",
           "rl.max_new_tokens=64", "evaluation.max_new_tokens=64",
           "training.micro_batch_tokens=1024", "training.logit_chunk_tokens=256",
           "sft.batch_size=16", "rl.prompts_per_step=8", "rl.group_size=4",
           "rl.updates_per_rollout=2", "evaluation.samples=8", "evaluation.batch_size=32",
           "probe.prompts=4", "probe.samples=4")
LORA = ("model.adapter=lora",)
SAVING = ("model.gradient_checkpointing=true",)
CASES: dict[str, tuple[Shape, tuple[str, ...]]] = {
    "wide": (WIDE, LENGTHS),
    "wide, saving": (WIDE, (*LENGTHS, *SAVING)),
    "wide, LoRA": (WIDE, (*LENGTHS, *LORA)),
    "wide, LoRA, saving": (WIDE, (*LENGTHS, *LORA, *SAVING)),
    "wide, bf16": (WIDE, (*LENGTHS, "model.precision=bf16")),
    "wide, LoRA, saving, bf16": (WIDE, (*LENGTHS, *LORA, *SAVING, "model.precision=bf16")),
    "wordy": (WORDY, LENGTHS),
    "wordy, LoRA": (WORDY, (*LENGTHS, *LORA)),
    "untied": (UNTIED, LENGTHS),
}
# Qwen2.5-0.5B itself: few and short sequences, so that a CPU is done in minutes.
QWEN = KNOWN_SHAPES["Qwen/Qwen2.5-0.5B"]
FEW = (*LENGTHS, *SAVING, "data.max_prompt_tokens=32", "data.max_demonstration_tokens=32",
       "rl.max_new_tokens=32", "evaluation.max_new_tokens=32", "training.logit_chunk_tokens=128",
       "rl.prompts_per_step=4", "sft.batch_size=4", "evaluation.batch_size=16")
FULL_SIZE: dict[str, tuple[Shape, tuple[str, ...]]] = {
    "Qwen2.5-0.5B, LoRA": (QWEN, (*FEW, *LORA)),
    "Qwen2.5-0.5B": (QWEN, FEW),
}


class Run:
    """The phases of a run with random problems whose prompts and answers are as long as allowed."""

    def __init__(self, shape: Shape, settings: Settings):
        self.settings = settings
        self.policy = make_policy(shape, settings.model)
        self.policy.keep_reference()
        self.learner = Learner(self.policy, settings)
        self.draw = torch.Generator().manual_seed(0)
        self.best = ({k: v.detach().cpu().clone()
                      for k, v in self.policy.trained_weights().items()}
                     if self.policy.device.type == "cpu" else None)

    def tokens(self, count: int) -> list[int]:
        return torch.randint(5, 90, (count,), generator=self.draw).tolist()

    def update(self, prompts: int, samples: int, length: int) -> None:
        """One optimizer update of the policy gradient, or of SFT for one sample a prompt."""
        asked = [self.tokens(self.settings.data.max_prompt_tokens) for _ in range(prompts)]
        sequences = [PromptCompletion(prompt, self.tokens(length))
                     for prompt in asked for _ in range(samples)]
        weight, none = torch.full((len(sequences),), 1e-4), torch.zeros(len(sequences))
        taught = samples == 1
        self.learner.accumulate(Update(
            sequences, sft=weight if taught else none, rl=none if taught else weight,
            entropy=weight, advantages=torch.ones(len(sequences)),
            temperature=torch.ones(len(sequences))), Totals())
        self.learner.step(1e-6)

    def sample(self, prompts: int, samples: int, length: int) -> None:
        sample(self.policy, [self.tokens(self.settings.data.max_prompt_tokens)
                             for _ in range(prompts)], samples=samples, max_new_tokens=length,
               temperature=1.0, batch_size=self.settings.evaluation.batch_size)

    def phases(self) -> dict:
        """{name of the phase: what to call}, the names as in the estimate."""
        data, rl, sft = self.settings.data, self.settings.rl, self.settings.sft
        evaluation = self.settings.evaluation
        return {
            "SFT update": lambda: self.update(sft.batch_size, 1, data.max_demonstration_tokens),
            "RL update": lambda: self.update(rl.prompts_per_step // rl.updates_per_rollout,
                                             rl.group_size, rl.max_new_tokens),
            "sampling": lambda: self.sample(rl.prompts_per_step, rl.group_size,
                                            rl.max_new_tokens),
            "evaluation": lambda: self.sample(evaluation.batch_size, 1,
                                              evaluation.max_new_tokens),
            "evaluation, samples": lambda: self.sample(
                evaluation.batch_size // evaluation.samples, evaluation.samples,
                evaluation.max_new_tokens)}


def measure(shape: Shape, overrides: Sequence[str], threads: int) -> list[dict]:
    """Estimated and measured MiB of every phase; in a process of its own."""
    torch.set_num_threads(threads)
    settings = load_settings("tiny", overrides, smoke=False)
    few = replace(settings, model=replace(settings.model, gradient_checkpointing=False))
    warm = Run(SMALL, few)
    for phase in warm.phases().values():
        phase()
    del warm
    gc.collect()
    return_memory_at_once()
    resting = current_memory()
    one = Run(shape, settings)
    device = one.policy.device.type
    expected = estimate(shape, settings, one.policy.precision, device)
    one.learner.new_optimizer()
    one.update(1, 2, 8)  # Adam's moments are there from the first update on
    points = []
    for name, phase in one.phases().items():
        gc.collect()
        begin_peak()
        phase()
        points.append({"phase": name, "estimated_mib": round(expected.total(name) / 2**20, 1),
                       "measured_mib": round(peak_memory() - resting, 1),
                       "parts_mib": {k: round(v / 2**20, 1)
                                     for k, v in expected.phases[name].items()}})
    return points


# Measuring --------------------------------------------------------------------------------------


def return_memory_at_once() -> None:
    """Lets glibc hand every freed tensor back to the system, so that resident memory is in use."""
    if not torch.cuda.is_available() and sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def begin_peak() -> None:
    """Forgets the peak so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """MiB in use at most since `begin_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**10


def main(argv: Sequence[str] | None = None) -> dict:
    """Measures every case, prints a table and the JSON line; returns what the line holds."""
    parser = argparse.ArgumentParser(description="The memory model against measured peaks.")
    parser.add_argument("--full-size", action="store_true",
                        help="Qwen2.5-0.5B's shape, all weights and LoRA; takes about 15 GiB")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these")
    add_threads_and_json(parser)
    arguments = parser.parse_args(argv)
    threads = arguments.threads or torch.get_num_threads()
    context = multiprocessing.get_context("forkserver")
    cases = FULL_SIZE if arguments.full_size else CASES
    points = []
    for name, (shape, overrides) in cases.items():
        if arguments.cases and name not in arguments.cases:
            continue
        with context.Pool(1) as pool:
            points += [{"case": name} | point
                       for point in pool.apply(measure, (shape, overrides, threads))]
        print(f"measured: {name}", file=sys.stderr, flush=True)
    for point in points:
        point["ratio"] = round(point["estimated_mib"] / point["measured_mib"], 3)
    print_table(("case", "phase", "estimated MiB", "measured MiB", "ratio"), [
        [p["case"], p["phase"], f"{p['estimated_mib']:.0f}", f"{p['measured_mib']:.0f}",
         f"{p['ratio']:.2f}"] for p in points])
    record = machine("memory", choose_device()) | {
        "threads": threads, "shapes": {name: asdict(shape) for name, (shape, _) in cases.items()},
        "points": points, "largest_ratio": max(p["ratio"] for p in points),
        "smallest_ratio": min(p["ratio"] for p in points)}
    return finish(record, arguments.json)


if __name__ == "__main__":
    sys.exit(run(main))

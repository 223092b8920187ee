"""Time and peak memory of sampling and of the update, against G, length, prompts and model size.

Models are built from a config with random weights. Every point is a process of its own, so that its
peak is its own; the rest of the sizes stay as in `BASE`. The last curve is the update's memory at a
large vocabulary, against the length of the completions at the same number of completion tokens and
of tokens a micro-batch. See README.md in this folder.
"""

import argparse
import gc
import multiprocessing
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from common import add_threads_and_json, current_memory, finish, machine, print_table, run, timed
from grpo_step import GRPOStep
from networks import make_policy, tiny_tokenizer

from hybridrl_lib.config.sections import ModelSettings
from hybridrl_lib.machine.shapes import Shape
from hybridrl_lib.policy.completions import Completion, Group
from hybridrl_lib.policy.device import DTYPES, choose_device
from hybridrl_lib.policy.policy import Policy


@dataclass(frozen=True)
class Sizes:
    """What a point is measured at; tokens of the completions and of a micro-batch."""

    prompts: int = 16
    samples: int = 8
    length: int = 48
    width: int = 128
    layers: int = 3
    vocabulary: int = 100
    prompt_tokens: int = 32
    micro_batch_tokens: int = 4096
    precision: str = "fp32"


BASE = Sizes()
WIDE = 151_936  # the vocabulary of Qwen2.5
AXES = {
    "samples": [replace(BASE, samples=n) for n in (4, 8, 16, 32)],
    "length": [replace(BASE, length=n) for n in (16, 48, 128, 256)],
    "prompts": [replace(BASE, prompts=n) for n in (4, 16, 32, 64)],
    "model": [replace(BASE, width=w, layers=n) for w, n in ((64, 2), (128, 3), (256, 4),
                                                            (512, 8))],
    # 4,096 completion tokens each
    "vocabulary": [replace(BASE, length=n, samples=4, prompts=1024 // n, width=64, layers=2,
                           vocabulary=WIDE, micro_batch_tokens=2048)
                   for n in (128, 256, 512, 1024)],
}
SMALLEST = {
    "samples": [replace(BASE, samples=n, prompts=1, length=4, width=32, layers=1) for n in (2, 3)],
    "vocabulary": [replace(BASE, length=n, samples=2, prompts=8 // n, width=32, layers=1,
                           micro_batch_tokens=128) for n in (4, 8)]}


def policy_of(sizes: Sizes) -> Policy:
    """A Qwen2 of these sizes with random weights whose answers never end by themselves."""
    heads = max(2, sizes.width // 32)
    shape = Shape(
        vocabulary=max(sizes.vocabulary, len(tiny_tokenizer())), width=sizes.width,
        layers=sizes.layers, heads=heads, key_value_heads=max(1, sizes.width // 64),
        head_size=sizes.width // heads, feed_forward=3 * sizes.width, tied=True, biases=True)
    return make_policy(shape, ModelSettings(path="random", precision=sizes.precision))


def measure(part: str, sizes: Sizes, threads: int, repeats: int) -> dict:
    """Seconds (median) and peak memory of one part at these sizes; in a process of its own."""
    torch.set_num_threads(threads)
    policy = policy_of(sizes)
    question = "1" * max(1, sizes.prompt_tokens - len(policy.encode_prompt("")))
    step = GRPOStep(policy, [question] * sizes.prompts, samples=sizes.samples,
                    max_new_tokens=sizes.length, micro_batch_tokens=sizes.micro_batch_tokens)
    prompts = [policy.encode_prompt(question)] * sizes.prompts
    # each prompt ends in another token: rows of one prompt would share a pack
    prompts = [[*ids[:-1], 5 + number] for number, ids in enumerate(prompts)]
    draw = torch.Generator().manual_seed(0)
    groups = [Group(ids, [Completion(torch.randint(5, 90, (sizes.length,), generator=draw).tolist(),
                                     [], [], False, "") for _ in range(sizes.samples)])
              for ids in prompts]
    function = step.sample if part == "sampling" else lambda _: step.update(groups)
    gc.collect()
    resting = current_memory()
    seconds = [timed(function, number)[0] for number in range(repeats + 1)]
    return {"part": part, **asdict(sizes), "parameters": policy.parameter_count(),
            "prompt_tokens": len(prompts[0]),
            "seconds": round(statistics.median(seconds[1:] or seconds), 4),
            "resting_mib": round(resting, 1), "peak_mib": round(peak_memory(), 1)}


def peak_memory() -> float:
    """MiB in use at most so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(argv: Sequence[str] | None = None) -> dict:
    """Measures all points, prints a table and the JSON line; returns what the line holds."""
    parser = argparse.ArgumentParser(description="Time and memory against the sizes.")
    parser.add_argument("--repeats", type=int, default=2,
                        help="timed runs a point, after one that is not; default: 2")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--smallest", action="store_true", help="two points of two curves alone")
    add_threads_and_json(parser)
    arguments = parser.parse_args(argv)
    threads = arguments.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    # The server imports this file once and computes nothing: a fork of it is a fresh process.
    context = multiprocessing.get_context("forkserver")
    points: dict[str, list[dict]] = {}
    for axis, line in (SMALLEST if arguments.smallest else AXES).items():
        points[axis] = []
        for sizes in line:
            for part in ("update",) if axis == "vocabulary" else ("sampling", "update"):
                with context.Pool(1) as pool:
                    sized = replace(sizes, precision=arguments.precision)
                    points[axis].append(pool.apply(measure, (
                        part, sized, threads, 0 if axis == "vocabulary" else arguments.repeats)))
    peaks = [point["peak_mib"] for point in points["vocabulary"]]
    above = [point["peak_mib"] - point["resting_mib"] for point in points["vocabulary"]]
    record = machine("scaling", choose_device()) | {
        "threads": threads, "precision": arguments.precision, "base": asdict(BASE),
        "points": points, "vocabulary_peak_ratio": round(max(peaks) / min(peaks), 4),
        "vocabulary_above_resting_ratio": round(max(above) / max(min(above), 1e-3), 4)}
    print_table(("curve", "part", "prompts", "G", "tokens", "weights", "seconds", "peak MiB"), [
        [axis, p["part"], str(p["prompts"]), str(p["samples"]), str(p["length"]),
         f"{p['parameters'] / 1e6:.2f} M", f"{p['seconds']:.3f}", f"{p['peak_mib']:.0f}"]
        for axis, line in points.items() for p in line])
    print(f"\nupdate at {WIDE:,} words: largest peak over smallest "
          f"{record['vocabulary_peak_ratio']:.2f}, above the resting memory "
          f"{record['vocabulary_above_resting_ratio']:.2f}")
    return finish(record, arguments.json)


if __name__ == "__main__":
    sys.exit(run(main))

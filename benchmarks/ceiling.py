"""What this machine can do, and the share of it that sampling and the update reach.

The ceilings are one large matrix product in fp32 and in bf16, and one large copy. Sampling and the
update are put against their own matrix products alone, of the same shapes and in the same order;
the update's floating-point operations also against the large product. See README.md beside this
file.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import (
    alternate,
    circumstances,
    finish,
    load_questions,
    make_parser,
    median,
    print_table,
    rounded,
    run,
    timed,
)
from grpo_step import GRPOStep
from torch import Tensor

from hybridrl_lib.policy.completions import Group
from hybridrl_lib.policy.device import DTYPES
from hybridrl_lib.policy.packing import PromptCompletion, pack
from hybridrl_lib.policy.policy import Policy
from hybridrl_lib.policy.products import linear

SIDE = {"cpu": 2048, "cuda": 8192}  # of the large product
# What cannot be spared, told by parts of the names that torch's profiler has: on a CPU those of
# torch's operations, on a GPU those of kernels.
# The first that matches counts.
KERNELS = {"attention": ("scaled_dot_product", "flash_", "fmha"),
           "products": ("linear", "mm", "cutlass", "nvjet"), "activation": ("silu",)}
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes
REPEATS = 8


class LargeProduct:
    """A square matrix product, far larger than the caches."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.side = SIDE[device.type]
        self.a, self.b = (torch.randn(self.side, self.side, device=device).to(dtype)
                          for _ in range(2))

    def __call__(self, _: int = 0) -> Tensor:
        return self.a @ self.b

    @property
    def operations(self) -> float:
        return 2.0 * self.side**3


def best(function: Callable[[int], Any]) -> float:
    """Seconds of the least disturbed of some runs, after one that is not timed."""
    function(0)
    return min(timed(function, number)[0] for number in range(REPEATS))


def copy_speed(device: torch.device) -> float:
    """GB/s of a large copy, read and written."""
    source, target = (torch.ones(COPIED[device.type] // 4, device=device) for _ in range(2))
    return 2e-9 * COPIED[device.type] / best(lambda _: target.copy_(source))


class Shapes:
    """The matrix products of a Llama or Qwen2 model, of random weights.

    Attributes:
        layers: weights (out, in) of a layer's fused products, a list a layer.
        head: (vocabulary, width).
        attention: heads x head size.
    """

    def __init__(self, policy: Policy):
        config = policy.model.config
        width, heads = config.hidden_size, config.num_attention_heads
        size = getattr(config, "head_dim", None) or width // heads
        self.attention = heads * size
        fused = [(self.attention + 2 * config.num_key_value_heads * size, width),
                 (width, self.attention), (2 * config.intermediate_size, width),
                 (width, config.intermediate_size)]
        options = {"dtype": DTYPES[policy.precision], "device": policy.device}
        self.layers = [[torch.randn(shape, **options) for shape in fused]
                       for _ in range(config.num_hidden_layers)]
        self.head = torch.randn(config.vocab_size, width, **options)
        self._inputs: dict[tuple[int, int], Tensor] = {}

    @torch.inference_mode()
    def sampling(self, prompts: int, longest: int, rows: int, tokens: int) -> None:
        """All products of sampling `tokens` tokens a row after reading the prompts once."""
        self._advance(prompts * longest)
        self._product(rows, self.head)
        for _ in range(tokens - 1):
            self._advance(rows)
            self._product(rows, self.head)

    def _advance(self, rows: int) -> None:
        for layer in self.layers:
            for weight in layer:
                self._product(rows, weight)

    def _product(self, rows: int, weight: Tensor) -> None:
        torch.nn.functional.linear(self._input(rows, weight.shape[1], weight), weight)

    def _input(self, rows: int, width: int, like: Tensor) -> Tensor:
        if (rows, width) not in self._inputs:
            self._inputs[rows, width] = torch.randn(rows, width, dtype=like.dtype,
                                                    device=like.device)
        return self._inputs[rows, width]

    @torch.inference_mode()
    def update(self, micro_batches: Sequence[tuple[int, int]]) -> None:
        """All products of a forward and a backward pass, by the same operation as in training.

        Args:
            micro_batches: (positions, completion tokens) of each.
        """
        for positions, tokens in micro_batches:
            products = [(positions, weight) for layer in self.layers for weight in layer]
            for rows, weight in [*products, (tokens, self.head)]:
                x, y = self._input(rows, weight.shape[1], weight), self._input(
                    rows, weight.shape[0], weight)
                linear(x, weight)
                linear(y, weight.t())  # the gradient of x
                linear(y.t(), x.t())  # the gradient of the weight

    def update_operations(self, groups: Sequence[Group]) -> float:
        """Floating-point operations of a forward and a backward pass that cannot be spared.

        Two for each weight and position forward, twice that backward, with a group's prompt once,
        the output layer at completion tokens only, and attention only where it may look.
        Padding and what is computed a second time do not count.
        """
        weights = sum(weight.numel() for layer in self.layers for weight in layer)
        total = 0.0
        for group in groups:
            prompt, lengths = len(group.prompt_ids), [len(c.token_ids) for c in group.completions]
            inner = [length - 1 for length in lengths]  # the last token is predicted, never read
            pairs = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in inner)
            total += 2.0 * weights * (prompt + sum(inner)) + 2.0 * self.head.numel() * sum(lengths)
            total += 4.0 * self.attention * pairs * len(self.layers)
        return 3.0 * total


def shares(part: Callable[[int], Any], ceiling: Callable[[int], Any], pairs: int,
           work: float = 1.0) -> dict[str, Any]:
    """`work` times the ceiling's seconds over the part's, in alternating pairs."""
    seconds = [[one[0] for one in side] for side in zip(*alternate(part, ceiling, pairs),
                                                        strict=True)]
    found = [work * c / p for p, c in zip(*seconds, strict=True)]
    return {"seconds": rounded(seconds[0]), "ceiling_seconds": rounded(seconds[1]),
            "share": rounded(found), "share_median": median(found),
            "share_best": round(work * min(seconds[1]) / min(seconds[0]), 4)}


def kernels(function: Callable[[int], Any], device: torch.device) -> dict[str, float]:
    """Shares of a function's time in products, attention and activation, by torch's profiler.

    The profiler costs every operation some time, so that many small ones look larger than they are
    and these shares smaller.
    """
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if gpu else activity.CPU]) as profile:
        seconds, _ = timed(function, 0)
    times = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total
             for event in profile.key_averages()}

    def kind_of(name: str) -> str | None:
        if not gpu and not name.startswith(("aten::", "mkldnn::")):
            return None  # a Python function around them
        return next((kind for kind, parts in KERNELS.items()
                     if any(part in name for part in parts)), None)

    # A GPU may wait for the CPU between its kernels: there the whole is what passes on the clock.
    whole = 1e6 * seconds if gpu else sum(times.values())
    return {kind: round(sum(time for name, time in times.items() if kind_of(name) == kind)
                        / whole, 4) for kind in KERNELS}


def main(argv: Sequence[str] | None = None) -> dict:
    """Measures, prints a table and the JSON line; returns what the line holds."""
    parser = make_parser("What this machine can do, and the share that is reached.",
                         prompts=16, pairs=5, max_new_tokens=48)
    arguments = parser.parse_args(argv)
    arguments.lengths = "fixed"  # so that the products of every step are known
    policy, questions = load_questions(arguments)
    step = GRPOStep(policy, questions, samples=arguments.samples,
                    max_new_tokens=arguments.max_new_tokens)
    shapes = Shapes(policy)
    products = {name: LargeProduct(DTYPES[name], policy.device) for name in ("fp32", "bf16")}
    speeds = {name: p.operations / best(p) / 1e9 for name, p in products.items()}
    copied = copy_speed(policy.device)
    groups = step.sample(seed=0)
    tried = step.use_fastest_micro_batches(groups)
    rows, longest = len(questions) * arguments.samples, max(len(g.prompt_ids) for g in groups)
    sampling = shares(step.sample, lambda _: shapes.sampling(
        len(questions), longest, rows, arguments.max_new_tokens), arguments.pairs)
    operations, product = shapes.update_operations(groups), products[policy.precision]
    update = shares(lambda _: step.update(groups), product, arguments.pairs,
                    operations / product.operations)
    sequences = [PromptCompletion(group.prompt_ids, completion.token_ids)
                 for group in groups for completion in group.completions]
    micro_batches = [(len(packed.segments.back), len(packed.targets)) for packed in pack(
        sequences, step.settings.training.micro_batch_tokens)]
    of_products = shares(lambda _: step.update(groups), lambda _: shapes.update(micro_batches),
                         arguments.pairs)
    record = circumstances("ceiling", arguments, policy) | {
        "product_side": product.side,
        "product_gflops": {name: round(speed, 1) for name, speed in speeds.items()},
        "copy_gb_per_second": round(copied, 2), "sampling": sampling,
        "update": update | {"operations": operations,
                            "gflops": rounded([operations / s / 1e9 for s in update["seconds"]], 1),
                            "micro_batch_tokens": step.settings.training.micro_batch_tokens,
                            "seconds_by_tokens": tried},
        "update_kernels": kernels(lambda _: step.update(groups), policy.device),
        "update_products": of_products | {
            "gflops": rounded([operations / s / 1e9 for s in of_products["ceiling_seconds"]], 1)}}
    print(f"{record['model']}, {record['device']}, {record['precision']}, threads: "
          f"{record['threads']}; {rows} completions of {arguments.max_new_tokens} tokens\n"
          f"large product: {speeds['fp32']:.0f} GFLOP/s in fp32, {speeds['bf16']:.0f} in bf16; "
          f"large copy: {copied:.1f} GB/s, read and written\n")
    print_table(("part", "against", "share", "from", "to", "of the best runs"), [
        [name, against, f"{part['share_median']:.2f}", f"{min(part['share']):.2f}",
         f"{max(part['share']):.2f}", f"{part['share_best']:.2f}"]
        for name, against, part in (("sampling", "its matrix products alone", sampling),
                                    ("update", f"large product, {record['precision']}", update),
                                    ("update", "its matrix products alone", of_products))])
    return finish(record, arguments.json)


if __name__ == "__main__":
    sys.exit(run(main))

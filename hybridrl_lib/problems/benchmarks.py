"""The table of benchmarks: name -> how to load it."""

import hashlib
from collections.abc import Callable
from dataclasses import astuple

from ..system.errors import unknown
from .gsm8k import load_gsm8k
from .math500 import load_math500
from .problem import Benchmark, BenchmarkData, Problem
from .tiny import load_tiny_symbolic, load_tiny_word


def _generated(make: Callable[[], tuple[Problem, ...]]) -> Callable[[], BenchmarkData]:
    """A loader for generated problems; their revision is the sha256 of their texts."""
    def load() -> BenchmarkData:
        problems = make()
        content = repr([astuple(problem) for problem in problems]).encode()
        return BenchmarkData(problems, f"generated sha256 {hashlib.sha256(content).hexdigest()}")
    return load


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("tiny_word", "tiny word problems", "gsm8k", _generated(load_tiny_word)),
        Benchmark("tiny_symbolic", "tiny symbolic math", "math500",
                  _generated(load_tiny_symbolic)),
        Benchmark("gsm8k", "GSM8K", None, load_gsm8k),
        Benchmark("math500", "MATH-500", None, load_math500),
    )
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        UsageError: it does not exist; the message names the nearest one.
    """
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]

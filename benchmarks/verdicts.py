"""Verdicts a second: numeric ones, decided in this process, and symbolic ones, by workers.

No pair comes twice, so no cache helps. See README.md in this folder.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import psutil
from common import finish, median, positive_number, rounded, run

from hybridrl_lib.rewards.verifier import Verifier

PROSE = "First 24 + 17 = 41. Then 41 - 8 = 33, which is the number that was asked for. "
Pairs = list[tuple[str, str]]


def numeric_pairs(count: int, seed: int) -> Pairs:
    """Numbers in the spellings of GSM8K and of fractions, and answers to them; half are right."""
    source = random.Random(seed)
    pairs = []
    for number in range(count):
        value = source.randrange(10**9) * 2 + 1
        answer = value if number % 2 else value + source.randint(1, 9)
        pairs.append([(str(value), f"{answer:,}"), (str(value), rf"\${answer}.00"),
                      (rf"\frac{{{value}}}{{2}}", rf"\dfrac{{{answer}}}{{2}}"),
                      (str(value), rf"{answer}\text{{ apples}}")][number // 2 % 4])
    return pairs


def symbolic_pairs(count: int, seed: int) -> Pairs:
    """Roots, polynomials, intervals, points, matrices, sets, complex numbers; half are right."""
    source = random.Random(seed)
    pairs = []
    for number in range(count):
        a, b, c = source.sample(range(2, 100_000), 3)
        d = a if number % 2 else a + 1
        pairs.append([
            (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{b}}}\cdot {d}"),
            (f"{a}x^2+{b}x+{c}", f"{c}+{d}x^2+{b}x"),
            (rf"({a},{a + b}]", rf"\left({d},{a + b}\right]"),
            (rf"({b},\frac{{\pi}}{{{a}}})", rf"({b},\pi/{d})"),
            (rf"\begin{{pmatrix}} {a} \\ {b} \end{{pmatrix}}",
             rf"\begin{{bmatrix}} {d} \\ {b} \end{{bmatrix}}"),
            (f"{a}, {b}, {c}", rf"\{{{c},{d},{b}\}}"),
            (f"{b}+{a}i", f"{d}i+{b}"),
        ][number // 2 % 7])
    return pairs


def measure(verifier: Verifier, pairs: Pairs) -> tuple[float, float]:
    """Seconds on the clock and seconds of processor time, ours and the workers', for all pairs.

    Raises:
        RuntimeError: the verdicts are not those the pairs were made for.
    """
    golds = [gold for gold, _ in pairs]
    texts = [rf"{PROSE}\boxed{{{answer}}}" for _, answer in pairs]
    before, start = processor_seconds(), time.perf_counter()
    verdicts = verifier.verify(golds, texts, [True] * len(pairs))
    seconds, busy = time.perf_counter() - start, processor_seconds() - before
    wrong = [number for number, verdict in enumerate(verdicts) if verdict.strict != number % 2]
    if wrong:
        raise RuntimeError(f"The verdict on {pairs[wrong[0]]} is not the right one.")
    return seconds, busy


def processor_seconds() -> float:
    """Processor time so far of this process and its children."""
    workers = [child.cpu_times() for child in psutil.Process().children()]
    return time.process_time() + sum(times.user + times.system for times in workers)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measures, prints a table and the JSON line; returns what the line holds."""
    parser = argparse.ArgumentParser(description="Verdicts a second, numeric and symbolic.")
    for name, default, meaning in (
            ("--numeric", 20_000, "numeric verdicts a round"),
            ("--symbolic", 700, "symbolic verdicts a round"),
            ("--workers", 2, "worker processes"), ("--rounds", 3, "timed rounds")):
        parser.add_argument(name, type=positive_number, default=default,
                            help=f"{meaning}; default: {default}")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="also write the JSON of the last line there")
    arguments = parser.parse_args(argv)
    record = {"benchmark": "verdicts", "workers": arguments.workers,
              "math_verify": version("math-verify"), "sympy": version("sympy")}
    print("Verdicts a second: by the clock, and a second of processor time\n")
    with Verifier(workers=arguments.workers, time_limit=60.0) as verifier:
        for kind, make in (("numeric", numeric_pairs), ("symbolic", symbolic_pairs)):
            count = getattr(arguments, kind)
            measure(verifier, make(14, seed=0))  # starts and warms what is needed
            rounds = [measure(verifier, make(count, seed=1 + number))
                      for number in range(arguments.rounds)]
            clock, busy = ([count / seconds for seconds in side]
                           for side in zip(*rounds, strict=True))
            record[kind] = {"verdicts": count, "per_second": rounded(clock, 1),
                            "per_second_median": median(clock),
                            "per_processor_second": rounded(busy, 1),
                            "per_processor_second_median": median(busy)}
            print(f"{kind:>8}: median {median(clock):9.0f} by the clock, "
                  f"{median(busy):9.0f} by processor time")
    print()
    return finish(record, arguments.json)


if __name__ == "__main__":
    sys.exit(run(main))

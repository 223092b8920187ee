"""What the benchmarks share: their options, timing in alternating pairs, and the JSON line."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from hybridrl_lib.config.sections import DataSettings, ModelSettings
from hybridrl_lib.experiments.provenance import device_name, provenance
from hybridrl_lib.policy.loading import load_policy
from hybridrl_lib.policy.policy import Policy
from hybridrl_lib.problems.splits import load_parts
from hybridrl_lib.records.files import to_json, write_whole
from hybridrl_lib.system.errors import UserError


def positive_number(text: str) -> int:
    """A whole number of 1 and up."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 and up")
    return int(text)


def make_parser(description: str, *, prompts: int, pairs: int,
                max_new_tokens: int = 56) -> argparse.ArgumentParser:
    """The options that every benchmark of a model has; the numbers are defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="tiny",
                        help="tiny (the shipped model), a folder, a GGUF file or a hub name")
    for name, default, meaning in (
            ("--prompts", prompts, "tiny training problems asked"),
            ("--samples", 8, "completions a prompt"),
            ("--max-new-tokens", max_new_tokens, "cap on a completion's tokens"),
            ("--pairs", pairs, "timed pairs, after one run of each that is not timed")):
        parser.add_argument(name, type=positive_number, default=default,
                            help=f"{meaning}; default: {default}")
    parser.add_argument("--prompt-tokens", type=positive_number, metavar="N",
                        help="take the problems whose prompts are nearest to N tokens; the first "
                             "problems unless given")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                        help="as model.precision; default: auto")
    add_threads_and_json(parser)
    return parser


def add_threads_and_json(parser: argparse.ArgumentParser) -> None:
    """The options of benchmarks without a model, too."""
    parser.add_argument("--threads", type=positive_number,
                        help="CPU threads; default: torch's choice")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="also write the JSON of the last line there")


def add_lengths(parser: argparse.ArgumentParser) -> None:
    """`--lengths`, for benchmarks that can keep answers from ending."""
    parser.add_argument("--lengths", choices=("natural", "fixed"), default="natural",
                        help="fixed: no answer ends before the cap; default: natural")


def load_questions(arguments: argparse.Namespace) -> tuple[Policy, list[str]]:
    """The policy and `--prompts` questions out of the training problems of the tiny benchmarks.

    With `--lengths fixed` the policy's only stop token is one that no model samples, so that every
    completion is as long as the cap.

    Raises:
        UserError: the model cannot be loaded, or there are fewer problems than asked for.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    policy = load_policy(ModelSettings(path=arguments.model, precision=arguments.precision))
    if getattr(arguments, "lengths", "natural") == "fixed":
        policy.stop_ids = (policy.model.config.vocab_size,)
    questions = [problem.question for problem in load_parts(DataSettings()).train]
    if arguments.prompts > len(questions):
        raise UserError(f"There are {len(questions)} problems; lower --prompts.")
    if arguments.prompt_tokens:
        questions.sort(key=lambda question: abs(len(policy.encode_prompt(question))
                                                - arguments.prompt_tokens))
    return policy, questions[:arguments.prompts]


def load(arguments: argparse.Namespace) -> tuple[Policy, list[list[int]]]:
    """As `load_questions`, with the token ids of the prompts."""
    policy, questions = load_questions(arguments)
    return policy, [policy.encode_prompt(question) for question in questions]


def circumstances(name: str, arguments: argparse.Namespace, policy: Policy) -> dict[str, Any]:
    """What was measured, on what: the head of the JSON line."""
    return machine(name, policy.device) | {
        "model": policy.name, "parameters": policy.parameter_count(),
        "precision": policy.precision, "prompts": arguments.prompts, "samples": arguments.samples,
        "max_new_tokens": arguments.max_new_tokens, "prompt_tokens": arguments.prompt_tokens,
        "lengths": getattr(arguments, "lengths", "natural")}


def machine(name: str, device: torch.device) -> dict[str, Any]:
    """The benchmark, and what it runs on."""
    return {"benchmark": name, "device": device_name(device), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": transformers.__version__,
            "git_commit": provenance()["git_commit"]}


def current_memory() -> float:
    """MiB in use now: on the GPU, or the resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


def timed(function: Callable[[int], Any], number: int) -> tuple[float, Any]:
    """(seconds, result) of `function(number)`; work queued on a GPU counts."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    result = function(number)
    wait()
    return time.perf_counter() - start, result


def alternate(ours: Callable[[int], Any], other: Callable[[int], Any],
              pairs: int) -> list[tuple[tuple[float, Any], tuple[float, Any]]]:
    """Times both in turn, after one run of each that is not timed.

    The two of a pair run one right after the other, so a machine that is busy for a while slows
    both; which goes first changes from pair to pair.

    Returns:
        A ((seconds, result) of ours, (seconds, result) of the other) a pair. Each function is
        called with the number of the pair, from 1; with 0 to warm up.
    """
    ours(0)
    other(0)
    results = []
    for number in range(1, pairs + 1):
        if number % 2:
            mine = timed(ours, number)
            theirs = timed(other, number)
        else:
            theirs = timed(other, number)
            mine = timed(ours, number)
        results.append((mine, theirs))
    return results


def show(record: dict[str, Any], title: str, columns: Sequence[str],
         rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Prints what was measured as a table."""
    print(f"{title}\n{record['model']} ({record['parameters'] / 1e6:.2f} M weights), "
          f"{record['device']}, {record['precision']}, threads: {record['threads']}\n"
          f"{record['prompts']} prompts x {record['samples']} completions, "
          f"at most {record['max_new_tokens']} new tokens, lengths: {record['lengths']}\n")
    print_table(columns, rows)
    print(f"\nratio: median {record['ratio_median']:.2f}, from {min(record['ratio']):.2f} to "
          f"{max(record['ratio']):.2f}; of the least disturbed runs {record['ratio_best']:.2f}")
    for note in notes:
        print(note)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of text, aligned to the right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def finish(record: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """Prints the record as the last line, and writes it to a file if there is a path."""
    if path:
        write_whole(path, to_json(record, indent=2) + "\n")
    print(to_json(record), flush=True)
    return record


def rounded(values: Sequence[float], digits: int = 4) -> list[float]:
    return [round(value, digits) for value in values]


def ratios(ours: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """How many times faster ours is: pair by pair, the median, and by each side's best run.

    Args:
        ours, other: seconds for the same work, or for a token, a value a pair.
    """
    pairs = [theirs / mine for mine, theirs in zip(ours, other, strict=True)]
    return {"ratio": rounded(pairs), "ratio_median": median(pairs),
            "ratio_best": round(min(other) / min(ours), 4)}


def median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)


def run(main: Callable[[], Any]) -> int:
    """Runs a benchmark; a user's error is one sentence and its exit code."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0

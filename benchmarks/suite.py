"""`make bench`: runs the benchmarks that fit this machine and writes one JSON file and a page.

Each case is a process of its own, and what it measured is kept as soon as it ends. A case that is
run again replaces its record; the others stay, so a long suite can be made in parts (`--only`).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from common import machine, positive_number, run
from page import write_page

from hybridrl_lib.policy.device import choose_device
from hybridrl_lib.records.files import to_json, write_whole
from hybridrl_lib.records.folders import project_folder
from hybridrl_lib.system.errors import UsageError, UserError

HERE = Path(__file__).parent
LARGE_MODEL = ["--prompt-tokens", "100", "--lengths", "fixed"]
TIME_LIMIT = 3600.0  # seconds a case


@dataclass(frozen=True)
class Case:
    """One benchmark with its options; `gigabytes` of memory it needs, by a generous guess."""

    script: str
    options: tuple[str, ...] = ()
    precision: str = "fp32"
    gigabytes: float = 2.0


def cases(model: str | None) -> dict[str, Case]:
    """All cases by name; those of a large model only where one is given."""
    found = {
        "trl_tiny_all": Case("against_trl", ("--groups", "all")),
        "trl_tiny_signal": Case("against_trl", ("--groups", "signal")),
        "generate_tiny": Case("against_generate"),
        "packing_tiny": Case("packing"),
        "ceiling_tiny": Case("ceiling"),
        "overhead_tiny": Case("overhead"),
        "scaling": Case("scaling", gigabytes=6.0),
        "verdicts": Case("verdicts"),
    }
    if model:
        found["full_size"] = Case("full_size", gigabytes=16.0)
    for precision in ("fp32", "bf16") if model else ():
        own = ("--model", str(model), "--precision", precision)
        found |= {
            f"trl_model_{precision}": Case("against_trl", (
                *own, *LARGE_MODEL, "--prompts", "2", "--samples", "8", "--max-new-tokens", "128",
                "--pairs", "2", "--micro-batch-tokens", "1024", "--trl-rows", "4"),
                precision, 12.0),
            f"generate_model_{precision}": Case("against_generate", (
                *own, *LARGE_MODEL, "--prompts", "8", "--samples", "8", "--pairs", "2",
                "--max-new-tokens", "32"),
                precision, 6.0),
            f"ceiling_model_{precision}": Case("ceiling", (
                *own, "--prompts", "2", "--samples", "8", "--pairs", "2", "--prompt-tokens", "100",
                "--max-new-tokens", "64"),
                precision, 10.0),
        }
    return found


def unfit(case: Case, device: torch.device) -> str | None:
    """Why a case does not fit this machine, if it does not."""
    if case.precision == "bf16":
        able = (torch.cuda.is_bf16_supported() if device.type == "cuda"
                else torch.ops.mkldnn._is_mkldnn_bf16_supported())
        if not able:
            return "no arithmetic in bf16 here"
    free = (torch.cuda.mem_get_info()[0] if device.type == "cuda"
            else psutil.virtual_memory().available) / 2**30
    if free < case.gigabytes:
        return f"{case.gigabytes:.0f} GiB of memory needed, {free:.0f} free"
    return None


def measure(case: Case, threads: int) -> dict:
    """Runs a case in a process of its own, its output on ours; returns its record."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        limit = [] if case.script == "verdicts" else ["--threads", str(threads)]
        command = [sys.executable, str(HERE / f"{case.script}.py"), *case.options, *limit,
                   "--json", str(path)]
        subprocess.run(command, check=True, timeout=TIME_LIMIT, stderr=subprocess.DEVNULL)
        return json.loads(path.read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> dict:
    """Runs, writes and returns all records of this device."""
    parser = argparse.ArgumentParser(description="All benchmarks that fit this machine.")
    parser.add_argument("--model", help="a folder, GGUF file or hub name of a model of about 0.1 "
                                        "billion weights; without it the tiny model alone")
    parser.add_argument("--only", nargs="*", metavar="CASE",
                        help="run these cases alone; with no name make the page again")
    parser.add_argument("--threads", type=positive_number, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=project_folder() / "results/runs/bench",
                        help="the folder; default: results/runs/bench")
    arguments = parser.parse_args(argv)
    known = cases(arguments.model)
    for name in arguments.only or ():
        if name not in known:
            raise UsageError(f"There is no case {name!r}; the cases are {', '.join(known)}"
                             + ("." if arguments.model else ", and more with --model."))
    device = choose_device()
    here = machine("suite", device)
    path = arguments.out / f"{re.sub(r'[^a-z0-9]+', '-', here['device'].lower()).strip('-')}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {"device": here["device"], "cases": found.get("cases", {}),
             "left_out": found.get("left_out", {})}
    failed = []
    for name in known if arguments.only is None else arguments.only:
        reason = unfit(known[name], device)
        if reason:
            print(f"{name}: left out, {reason}")
            found["left_out"][name] = reason
            continue
        print(f"\n== {name}", flush=True)
        began = time.perf_counter()
        try:
            record = measure(known[name], arguments.threads)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failed.append(f"{name} ({type(error).__name__})")
            continue
        found["left_out"].pop(name, None)
        found["cases"][name] = record | {"seconds_in_all": round(time.perf_counter() - began, 1)}
        write_whole(path, to_json(found, indent=1) + "\n")
    write_page(found, path.with_suffix(".md"))
    print(f"\n{path}\n{path.with_suffix('.md')}")
    if failed:
        raise UserError("These benchmarks failed: " + ", ".join(failed) + "; run the first alone "
                        f"with {HERE.name}/suite.py --only to see why.")
    return found


if __name__ == "__main__":
    sys.exit(run(main))

"""Two steps a stage of the six setups at Qwen2.5-0.5B's size, with all weights and with LoRA.

The model has the paper's architecture and random weights, so that nothing has to be fetched: it
shows that every setup runs at that size, and what memory it takes; its answers mean nothing. Each
run is a process of `hybridrl run`, and its manifest says what was estimated and measured. See
README.md beside this file.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from common import add_threads_and_json, finish, machine, print_table, run
from networks import make_network, tiny_tokenizer

from hybridrl_lib.config.presets import get_setup
from hybridrl_lib.machine.shapes import KNOWN_SHAPES
from hybridrl_lib.records.run_folder import RunFolder
from hybridrl_lib.setups import paper_setups
from hybridrl_lib.system.errors import UserError

SMALL = ("data.train_limits=1,1", "data.validation_limits=1,1", "data.test_limits=1,1",
         "sft.batch_size=2", "rl.prompts_per_step=2", "rl.group_size=2", "rl.max_new_tokens=16",
         "evaluation.samples=0", "evaluation.train_samples=0", "evaluation.train_limit=1",
         "evaluation.max_new_tokens=16", "evaluation.batch_size=8", "probe.prompts=1",
         "probe.samples=2", "training.micro_batch_tokens=256", "training.logit_chunk_tokens=128",
         "model.gradient_checkpointing=true",
         # A random model is never right: without this KL RL's updates would have nothing to do.
         "rl.kl_anchor=reference")


def make_model(folder: Path) -> None:
    """A model folder of that shape, with the tiny model's tokenizer."""
    tokenizer = tiny_tokenizer()
    make_network(KNOWN_SHAPES["Qwen/Qwen2.5-0.5B"], tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def take(setup: str, adapter: str, model: Path, results: Path) -> RunFolder:
    """One run in a process of its own.

    Raises:
        UserError: it failed.
    """
    epochs = 2 * len(get_setup(setup).stages)  # of one step each
    done = subprocess.run(
        [sys.executable, "-m", "hybridrl_lib.cli", "run", setup, "--preset", "tiny",
         "--experiment", adapter, "--set", *SMALL, f"training.epochs={epochs}",
         f"model.path={model}", f"model.adapter={adapter}"],
        env={**os.environ, "HYBRIDRL_RESULTS_DIR": str(results),
             "OMP_NUM_THREADS": str(torch.get_num_threads())}, capture_output=True, text=True,
        check=False)
    if done.returncode:
        raise UserError(f"{setup}, adapter {adapter}: {done.stderr.strip().splitlines()[-1]}")
    return RunFolder(results / adapter / setup / "seed-0")


def main(argv: Sequence[str] | None = None) -> dict:
    """Measures, prints a table and the JSON line; returns what the line holds."""
    parser = argparse.ArgumentParser(description="Every setup at the paper's model size.")
    parser.add_argument("--setups", nargs="+", metavar="NAME",
                        default=[name for name in paper_setups() if get_setup(name).stages])
    add_threads_and_json(parser)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads or 1)
    record = machine("full_size", torch.device("cpu")) | {
        "model": "Qwen2.5-0.5B's architecture, random weights", "settings": list(SMALL),
        "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "qwen2.5-0.5b-random"
        make_model(model)
        for adapter in ("none", "lora"):
            for setup in arguments.setups:
                with tempfile.TemporaryDirectory() as results:  # a checkpoint has gigabytes
                    done = take(setup, adapter, model, Path(results))
                    manifest, rows = done.read("manifest.json"), done.lines("metrics.jsonl")
                    record["runs"].append({
                        "setup": setup, "adapter": adapter, "steps": manifest["steps"],
                        "parameters": manifest["model"]["parameters"],
                        "trained": manifest["model"]["trained_parameters"],
                        "updates": sum(row["updates"] for row in rows),
                        "finite": manifest["updates_not_finite"] == 0,
                        "measured_peak_mib": round(manifest["memory"]["measured_peak"] / 2**20),
                        "estimated_peak_mib": round(manifest["memory"]["estimated_peak"] / 2**20),
                        "minutes": round(manifest["seconds/wall"] / 60, 2)})
                    print(record["runs"][-1], file=sys.stderr, flush=True)
    print_table(("setup", "adapter", "steps", "trained", "peak, MiB", "estimated", "minutes"),
                [[r["setup"], r["adapter"], str(r["steps"]), f"{r['trained']:,}",
                  f"{r['measured_peak_mib']:,}", f"{r['estimated_peak_mib']:,}",
                  f"{r['minutes']:.1f}"] for r in record["runs"]])
    return finish(record, arguments.json)


if __name__ == "__main__":
    sys.exit(run(main))

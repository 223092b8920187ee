"""Writes an experiment folder as finished runs leave it, with made-up but plausible numbers."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybridrl_lib.config.presets import load_settings, settings_to_dict
from hybridrl_lib.setups import SETUPS, paper_setups

GROUP = 8
STEPS_PER_EPOCH = {"sft": 14, "rl": 54}
# End of training on the logit scale, above the base model; other setups gain OTHER_GAIN.
OTHER_GAIN = 2.5
GAIN = {"base": 0.0, "sft": 0.9, "rl": 1.7, "sft_then_rl": 2.0, "sft_entropy": 0.8,
        "rl_entropy": 1.6, "sft_then_rl_entropy": 1.9}
DIFFICULTY = {"tiny_word": 0.0, "tiny_symbolic": 0.7, "gsm8k": 2.0, "math500": 2.4}


def build_experiment(folder: Path, setups: Iterable[str] = paper_setups(),
                     seeds: Iterable[int] = range(5), test: Mapping[str, int] | None = None,
                     train: Mapping[str, int] | None = None, samples: int = 16, epochs: int = 10,
                     random_seed: int = 0) -> Path:
    """Writes the runs of `setups` x `seeds` (the base model once) and returns `folder`."""
    test = {"tiny_word": 192, "tiny_symbolic": 128} if test is None else test
    train = {"tiny_word": 252, "tiny_symbolic": 180} if train is None else train
    ease = {(part, benchmark): np.random.default_rng([random_seed, index, number]).normal(
                -DIFFICULTY.get(benchmark, 0.0), 2.0, count)
            for index, (part, counts) in enumerate((("test", test), ("train", train)))
            for number, (benchmark, count) in enumerate(counts.items())}
    for setup in setups:
        for seed in [0] if setup == "base" else seeds:
            write_run(folder / setup / f"seed-{seed}", setup, seed, ease, samples, epochs,
                      random_seed)
    return folder


def write_run(folder: Path, setup: str, seed: int, ease: Mapping[tuple[str, str], np.ndarray],
              samples: int, epochs: int, random_seed: int) -> None:
    """Writes one run's files."""
    folder.mkdir(parents=True)
    random = np.random.default_rng([random_seed, list(SETUPS).index(setup), seed])
    settings = settings_to_dict(load_settings("tiny", smoke=False))
    settings["training"]["epochs"] = epochs
    write_json(folder / "config.json", {"setup": setup, "seed": seed, "preset": "tiny",
                                        "experiment": "synthetic", "settings": settings})
    write_json(folder / "manifest.json", manifest(setup, random))
    metrics, probe = curves(setup, epochs, random)
    write_jsonl(folder / "metrics.jsonl", metrics)
    write_jsonl(folder / "probe.jsonl", probe)
    shift = GAIN.get(setup, OTHER_GAIN) + (random.normal(0.0, 0.1) if setup != "base" else 0.0)
    lines = []
    for (part, benchmark), problems in ease.items():
        gain = shift + (0.6 if part == "train" and setup != "base" else 0.0)
        lines += answers("last", part, benchmark, problems + gain, samples, random)
        if part == "test" and setup != "base":
            lines += answers("best", part, benchmark, problems + gain, 0, random)
    write_jsonl(folder / "eval.jsonl", lines)


def answers(checkpoint: str, part: str, benchmark: str, logits: np.ndarray, samples: int,
            random: np.random.Generator) -> list[dict[str, Any]]:
    """The lines of eval.jsonl for one checkpoint, part, and benchmark."""
    share = 1.0 / (1.0 + np.exp(-logits))
    lines = []
    for index, chance in enumerate(share):
        strict = bool(random.random() < 1.0 / (1.0 + np.exp(-3.0 * (logits[index] + 0.5))))
        line = {"checkpoint": checkpoint, "part": part, "benchmark": benchmark,
                "id": f"{benchmark}-{part}-{index}", "gold": str(index), "level": None,
                "subject": None,
                "greedy": {"text": f"3 + 4 = 7\n\\boxed{{{index}}}", "strict": strict,
                           "lenient": strict or bool(random.random() < 0.1),
                           "tokens": int(random.integers(12, 40)), "finished": True}}
        if samples:
            right = random.random(samples) < chance
            line["samples"] = {"strict": right.astype(int).tolist(),
                               "lenient": (right | (random.random(samples) < 0.05)).astype(int)
                               .tolist(),
                               "tokens": random.integers(12, 40, samples).tolist()}
        lines.append(line)
    return lines


def curves(setup: str, epochs: int, random: np.random.Generator
           ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of metrics.jsonl and probe.jsonl."""
    stages = SETUPS[setup].stages
    entropy_term = SETUPS[setup].entropy
    shares = [epochs - epochs // 2, epochs // 2] if len(stages) > 1 else [epochs] * len(stages)
    level, chaos, drift, length, step, epoch = -1.0, 0.42, 0.0, 24.0, 0, 0.0
    end = -1.0 + GAIN.get(setup, OTHER_GAIN) * 1.2
    problems = np.random.default_rng(7).normal(0.0, 1.5, 32)  # the same prompts for all setups
    metrics, probe = [], [probe_line(0, stages[0] if stages else "", 0.0, level, chaos, drift,
                                     length, problems, random)]
    for stage, stage_epochs in zip(stages, shares, strict=True):
        floor = (0.25 if stage == "sft" else 0.06) + (0.06 if entropy_term else 0.0)
        for _ in range(stage_epochs * STEPS_PER_EPOCH[stage]):
            step += 1
            epoch += 1.0 / STEPS_PER_EPOCH[stage]
            speed = 2.5 / (epochs * STEPS_PER_EPOCH[stage])
            goal = end if stage == stages[-1] else -1.0 + 0.9 * GAIN["sft"]
            level += speed * (goal - level) + random.normal(0.0, 0.01)
            chaos += speed * (floor - chaos)
            drift += speed * ((0.35 if stage == "sft" else 0.22) - 0.03 * entropy_term - drift)
            length += speed * ((21.0 if stage == "sft" else 17.0) - length)
            line = {"step": step, "stage": stage, "epoch": epoch, "grad_norm": 0.5,
                    f"lambda/{stage}": 1.0, "learning_rate": 1e-4, "seconds/step": 0.2,
                    "updates": 1 if stage == "sft" else 2}
            if stage == "sft":
                line["loss/sft"] = 0.15 + 0.9 * float(np.exp(-step / 40)) + random.normal(0, 0.02)
            else:
                line |= {"loss/rl": random.normal(0.0, 0.03) + 0.01 * drift,
                         "entropy": chaos, "clip_ratio": 0.01, "kl/old": 0.001}
            metrics.append(line)
            if step % 10 == 0:
                probe.append(probe_line(step, stage, epoch, level, chaos, drift, length, problems,
                                        random))
    return metrics, probe


def probe_line(step: int, stage: str, epoch: float, level: float, chaos: float, drift: float,
               length: float, problems: np.ndarray, random: np.random.Generator) -> dict[str, Any]:
    """One line of probe.jsonl: 32 groups of GROUP samples."""
    right = random.binomial(GROUP, 1.0 / (1.0 + np.exp(-(level + problems))))
    return {"step": step, "stage": stage, "epoch": epoch, "reward": float(right.mean()) / GROUP,
            "entropy": chaos + random.normal(0.0, 0.004),
            "kl/base": max(0.0, drift + random.normal(0.0, 0.004) * (step > 0)),
            "completions/mean_length": length + random.normal(0.0, 0.2),
            "groups/correct_counts": np.bincount(right, minlength=GROUP + 1).tolist(),
            "groups_with_signal": float(((right > 0) & (right < GROUP)).mean())}


def manifest(setup: str, random: np.random.Generator) -> dict[str, Any]:
    """A finished run's manifest."""
    seconds = 30.0 + 20.0 * len(SETUPS[setup].stages) + float(random.random())
    return {"git_commit": "0123456789abcdef0123456789abcdef01234567", "git_dirty": False,
            "numerics_version": 1, "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "device": "cpu", "precision": "fp32",
            "model": {"name": "tiny", "parameters": 800_000, "sha256": "ab" * 32},
            "data": {"tiny_word": {"revision": "tiny-v1",
                                   "problems": {"train": 252, "validation": 28, "test": 192}}},
            "seconds/wall": seconds, "seconds/device": seconds * 0.9,
            "tokens": {"demonstrations": 100_000, "rollouts": 200_000}, "resumed_from": [],
            "complete": True}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes one JSON file."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

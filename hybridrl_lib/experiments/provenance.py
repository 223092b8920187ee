"""What produced a record: commit, versions, device, memory."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..config.settings import Settings
from ..machine.memory import PeakMemory
from ..machine.memory_estimate import Estimate
from ..problems.splits import ProblemParts
from ..records.run_folder import NUMERICS_VERSION
from ..system.paths import PACKAGE
from ..system.processes import size
from ..training.trainer import Trainer

PACKAGES = ("torch", "transformers", "datasets", "peft", "accelerate", "tokenizers", "safetensors",
            "math-verify", "numpy", "papermill")


def manifest_of(trainer: Trainer, parts: ProblemParts, preset: str, seconds: list[float]) -> dict:
    """The content of manifest.json of a finished run."""
    policy, folder = trainer.policy, trainer.folder
    return {
        **provenance(), "setup": trainer.method.setup.name, "seed": trainer.seed, "preset": preset,
        "device": device_name(policy.device), "precision": policy.precision,
        "threads": torch.get_num_threads(), "processes": size(),
        "model": {"name": policy.name, "parameters": policy.parameter_count(),
                  "trained_parameters": sum(p.numel() for p in trainer.learner.parameters),
                  "sha256": policy.sha256,
                  **({"revision": policy.revision} if policy.revision else {})},
        "data": {name: {"revision": parts.revisions.get(name), "problems": dict(counts)}
                 for name, counts in parts.counts.items()},
        "updates_not_finite": trainer.not_finite,
        "steps": trainer.step, "tokens": trainer.tokens, "best_on_validation": trainer.best,
        "verdicts": dict(trainer.verifier.counts), "resumed_from": trainer.resumed_from,
        "checksums": folder.checksums(),
        "seconds/wall": seconds[0], "seconds/device": seconds[1],
        "complete": True}


def memory_record(settings: Settings, expected: Estimate | None, peak: PeakMemory) -> dict:
    """Estimated and measured peak in bytes, and the micro-batches used."""
    record = {"measured_peak": peak.read(), "measured_on": peak.device,
              "micro_batch_tokens": settings.training.micro_batch_tokens}
    if expected is not None:
        record |= {"estimated_peak": expected.peak, "estimated_phase": expected.phase,
                   "estimated_parts": expected.phases[expected.phase]}
    return record


def provenance() -> dict:
    """What produced a record: commit, versions, machine; no host name or path."""
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    commit, dirty = git_state()
    return {"git_commit": commit, "git_dirty": dirty, "numerics_version": NUMERICS_VERSION,
            "versions": {"python": platform.python_version(),
                         **{name: installed(name) for name in PACKAGES}},
            "started_by": Path(sys.argv[0]).name}


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the package's checkout, and whether its code has changes."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True,
                              check=True, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"}).stdout

    try:
        return git("rev-parse", "HEAD").strip(), bool(
            git("status", "--porcelain", "--untracked-files=no", "hybridrl_lib").strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None


def device_name(device: torch.device) -> str:
    """The device in words: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU: {model}, {os.cpu_count()} cores"

"""One run: a setup trained and evaluated at a preset and a seed, with its record."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .card import write_card
from .checkpoints import Checkpoints
from .config import (
    MEMORY_ALONE,
    Settings,
    default_experiment,
    difference,
    load_settings,
    resolve_preset,
    settings_from_dict,
    settings_to_dict,
)
from .distributed import (
    SharedVerifier,
    begin,
    from_first,
    is_first,
    launched,
    size,
    wants_shards,
)
from .errors import UsageError, UserError, memory_errors
from .evaluation import evaluate, signal_lines
from .locks import only_writer
from .memory import PeakMemory, fit_to_device, room_for, tight, with_micro_batches
from .memory_estimate import Estimate
from .methods import make_method
from .methods.method import Method
from .model_shapes import shape_from
from .policy import KNOWN, Policy, choose_device, load_policy
from .problems import ProblemParts, load_parts
from .progress import Lines, Observer, Stopwatch
from .records import (
    ANSWERS,
    NUMERICS_VERSION,
    RunFolder,
    experiment_folder,
    run_folder,
    write_folder,
)
from .rewards import Verifier
from .setups import get_setup
from .sharding import whole
from .training import Trainer

PACKAGES = ("torch", "transformers", "datasets", "peft", "accelerate", "tokenizers", "safetensors",
            "math-verify", "numpy", "papermill")


def run(setup: str, preset: str = "tiny", seed: int = 0, experiment: str | None = None,
        settings: str | Sequence[str] = (), observer: Observer | None = None) -> RunFolder:
    """Trains a setup, evaluates it and leaves its record. A finished run is not run again.

    Args:
        setup: a name of `setups.SETUPS`; `base` evaluates the untrained model.
        preset: a preset's name, or `auto`.
        seed: order of the problems and all sampling.
        experiment: the folder under `results/runs/`; the preset's name unless given.
        settings: differences from the preset, as after `--set`.
        observer: told what happens; prints plain lines unless given.

    Returns:
        The run's folder.

    Raises:
        UserError: the folder holds a run with other settings, data or model cannot be had, memory
            ran out, ...
    """
    chosen, preset = get_setup(setup), resolve_preset(preset)
    resolved = load_settings(preset, settings, setup=chosen)
    method = make_method(chosen, resolved)  # refuses impossible settings before anything is loaded
    experiment = experiment or default_experiment(preset)
    folder = run_folder(experiment_folder(experiment), setup, seed)
    refuse_processes(resolved)
    begin(resolved.model.device)
    folder.silent = not is_first()
    observer = Observer() if folder.silent else observer or Lines(name=f"{setup} seed {seed}")
    config = {"setup": setup, "seed": seed, "preset": preset, "experiment": experiment,
              "numerics_version": NUMERICS_VERSION, "settings": settings_to_dict(resolved)}
    checkpoints = Checkpoints(folder)

    def open_folder() -> bool:
        """Takes hold of the folder; returns whether its run is finished."""
        # Nobody writes a finished run any more: it can be read where nothing can be written.
        if not folder.is_complete or checkpoints.left_over():
            held.enter_context(only_writer(folder.path, f"The run {setup}/seed-{seed}"))
        _claim(folder, config, resolved)
        if folder.is_complete:
            _check_unaltered(folder)
        return folder.is_complete

    with memory_errors(), ExitStack() as held:
        if from_first(open_folder):
            observer.note("already complete; its record is read, nothing is run again")
        else:
            _train_and_evaluate(method, seed, preset, resolved, folder, observer)
        from_first(checkpoints.drop)
    return folder


def refuse_processes(settings: Settings) -> None:
    """Refuses settings that need a single process, or whole weights in every one.

    Raises:
        UsageError: the run was started in several, or with FSDP.
    """
    if settings.model.sampler == "vllm" and launched() > 1:
        settings.model.refuse("sampler", "vllm samples for a single process; set it to own")
    if not wants_shards():
        return
    if settings.model.precision == "fp16":
        settings.model.refuse("precision", "the loss scale of fp16 does not work with FSDP; choose "
                              "bf16 or fp32")
    if settings.rl.beta > 0 and settings.rl.kl_anchor == "stage":
        settings.rl.refuse("kl_anchor", "FSDP has no room for the weights that a stage began with; "
                           "choose old or reference, or launch it without --use_fsdp")


def _train_and_evaluate(method: Method, seed: int, preset: str, resolved: Settings,
                        folder: RunFolder, observer: Observer) -> None:
    """Fills the folder of a run that is not complete."""
    if preset == "tiny" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the order of sums, hence the record, must not vary with cores
    clock = Stopwatch()
    parts = from_first(lambda: load_parts(resolved.data))
    device, asked = choose_device(resolved.model.device).type, resolved.training.micro_batch_tokens
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if device == "cpu" else 1
    peak, room = PeakMemory(device), from_first(lambda: room_for(resolved, device, here))
    resolved = from_first(lambda: _with_kept_micro_batches(resolved, folder))
    # What FSDP takes was never measured on several GPUs, so there the estimate refuses nothing;
    # nor does it where nothing is trained.
    refuse = bool(method.stages) and not wants_shards()
    resolved, expected = fit_to_device(resolved, room, refuse=refuse)  # before a model is loaded
    policy = load_policy(resolved.model, observer.note)
    if wants_shards() and policy.model.config.model_type not in KNOWN:
        raise UsageError(f"FSDP works with the architectures {' and '.join(KNOWN)}, and this model "
                         f"is {policy.model.config.model_type}; launch it without --use_fsdp.")
    if expected is None:
        shape = shape_from(policy.model.config.to_dict())
        resolved, expected = fit_to_device(resolved, room, shape, refuse=refuse)
    if expected is None and not resolved.training.micro_batch_tokens:
        raise UserError(f"How much memory {policy.name} needs is not known, so training."
                        "micro_batch_tokens cannot be 0; set it to a number, such as 4096.")
    if expected is not None and method.stages and (note := tight(expected, room)):
        observer.note(note)
    if not asked:
        from_first(lambda: folder.write("config.json", folder.read("config.json") | {
            "micro_batch_tokens": resolved.training.micro_batch_tokens}))
    parts = fit_to_policy(parts, policy, resolved, observer)
    with Verifier(resolved.verifier.workers, resolved.verifier.time_limit) as own_verifier:
        verifier = own_verifier if size() == 1 else SharedVerifier(own_verifier)
        trainer = Trainer(policy, method, parts, resolved,
                          with_entropy=method.setup.entropy, seed=seed, folder=folder,
                          verifier=verifier, observer=observer, clock=clock)
        trainer.train()
        observer.note("evaluating")
        rows = _evaluate(trainer, parts, resolved, verifier, seed)
        folder.write_lines(ANSWERS, rows)
        if not trainer.step:
            for line in signal_lines(rows, resolved.rl.group_size):
                observer.note(line)
        seconds = trainer.seconds()

        def finish() -> None:
            changes = folder.read("config.json").get("memory_changes")
            folder.sync_logs()  # all of the record is on the disk before its manifest says so
            manifest = _manifest(trainer, parts, preset, seconds) | {
                "memory": memory_record(resolved, expected, peak) | (
                    {"changes": changes} if changes else {})}

            def save(final: Path) -> None:
                policy.save(final)
                write_card(final, manifest, folder.read("config.json"), rows)

            write_folder(folder.path / "checkpoint" / "final", save)
            folder.write("manifest.json", manifest)

        with whole(policy.model):
            from_first(finish)
    observer.note(f"done in {seconds[0]:.0f} s")


def _with_kept_micro_batches(settings: Settings, folder: RunFolder) -> Settings:
    """A resumed run goes on with the micro-batches that it began with, whatever is free now."""
    kept = folder.read("config.json").get("micro_batch_tokens")
    known = isinstance(kept, int) and kept > 0 and folder.has_begun
    return settings if settings.training.micro_batch_tokens or not known else with_micro_batches(
        settings, kept)


def _manifest(trainer: Trainer, parts: ProblemParts, preset: str, seconds: list[float]) -> dict:
    """What manifest.json says about a run that is finished."""
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
    """Estimated and measured peak in bytes, and the micro-batches that were taken."""
    record = {"measured_peak": peak.read(), "measured_on": peak.device,
              "micro_batch_tokens": settings.training.micro_batch_tokens}
    if expected is not None:
        record |= {"estimated_peak": expected.peak, "estimated_phase": expected.phase,
                   "estimated_parts": expected.phases[expected.phase]}
    return record


def _claim(folder: RunFolder, config: dict, settings: Settings) -> None:
    """Writes config.json, or refuses a folder that holds a run with other settings.

    A run that ended before it left anything, say for a misspelt model.path, binds nobody. One that
    ran out of memory goes on with other settings of memory alone, and config.json says so.
    """
    before = folder.read("config.json")
    if before is None or not folder.has_begun:
        folder.write("config.json", config)
        return
    run = (f"The run {folder.path.parent.name}/{folder.path.name} of experiment "
           f"{config['experiment']}")
    old = settings_from_dict(before["settings"])
    if others := difference(old, settings, ignored=MEMORY_ALONE):
        raise UserError(f"{run} was made with other settings ({'; '.join(others)}); choose "
                        "another --experiment or delete its folder.")
    folder.refuse_other_numerics(config["experiment"])
    if (changes := difference(old, settings)) and not folder.is_complete:
        after = before | {"settings": config["settings"],
                          "memory_changes": [*before.get("memory_changes", ()), *changes]}
        if any(change.startswith("training.micro_batch_tokens") for change in changes):
            after.pop("micro_batch_tokens", None)  # what the run chose by itself
        folder.write("config.json", after)


def _check_unaltered(folder: RunFolder) -> None:
    """Refuses a finished run whose files are no longer those that were written."""
    altered = folder.altered()
    if altered:
        raise UserError(f"{altered[0]} of the finished run {folder.path.parent.name}/"
                        f"{folder.path.name} is damaged or was changed (its checksum is another "
                        "one); get it back from a copy, or delete the run's folder and run it "
                        "again.")


def fit_to_policy(parts: ProblemParts, policy: Policy, settings: Settings,
                  observer: Observer) -> ProblemParts:
    """Leaves out training and validation problems that are too long for the settings' caps."""
    data = settings.data

    def fits(problem) -> bool:
        return (len(policy.encode_prompt(problem.question)) <= data.max_prompt_tokens and
                len(policy.encode_completion(problem.solution)) <= data.max_demonstration_tokens)

    train, validation = (tuple(p for p in part if fits(p))
                         for part in (parts.train, parts.validation))
    dropped = len(parts.train) + len(parts.validation) - len(train) - len(validation)
    if dropped:
        observer.note(f"{dropped} training or validation problems are over the length caps "
                      "(data.max_prompt_tokens, data.max_demonstration_tokens) and left out")
    if not train:
        raise UserError("No training problem is left after data.max_prompt_tokens and "
                        "data.max_demonstration_tokens; raise these caps.")
    counts = {name: {**old, "train": sum(p.benchmark == name for p in train),
                     "validation": sum(p.benchmark == name for p in validation)}
              for name, old in parts.counts.items()}
    return replace(parts, train=train, validation=validation, counts=counts)


def _evaluate(trainer: Trainer, parts: ProblemParts, settings: Settings, verifier: Verifier,
              seed: int) -> list[dict]:
    """Rows for the last weights on test and training part, then for the best on validation.

    The base model answers each training problem at least G times: it shows what RL begins with.
    """
    evaluation, policy = settings.evaluation, trainer.policy
    train_samples = evaluation.train_samples
    if not trainer.method.stages:
        train_samples = max(train_samples, settings.rl.group_size)
    train = first_per_benchmark(parts.train, evaluation.train_limit)
    rows = evaluate(policy, parts.test, evaluation, verifier, part="test",
                    samples=evaluation.samples, seed=seed)
    rows += evaluate(policy, train, evaluation, verifier, part="train",
                     samples=train_samples, seed=seed)
    last = trainer.copy_of_weights()
    if trainer.use_best_weights():
        rows += evaluate(policy, parts.test, evaluation, verifier, part="test",
                         checkpoint="best", samples=0, seed=seed)
        trainer.load_weights(last)
    return rows


def first_per_benchmark(problems: Sequence, limit: int | None) -> list:
    """The first `limit` problems of each benchmark (all of them for None)."""
    taken: dict[str, int] = {}
    chosen = []
    for problem in problems:
        taken[problem.benchmark] = taken.get(problem.benchmark, 0) + 1
        if limit is None or taken[problem.benchmark] <= limit:
            chosen.append(problem)
    return chosen


def provenance() -> dict:
    """What produced a record: commit, versions, machine; no host name and no path."""
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    commit, dirty = _git_state()
    return {"git_commit": commit, "git_dirty": dirty, "numerics_version": NUMERICS_VERSION,
            "versions": {"python": platform.python_version(),
                         **{name: installed(name) for name in PACKAGES}},
            "started_by": Path(sys.argv[0]).name}


def _git_state() -> tuple[str | None, bool | None]:
    """Commit of the checkout this package lies in and whether its code has changes."""
    root = Path(__file__).resolve().parent.parent
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

"""One run: a setup trained and evaluated at a preset and a seed, with its record."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from ..config.presets import (
    default_experiment,
    get_setup,
    load_settings,
    resolve_preset,
    settings_to_dict,
)
from ..config.settings import Settings
from ..machine.memory import PeakMemory, fit_to_device, room_for, tight
from ..machine.shapes import shape_from
from ..methods.method import Method
from ..methods.registry import make_method
from ..policy.device import choose_device
from ..policy.loading import load_policy
from ..policy.policy import Policy
from ..problems.problem import Problem
from ..problems.splits import ProblemParts, load_parts
from ..records.files import write_folder
from ..records.folders import experiment_folder
from ..records.locks import only_writer
from ..records.run_folder import ANSWERS, NUMERICS_VERSION, RunFolder, run_folder
from ..report.card import write_card
from ..report.group_signal import signal_lines
from ..rewards.shared import SharedVerifier
from ..rewards.verifier import Verifier
from ..system.errors import UserError, memory_errors
from ..system.processes import begin, from_first, is_first, launched, size
from ..training.checkpoints import Checkpoints
from ..training.evaluation import evaluate
from ..training.observer import Lines, Observer, Stopwatch
from ..training.trainer import Trainer
from .claim import claim, refuse_altered, with_kept_micro_batches
from .provenance import manifest_of, memory_record


def run(setup: str, preset: str = "tiny", seed: int = 0, experiment: str | None = None,
        settings: str | Sequence[str] = (), observer: Observer | None = None) -> RunFolder:
    """Trains a setup, evaluates it, and leaves its record. A finished run is not run again.

    Args:
        setup: a name of `setups.SETUPS`; `base` evaluates the untrained model.
        preset: a preset's name, or `auto`.
        seed: order of the problems and all sampling.
        experiment: the folder under `results/runs/`; default: the preset's name.
        settings: differences from the preset, as in `--set`.
        observer: receives the events; default: prints plain lines.

    Returns:
        The run's folder.

    Raises:
        UserError: the folder holds a run with other settings, data or model are not available,
            memory ran out, ...
    """
    chosen, preset = get_setup(setup), resolve_preset(preset)
    resolved = load_settings(preset, settings, setup=chosen)
    method = make_method(chosen, resolved)
    experiment = experiment or default_experiment(preset)
    folder = run_folder(experiment_folder(experiment), setup, seed)
    if resolved.model.sampler == "vllm" and launched() > 1:
        resolved.model.refuse("sampler", "vllm samples for a single process; set it to own")
    begin(resolved.model.device)
    folder.silent = not is_first()
    observer = Observer() if folder.silent else observer or Lines(name=f"{setup} seed {seed}")
    config = {"setup": setup, "seed": seed, "preset": preset, "experiment": experiment,
              "numerics_version": NUMERICS_VERSION, "settings": settings_to_dict(resolved)}
    checkpoints = Checkpoints(folder)

    def open_folder() -> bool:
        """Claims the folder; returns whether its run is finished."""
        # Nobody writes to a finished run: it can be read from a read-only folder.
        if not folder.is_complete or checkpoints.left_over():
            held.enter_context(only_writer(folder.path, f"The run {setup}/seed-{seed}"))
        claim(folder, config, resolved)
        if folder.is_complete:
            refuse_altered(folder)
        return folder.is_complete

    with memory_errors(), ExitStack() as held:
        if from_first(open_folder):
            observer.note("already finished; its record is read and nothing is run again")
        else:
            _train_and_evaluate(method, seed, preset, resolved, folder, observer)
        from_first(checkpoints.drop)
    return folder


def _train_and_evaluate(method: Method, seed: int, preset: str, resolved: Settings,
                        folder: RunFolder, observer: Observer) -> None:
    """Fills the folder of a run that is not complete."""
    if preset == "tiny" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the order of sums, hence the record, must not depend on cores
    clock = Stopwatch()
    parts = from_first(lambda: load_parts(resolved.data))
    device, asked = choose_device(resolved.model.device).type, resolved.training.micro_batch_tokens
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if device == "cpu" else 1
    peak, room = PeakMemory(device), from_first(lambda: room_for(resolved, device, here))
    resolved = from_first(lambda: with_kept_micro_batches(resolved, folder))
    trains = bool(method.stages)  # otherwise the estimate refuses nothing
    resolved, expected = fit_to_device(resolved, room, refuse=trains)  # before a model is loaded
    policy = load_policy(resolved.model, observer.note)
    if expected is None:
        shape = shape_from(policy.model.config.to_dict())
        resolved, expected = fit_to_device(resolved, room, shape, refuse=trains)
    if expected is None and not resolved.training.micro_batch_tokens:
        raise UserError(f"The memory that {policy.name} needs is unknown, so training."
                        "micro_batch_tokens cannot be 0; set it to a number, such as 4096.")
    if expected is not None and trains and (note := tight(expected, room)):
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
            folder.sync_logs()  # the whole record is on disk before its manifest says so
            manifest = manifest_of(trainer, parts, preset, seconds) | {
                "memory": memory_record(resolved, expected, peak) | (
                    {"changes": changes} if changes else {})}

            def save(final: Path) -> None:
                policy.save(final)
                write_card(final, manifest, folder.read("config.json"), rows)

            write_folder(folder.path / "checkpoint" / "final", save)
            folder.write("manifest.json", manifest)

        from_first(finish)
    observer.note(f"done in {seconds[0]:.0f} s")


def fit_to_policy(parts: ProblemParts, policy: Policy, settings: Settings,
                  observer: Observer) -> ProblemParts:
    """Drops training and validation problems that are longer than the settings allow."""
    data = settings.data

    def fits(problem: Problem) -> bool:
        return (len(policy.encode_prompt(problem.question)) <= data.max_prompt_tokens and
                len(policy.encode_completion(problem.solution)) <= data.max_demonstration_tokens)

    train, validation = (tuple(p for p in part if fits(p))
                         for part in (parts.train, parts.validation))
    dropped = len(parts.train) + len(parts.validation) - len(train) - len(validation)
    if dropped:
        observer.note(f"{dropped} training or validation problems are longer than "
                      "data.max_prompt_tokens or data.max_demonstration_tokens and are left out")
    if not train:
        raise UserError("No training problem is left after data.max_prompt_tokens and "
                        "data.max_demonstration_tokens; raise these limits.")
    counts = {name: {**old, "train": sum(p.benchmark == name for p in train),
                     "validation": sum(p.benchmark == name for p in validation)}
              for name, old in parts.counts.items()}
    return replace(parts, train=train, validation=validation, counts=counts)


def _evaluate(trainer: Trainer, parts: ProblemParts, settings: Settings, verifier: Verifier,
              seed: int) -> list[dict]:
    """Rows for the last weights on test and training problems, then for the best on validation.

    The base model answers each training problem at least G times, to show what RL starts from.
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


def first_per_benchmark(problems: Sequence[Problem], limit: int | None) -> list[Problem]:
    """The first `limit` problems of each benchmark (all of them for None)."""
    taken: dict[str, int] = {}
    chosen = []
    for problem in problems:
        taken[problem.benchmark] = taken.get(problem.benchmark, 0) + 1
        if limit is None or taken[problem.benchmark] <= limit:
            chosen.append(problem)
    return chosen

"""What this machine has and which presets fit: `hybridrl doctor`.

Nothing is downloaded and no model is loaded; the hub gets one request with a short time limit.
"""

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..config.presets import load_settings, preset_names, resolve_preset
from ..config.settings import Settings
from ..problems import gsm8k, math500
from ..problems.source import FOLDER_HINT, FOLDER_VARIABLE
from ..setups import SETUPS, Setup
from ..system.errors import UserError
from ..system.hub import hub_problem, in_hub_cache
from .memory import (
    GIB,
    MICRO_BATCHES,
    NEEDS,
    TO_USE,
    fit,
    in_words,
    main_memory,
    tight,
    too_much,
    usable_cores,
    with_micro_batches,
)
from .memory_estimate import Estimate, estimate
from .shapes import shape_of

PACKAGES = ("torch", "transformers", "datasets", "peft", "accelerate", "papermill", "gguf")
OPTIONAL = {"gguf": "only needed to read GGUF files: pip install gguf"}
REAL_SOURCES = {"gsm8k": gsm8k.SOURCE, "math500": math500.SOURCE}
PRECISIONS = ("fp32", "bf16", "fp16")
Row = tuple[str, str, str]


@dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
        device: `cuda` or `cpu`; empty if torch cannot be imported.
        device_name: its name.
        precision: what `model.precision = auto` means here.
        gpu_memory, memory: GiB; 0 if there is none or it is unknown.
        hub: why the hub cannot be read; empty if it can.
        data: why the real problems cannot be read from a folder; empty if they can.
        tiny_model: whether the shipped model exists.
    """

    device: str
    device_name: str
    precision: str
    gpu_memory: float
    memory: float
    hub: str
    data: str
    tiny_model: bool


def report(preset: str | None = None) -> list[Row]:
    """(topic, value, advice) of everything checked; advice is empty if nothing needs to be done.

    Args:
        preset: the preset to judge; None for all.

    Raises:
        UsageError: the preset does not exist.
    """
    presets = preset_names() if preset is None else (resolve_preset(preset),)
    machine = look()
    return [
        ("python", f"{platform.python_version()} ({sys.executable})", ""),
        *(package_row(name) for name in PACKAGES),
        ("device", machine.device_name,
         "no CUDA GPU: tiny and smollm2 are made for this" if machine.device == "cpu" else ""),
        ("precision", machine.precision, ""),
        ("memory", gibibytes(machine.memory), ""),
        ("GPU memory", gibibytes(machine.gpu_memory), ""),
        ("tiny model", "shipped" if machine.tiny_model else "missing",
         "" if machine.tiny_model else "make it again with 'hybridrl pretrain-tiny'"),
        ("data folder", os.environ.get(FOLDER_VARIABLE, "") or "not set", machine.data),
        ("hub", "not reached" if machine.hub else "reachable", machine.hub),
        *(preset_row(name, machine) for name in presets),
        *(budget_rows(preset, machine) if preset else ())]


def render(preset: str | None = None, rows: list[Row] | None = None) -> str:
    """The report as text: a line per topic, with advice on the next line."""
    rows = report(preset) if rows is None else rows
    width = max(len(topic) for topic, _, _ in rows)
    lines = []
    for topic, value, advice in rows:
        lines.append(f"{topic:<{width}}  {value}")
        if advice:
            lines.append(f"{'':<{width}}  -> {advice}")
    return "\n".join(lines)


def look() -> Machine:
    """Examines the machine; as slow as importing torch and asking the hub."""
    try:
        from ..policy.device import choose_device, choose_precision
        from ..system.paths import tiny_model_folder
    except ImportError as error:
        return Machine("", f"unknown: {error}", "unknown", 0.0, main_memory(), hub_problem(),
                       folder_problem(), False)
    import torch

    device = choose_device()
    name, gpu_memory = f"CPU, {usable_cores()} cores", 0.0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu_memory = properties.total_memory / 2**30
        name = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    shipped = all((tiny_model_folder() / part).is_file()
                  for part in ("config.json", "tokenizer.json", "model.safetensors"))
    return Machine(device.type, name, choose_precision("auto", device), gpu_memory, main_memory(),
                   hub_problem(), folder_problem(), shipped)


def preset_row(name: str, machine: Machine) -> Row:
    """Whether a preset fits, and if not, all reasons."""
    problems = preset_problems(name, load_settings(name, smoke=False), machine)
    return f"preset {name}", "no" if problems else "yes", "; ".join(problems)


def budget_rows(preset: str, machine: Machine) -> list[Row]:
    """What a preset needs by the memory estimate, if its model's shape is known."""
    settings = load_settings(preset, smoke=False)
    shape = shape_of(settings.model)
    if shape is None:
        return []
    for_gpu, _ = NEEDS[preset]
    device = "cuda" if for_gpu else machine.device or "cpu"
    precision = precision_for(preset, machine)
    room = TO_USE * (machine.gpu_memory if device == "cuda" else machine.memory) * GIB
    try:
        chosen, expected = fit(settings, shape, precision, device, room)
        advice = tight(expected, room)
    except UserError as error:  # with the smallest micro-batches
        chosen = with_micro_batches(settings, settings.training.micro_batch_tokens
                                    or MICRO_BATCHES[-1])
        expected = estimate(shape, chosen, precision, device)
        advice = str(error) if room else ""
    where = "of the GPU" if device == "cuda" else "in addition to the program itself"
    rows = [("needs memory", f"estimated {expected.peak / GIB:.1f} GiB {where} at its peak, in "
             f"{precision} with micro-batches of {chosen.training.micro_batch_tokens} tokens",
             advice)]
    rows += [(f"  {phase}", f"{expected.total(phase) / GIB:.2f} GiB: {in_words(parts)}", "")
             for phase, parts in expected.phases.items()]
    if for_gpu:
        rows += setups_that_need_more(preset, precision, room)
    return rows


def setups_that_need_more(preset: str, precision: str, room: float) -> list[Row]:
    """Setups of a GPU preset that hold more models than the others, with what they need.

    Args:
        room: bytes of the GPU; 0 without one.
    """
    def least(setup: Setup | None) -> Estimate:
        settings = load_settings(preset, smoke=False, setup=setup)
        return estimate(shape_of(settings.model), with_micro_batches(settings, MICRO_BATCHES[-1]),
                        precision, "cuda")

    usual, rows = least(None), {}
    for name, setup in SETUPS.items():
        expected = least(setup)
        needed = expected.total(expected.surely)
        if needed < 1.1 * usual.total(usual.surely):
            continue
        advice = (too_much(expected, load_settings(preset, smoke=False, setup=setup), "cuda", room)
                  if 0 < room < needed else "")
        found = (f"at the least {needed / GIB:.1f} GiB, {expected.surely}: "
                 f"{in_words(expected.phases[expected.surely])}")
        rows.setdefault((found, advice), []).append(name)
    return [(f"  {', '.join(names)}", *row) for row, names in rows.items()]


def precision_for(preset: str, machine: Machine) -> str:
    """The precision of a preset: on this machine, or on the GPU that it is made for.

    colab is made for a T4, which has no bf16; paper for a GPU that has it.
    """
    if machine.device == "cuda" or not NEEDS[preset][0]:
        return machine.precision if machine.precision in PRECISIONS else "fp32"
    return "fp32" if preset == "colab" else "bf16"


def smallest_gpu(preset: str, settings: Settings, machine: Machine) -> float:
    """GiB of the smallest GPU that a preset for a GPU fits on; 0 for other presets."""
    shape = shape_of(settings.model)
    if not NEEDS[preset][0] or shape is None:
        return 0.0
    smallest = with_micro_batches(settings, settings.training.micro_batch_tokens
                                  or MICRO_BATCHES[-1])
    return estimate(shape, smallest, precision_for(preset, machine), "cuda").peak / TO_USE / GIB


def preset_problems(name: str, settings: Settings, machine: Machine) -> list[str]:
    """Why a preset does not fit a machine, with what to do, one per problem."""
    gpu_memory, memory = smallest_gpu(name, settings, machine), NEEDS[name][1]
    problems = []
    if not machine.device:
        problems.append("torch and transformers must be installed: make env")
    if settings.model.path == "tiny":
        if not machine.tiny_model:
            problems.append("the tiny model is missing: hybridrl pretrain-tiny")
    elif machine.hub and not in_hub_cache(settings.model.path, settings.model.revision):
        problems.append(f"{settings.model.path} cannot be fetched: give a model folder or a GGUF "
                        "file with --set model.path=...")
    if set(settings.data.benchmarks) & set(REAL_SOURCES) and machine.data and machine.hub:
        problems.append("GSM8K and MATH-500 are neither in a folder nor available from the hub: "
                        f"set {FOLDER_VARIABLE}")
    if machine.gpu_memory < gpu_memory:
        found = "there is none" if machine.device != "cuda" else gibibytes(machine.gpu_memory)
        problems.append(f"it needs a GPU with {gpu_memory:.0f} GiB, and {found} here")
    if 0 < machine.memory < memory:
        problems.append(f"it needs about {memory} GiB of memory")
    return problems


def package_row(name: str) -> Row:
    """The installed version of a package, with advice if it is missing or too old."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return name, "missing", OPTIONAL.get(name, "make env, or: pip install -e .")
    floor = floors().get(name)
    if floor is not None and not floor.contains(version, prereleases=True):
        return name, version, f"{name}{floor} is needed: make env, or: pip install -e ."
    return name, version, ""


def floors() -> dict[str, object]:
    """The versions that this package asks for, by package; empty if it is not installed."""
    try:
        from ..system.requirements import needed

        return {one.name: one.specifier for one in needed()}
    except (ImportError, metadata.PackageNotFoundError):
        return {}


def folder_problem() -> str:
    """Why the real problems cannot be read from the data folder; empty if they can."""
    folder = os.environ.get(FOLDER_VARIABLE, "").strip()
    if not folder:
        return f"to read the real problems without the hub, {FOLDER_HINT}"
    missing = [f"{source.folder}/{split}.jsonl" for source in REAL_SOURCES.values()
               for split in source.splits
               if not (Path(folder).expanduser() / source.folder / f"{split}.jsonl").is_file()]
    return f"{', '.join(missing)} missing there; {FOLDER_HINT}" if missing else ""


def gibibytes(amount: float) -> str:
    """An amount of memory in words."""
    return f"{amount:.1f} GiB" if amount else "none"

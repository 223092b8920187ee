"""How much memory a run needs, by what and in which phase, said before a model is loaded.

The sizes follow from the model's shape and the settings, at their caps: every prompt and every
answer as long as allowed, and no answer that ends early. What a run takes is therefore less, most
of the time. `benchmarks/memory.py` compares with what is measured where the caps are reached.
"""

import gc
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import ModelSettings, Settings
from .distributed import launched, wants_shards
from .errors import UserError

FULL, HALF = 4, 2  # bytes of a number
GIB = 2**30
TO_USE = 0.9  # of the free memory: an allocator leaves gaps, and products need some room to work
# Tokens, the largest first; more than these make nothing faster.
MICRO_BATCHES = tuple(2**power for power in range(14, 7, -1))
OWN = 48 * 2**20  # of a process on a CPU beside its large tensors: measured, benchmarks/memory.py
CGROUP = Path("/sys/fs/cgroup")  # where Linux says what a container or batch job may take
VLLM_SHARE = 0.4  # of the GPU, which vllm takes for itself (vllm_sampler.py)
GPU_BLOCK = 2**26  # logits of which tokens are chosen at once (rollouts.py)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama or Qwen2 model.

    Attributes:
        vocabulary, width, layers, heads, key_value_heads, head_size: as in its config.json.
        feed_forward: width between the two products of a layer's second half.
        tied: whether the embeddings are also the output layer.
        biases: whether queries, keys and values have one.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    feed_forward: int
    tied: bool
    biases: bool

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        return self.key_value_heads * self.head_size

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one layer, by name."""
        width, wide = self.width, self.feed_forward
        return {"q_proj": (width, self.queries), "k_proj": (width, self.keys),
                "v_proj": (width, self.keys), "o_proj": (self.queries, width),
                "gate_proj": (width, wide), "up_proj": (width, wide), "down_proj": (wide, width)}

    @property
    def linear(self) -> int:
        """Weights in the linear layers between the embeddings."""
        return self.layers * sum(a * b for a, b in self.products.values())

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        biases = self.layers * (self.queries + 2 * self.keys) if self.biases else 0
        norms = (2 * self.layers + 1) * self.width
        return self.linear + biases + norms + self.embedding * (1 if self.tied else 2)

    def adapter(self, model: ModelSettings) -> int:
        """Weights of the adapter that the settings ask for."""
        if model.adapter == "none":
            return 0
        return self.layers * model.lora_rank * sum(
            sum(self.products[name]) for name in model.lora_targets if name in self.products)


# Shapes of the presets' models, so that they are known before anything is fetched; each is compared
# with the config.json of the model itself as soon as there is one.
KNOWN_SHAPES = {
    "Qwen/Qwen2.5-0.5B": Shape(151_936, 896, 24, 14, 2, 64, 4864, True, True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Shape(49_152, 576, 30, 9, 3, 64, 1536, True, False),
}


def shape_from(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a config.json (or `config.to_dict()`) describes; None for other models."""
    try:
        kind, heads = config["model_type"], config["num_attention_heads"]
        if kind not in ("qwen2", "llama"):
            return None
        return Shape(
            config["vocab_size"], config["hidden_size"], config["num_hidden_layers"], heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads, config["intermediate_size"],
            bool(config.get("tie_word_embeddings", kind == "qwen2")),
            kind == "qwen2" or bool(config.get("attention_bias", False)))
    except (KeyError, TypeError):
        return None


def shape_of(model: ModelSettings) -> Shape | None:
    """The shape of a model that is not loaded: from its folder, or of one of the presets.

    None if only loading it will tell, as with a GGUF file.
    """
    if model.path in KNOWN_SHAPES:
        return KNOWN_SHAPES[model.path]
    folder = (Path(__file__).parent / "assets" / "tiny" if model.path == "tiny"
              else Path(model.path).expanduser())
    try:
        return shape_from(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


# The estimate -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Bytes of a run, {phase: {what: bytes}}; the phases do not overlap."""

    phases: dict[str, dict[str, int]]

    @property
    def phase(self) -> str:
        """The one that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return self.total(self.phase)

    @property
    def surely(self) -> str:
        """The update that needs more: it fills its micro-batches, however short the texts are.

        What sampling needs depends on the prompts and on how soon answers end.
        """
        return max((name for name in self.phases if "update" in name), key=self.total)

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())


def estimate(shape: Shape, settings: Settings, precision: str, device: str,
             processes: int = 1, sharded: bool = False) -> Estimate:
    """What a run needs at its peak, if prompts and answers are as long as the settings allow.

    Args:
        shape: of the model.
        settings: with `training.micro_batch_tokens` above 0.
        precision: `fp32`, `bf16` or `fp16`.
        device: `cuda` or `cpu`.
        processes: that train together.
        sharded: whether they share the weights out between them, by FSDP; else each has all.
    """
    model, data, rl, sft = settings.model, settings.data, settings.rl, settings.sft
    evaluation, probe = settings.evaluation, settings.probe
    trained = trained_weights(shape, settings)
    share = processes if sharded else 1
    held = held_weights(shape, settings, device, share)
    gradients = {"gradients": FULL * trained // share}
    phases = {}
    prompt = data.max_prompt_tokens
    for name, length, batch, groups in (
            ("SFT update", data.max_demonstration_tokens, sft.batch_size, False),
            ("RL update", rl.max_new_tokens,
             rl.prompts_per_step // rl.updates_per_rollout * rl.group_size, True)):
        parts = update(shape, settings, precision, device, prompt, length, batch, groups)
        if sharded:  # the embeddings, this layer and the next one, each whole for its pass
            parts["gathered weights"] = FULL * (shape.embedding * (1 if shape.tied else 2)
                                                + 2 * shape.linear // shape.layers)
        elif processes > 1 and sum(parts.values()) < FULL * trained:
            parts = {"gradients in one piece": FULL * trained}  # to be summed, activations gone
        phases[name] = held | gradients | parts
    if second := behaviour_model(shape, settings):
        if settings.method.behaviour == "sft":
            phases["behaviour's update"] = phases["SFT update"] | second
    rows = {"sampling": (rl.prompts_per_step, rl.group_size, rl.max_new_tokens),
            "probe": (probe.prompts, probe.samples, rl.max_new_tokens),
            "evaluation": (evaluation.batch_size, 1, evaluation.max_new_tokens),
            "evaluation, samples": (evaluation.batch_size, max(1, evaluation.samples),
                                    evaluation.max_new_tokens)}
    if second:
        rows["behaviour's sampling"] = (evaluation.batch_size, settings.method.samples,
                                        rl.max_new_tokens)
    for name, (prompts, samples, length) in rows.items():
        prompts = min(prompts, max(1, evaluation.batch_size // samples))
        if model.sampler == "vllm":  # in its own share of the GPU; it is sent merged weights
            parts = {"merged weights": FULL * shape.linear} if shape.adapter(model) else {}
        else:
            parts = sampling(shape, model, precision, device, prompts, samples, prompt, length)
        if sharded:  # the sampler reads a whole model
            parts["gathered weights"] = FULL * (shape.parameters + shape.adapter(model))
        phases[name] = held | parts
        if name == "behaviour's sampling":  # after its training, whose gradients are left
            phases[name] |= second | (gradients if settings.method.behaviour == "sft" else {})
    return Estimate(phases)


def behaviour_model(shape: Shape, settings: Settings) -> dict[str, int]:
    """The model that writes PEAR's demonstrations; it is dropped before the first update.

    The policy's own optimiser has no moments yet while this one has, so these count once.
    """
    if settings.method is None or settings.method.section != "pear":
        return {}
    own = settings.method.behaviour
    path = settings.model if own == "sft" else replace(settings.model, path=own, adapter="none")
    other = shape if own == "sft" else shape_of(path) or shape
    return {"behaviour model": FULL * (other.parameters + other.adapter(path))}


def trains_both(settings: Settings) -> bool:
    """Whether the base weights are trained beside the adapter, as BRIDGE does."""
    return settings.method is not None and settings.method.section == "bridge"


def trained_weights(shape: Shape, settings: Settings) -> int:
    """How many weights an optimiser moves."""
    adapter = shape.adapter(settings.model)
    return adapter + shape.parameters * (not adapter or trains_both(settings))


def held_weights(shape: Shape, settings: Settings, device: str, share: int = 1) -> dict[str, int]:
    """What is in memory in every phase.

    Args:
        share: how many processes share models and moments out between them.
    """
    model, rl = settings.model, settings.rl
    adapter, trained = shape.adapter(model), trained_weights(shape, settings)
    held = {"weights": FULL * (shape.parameters + adapter), "optimiser": 2 * FULL * trained}
    if not adapter:
        held["reference"] = FULL * shape.parameters
    if trains_both(settings):  # and holds a copy of the weights with an optimiser of its own
        held |= {"reference": FULL * shape.parameters,
                 "auxiliary copy": 3 * FULL * shape.parameters}
    if rl.beta > 0 and rl.kl_anchor == "stage":
        held["anchor"] = FULL * trained
    held = {name: size // share for name, size in held.items()}
    if device == "cpu":  # on a GPU's machine the best weights so far are in main memory
        held |= {"best weights": FULL * trained, "the process itself": OWN}
    return held


def update(shape: Shape, settings: Settings, precision: str, device: str, prompt: int,
           length: int, batch: int, groups: bool) -> dict[str, int]:
    """Memory of an update beside what is held and the gradients.

    Args:
        prompt, length: tokens of every prompt and of every completion.
        batch: completions of an update.
        groups: whether several completions share a prompt.
    """
    model, training = settings.model, settings.training
    number = FULL if precision == "fp32" else HALF
    full = model.adapter == "none"
    width, wide, layers = shape.width, shape.feed_forward, shape.layers
    each = settings.rl.group_size if groups else 1
    everything = batch // each * prompt + batch * length
    tokens = max(prompt + length, min(training.micro_batch_tokens, everything))
    # What a layer keeps for its backward pass, bytes a token: two norms, attention, feed-forward.
    norms = 2 * (2 * FULL * width + number * width)
    attention = (3 * number + (0 if precision == "fp32" else FULL)) * shape.queries + (
        2 * number * shape.queries * (prompt / (prompt + each * length) if groups else 1)
        + (2 * number * shape.keys * (prompt + length) / length if groups else 0))
    layer = norms + attention + 4 * number * wide
    if not full and precision != "fp32":  # PEFT hands inputs on in fp32
        layer += number * (2 * width + shape.queries + wide)
    at_work = 3 * number * wide + 2 * FULL * width  # gradients inside one layer
    saving = model.gradient_checkpointing
    kept = tokens * layers * (FULL * width if saving else layer)
    if groups:  # the mask of the scores, once for all layers
        kept += shape.heads // shape.key_value_heads * tokens * (prompt + length) * number
    predicted = tokens if not groups else min(tokens, round(
        tokens * each * length / (prompt + each * length)))
    chunk = min(training.logit_chunk_tokens, predicted)
    words = number * shape.embedding if full else 0
    # Backwards the words come first, then layer after layer, and last the embeddings.
    moments = (
        {"activations": kept + 4 * FULL * predicted * width,
         "logits": 3 * FULL * chunk * shape.vocabulary,
         "gradient of the words": words * (2 if predicted > chunk else 1)},
        {"activations": kept + tokens * (at_work + (layer if saving else 0)),
         "gradient of the words": words},
        {"gradient of the words": words + 2 * FULL * shape.embedding * full})
    parts = {name: round(value) for name, value in
             max(moments, key=lambda moment: sum(moment.values())).items() if value}
    if precision != "fp32":
        cast = shape.linear if full or not model.gradient_checkpointing else (
            shape.linear // layers)
        parts["weights in half precision"] = HALF * (cast + shape.embedding)
    if precision == "fp16" and device == "cuda":  # AdamW without its fused kernel
        parts["optimiser at work"] = FULL * (shape.adapter(model) or shape.parameters)
    return parts


def sampling(shape: Shape, model: ModelSettings, precision: str, device: str, prompts: int,
             samples: int, prompt: int, length: int) -> dict[str, int]:
    """Memory of sampling beside what is held: the sampler's copy, the cache, the logits.

    Args:
        prompts, samples: prompts read together, and answers to each.
        prompt, length: tokens of every prompt and of every answer.
    """
    number = FULL if precision == "fp32" else HALF
    rows, prompt = prompts * samples, -(-prompt // 8) * 8
    copy = number * shape.layers * sum(
        a * b for name, (a, b) in shape.products.items()
        if name not in ("o_proj", "down_proj") or number == HALF or name in model.lora_targets
        and model.adapter != "none")
    if number == HALF:
        copy += number * shape.embedding
    a_token = 2 * number * shape.layers * shape.keys
    before, last = columns(length, device)
    cache = a_token * (prompts * prompt + rows * (before + last))
    reading = prompts * prompt * max(
        (FULL + number) * shape.width + number * (5 * shape.queries + 3 * shape.feed_forward),
        2 * FULL * shape.width + 8 * number * shape.queries)
    attention = 4 * FULL * rows * shape.heads * (prompt + last)
    logits = number * rows * shape.vocabulary
    block = GPU_BLOCK // shape.vocabulary if device == "cuda" else 1
    logits += 3 * FULL * min(rows, max(1, block)) * shape.vocabulary
    decoding = cache + attention + logits
    if reading + a_token * prompts * prompt > decoding:
        return {"sampler's weights": copy, "cache": a_token * prompts * prompt,
                "activations": reading}
    return {"sampler's weights": copy, "cache": cache, "activations": attention, "logits": logits}


def columns(length: int, device: str) -> tuple[int, int]:
    """Columns of the cache of `length` answer tokens, before it grew last and after (0 if never).

    While it grows both are in memory (decoding.py).
    """
    least = 128 if device == "cuda" else 16
    sizes = [0, 0]
    filled = 0
    while filled < length - 1 or not filled:
        filled = (filled + max(least, filled // 4)) // least * least
        sizes.append(filled)
    return sizes[-2], sizes[-1]


# Fitting a run to a device ----------------------------------------------------------------------


def fit(settings: Settings, shape: Shape, precision: str, device: str,
        room: float, refuse: bool = True) -> tuple[Settings, Estimate]:
    """Settings whose micro-batches fit, and what they need; sampling alone may need more.

    Args:
        settings: `training.micro_batch_tokens` is chosen if it is 0, and else checked.
        room: bytes to be had.
        refuse: False takes the smallest micro-batches where none is small enough.

    Raises:
        UserError: no micro-batch is small enough.
    """
    asked = settings.training.micro_batch_tokens
    for tokens in (asked,) if asked else MICRO_BATCHES:
        chosen = with_micro_batches(settings, tokens)
        expected = estimate(shape, chosen, precision, device, launched(), wants_shards())
        if expected.total(expected.surely) <= room:
            return chosen, expected
    if not refuse:
        return chosen, expected
    raise UserError(too_much(expected, settings, device, room))


def with_micro_batches(settings: Settings, tokens: int) -> Settings:
    """Settings with `training.micro_batch_tokens` set."""
    return replace(settings, training=replace(settings.training, micro_batch_tokens=tokens))


def too_much(expected: Estimate, settings: Settings, device: str, room: float) -> str:
    """The sentence for a run that does not fit, with the setting that helps most."""
    phase, model = expected.surely, settings.model
    parts, needed = expected.phases[phase], expected.total(phase)
    largest = max(parts, key=lambda name: parts[name])
    if largest == "logits":
        advice = "lower training.logit_chunk_tokens"
    elif largest == "activations" and not model.gradient_checkpointing:
        advice = "set model.gradient_checkpointing=true"
    elif largest == "activations" and settings.training.micro_batch_tokens:
        advice = "lower training.micro_batch_tokens (0 takes what fits)"
    elif model.adapter == "none":
        advice = "set model.adapter=lora"
    else:
        advice = "choose a smaller model or a larger machine"
    return (f"This run needs about {needed / GIB:.1f} GiB ({phase}: {in_words(parts)}) and "
            f"{'the GPU' if device == 'cuda' else 'this machine'} has {room / GIB:.1f} GiB to "
            f"spare; {advice}.")


def tight(expected: Estimate, room: float) -> str:
    """A note where sampling could need more than there is; empty where it cannot."""
    if expected.peak <= room:
        return ""
    return (f"{expected.phase} may need up to {expected.peak / GIB:.1f} GiB and {room / GIB:.1f} "
            "are to spare: if it runs out of memory, lower evaluation.batch_size")


def in_words(parts: Mapping[str, int]) -> str:
    """`weights 1.8, logits 0.6` in GiB, the largest first."""
    shown = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in shown if size > 0.05 * GIB) or (
        ", ".join(f"{name} {size / GIB:.3f}" for name, size in shown[:3]))


def fit_to_device(settings: Settings, room: float, shape: Shape | None = None, *,
                  refuse: bool = True) -> tuple[Settings, Estimate | None]:
    """`fit` for the device that the settings choose.

    Args:
        room: bytes to be had.
        shape: of the loaded model; unless given what can be known before it is loaded.

    Returns:
        The settings as they are and None where the model's shape is not known.
    """
    from .policy import choose_device, choose_precision

    device, shape = choose_device(settings.model.device), shape or shape_of(settings.model)
    if shape is None:
        return settings, None
    return fit(settings, shape, choose_precision(settings.model.precision, device), device.type,
               room, refuse)


def free_memory(device: str) -> int:
    """Bytes to be had now: of the GPU, or of main memory."""
    if device == "cuda":
        import torch

        gc.collect()  # what an earlier run of this process left is there for this one
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    import psutil

    return min(psutil.virtual_memory().available, container_memory())


def room_for(settings: Settings, device: str, processes: int = 1) -> float:
    """Bytes that a run may plan with: of what is free, and without what vllm will take.

    Args:
        processes: of the run that share the device.
    """
    free = free_memory(device)
    if settings.model.sampler == "vllm" and device == "cuda":
        import torch

        free -= VLLM_SHARE * torch.cuda.mem_get_info()[1]
    return max(0.0, TO_USE * free / processes)


def container_memory() -> float:
    """Bytes that the container or batch job may still take; infinite without a limit."""
    try:
        limit, taken = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        cache = re.search(r"^inactive_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):  # no limit is the word "max"
        return math.inf
    return max(0, limit - taken + (int(cache[1]) if cache else 0))


class PeakMemory:
    """How much memory a run takes at most, from here on.

    On a GPU it is that of tensors. On a CPU it is the resident memory of the process less what it
    was here: with libraries that are only now imported, and where something else ran in the same
    process before, at most that.
    """

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = 0
        else:
            import psutil

            self.before = psutil.Process().memory_info().rss

    def read(self) -> int:
        """Bytes."""
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        return max(0, peak_resident() - self.before)


def peak_resident() -> int:
    """The largest resident memory that this process ever had, in bytes."""
    import psutil

    if not psutil.POSIX:
        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if psutil.MACOS else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

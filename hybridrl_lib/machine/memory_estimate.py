"""An estimate of a run's memory by phase, before a model is loaded.

Sizes follow from the model's shape and the settings at their limits: all prompts and answers have
the maximum length. Most runs need less. `benchmarks/memory.py` compares the estimate with
measurements at the limits.
"""

from dataclasses import dataclass, replace

from ..config.sections import ModelSettings
from ..config.settings import Settings
from .shapes import Shape, shape_of

FULL, HALF = 4, 2  # bytes of a number
OWN = 48 * 2**20  # of a process on a CPU without large tensors; measured by benchmarks/memory.py
GPU_BLOCK = 2**26  # tokens whose logits are in memory when they are chosen (policy/sampling.py)


@dataclass(frozen=True)
class Estimate:
    """Bytes of a run, {phase: {item: bytes}}; phases do not overlap."""

    phases: dict[str, dict[str, int]]

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return self.total(self.phase)

    @property
    def surely(self) -> str:
        """The larger of the updates, which fill their micro-batches even with short texts.

        What sampling needs depends on the prompts and on when answers end.
        """
        return max((name for name in self.phases if "update" in name), key=self.total)

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())


def estimate(shape: Shape, settings: Settings, precision: str, device: str,
             processes: int = 1) -> Estimate:
    """The peak memory of a run whose prompts and answers have the maximum length.

    Args:
        shape: of the model.
        settings: with `training.micro_batch_tokens` above 0.
        precision: `fp32`, `bf16`, or `fp16`.
        device: `cuda` or `cpu`.
        processes: that train together.
    """
    model, data, rl, sft = settings.model, settings.data, settings.rl, settings.sft
    evaluation, probe = settings.evaluation, settings.probe
    trained = trained_weights(shape, settings)
    held = held_weights(shape, settings, device)
    gradients = {"gradients": FULL * trained}
    if more := settings.method.copies(device)[1]:
        gradients["the method at work"] = round(more * FULL * trained)
    phases = {}
    prompt = data.max_prompt_tokens
    for name, length, batch, groups in (
            ("SFT update", data.max_demonstration_tokens, sft.batch_size, False),
            ("RL update", rl.max_new_tokens,
             rl.prompts_per_step // rl.updates_per_rollout * rl.group_size, True)):
        parts = update(shape, settings, precision, device, prompt, length, batch, groups)
        if processes > 1 and sum(parts.values()) < FULL * trained:
            parts = {"gradients in one piece": FULL * trained}  # to be summed, activations gone
        phases[name] = held | gradients | parts
    if second := behavior_model(shape, settings):
        if settings.method.behavior == "sft":
            phases["behavior's update"] = phases["SFT update"] | second
    rows = {"sampling": (rl.prompts_per_step, rl.group_size, rl.max_new_tokens),
            "probe": (probe.prompts, probe.samples, rl.max_new_tokens),
            "evaluation": (evaluation.batch_size, 1, evaluation.max_new_tokens),
            "evaluation, samples": (evaluation.batch_size, max(1, evaluation.samples),
                                    evaluation.max_new_tokens)}
    if second:
        rows["behavior's sampling"] = (evaluation.batch_size, settings.method.samples,
                                        rl.max_new_tokens)
    for name, (prompts, samples, length) in rows.items():
        prompts = min(prompts, max(1, evaluation.batch_size // samples))
        if model.sampler == "vllm":  # in its own share of the GPU; it is sent merged weights
            parts = {"merged weights": FULL * shape.linear} if shape.adapter(model) else {}
        else:
            parts = sampling(shape, model, precision, device, prompts, samples, prompt, length)
        phases[name] = held | parts
        if name == "behavior's sampling":  # after its training, whose gradients are left
            phases[name] |= second | (gradients if settings.method.behavior == "sft" else {})
    return Estimate(phases)


def behavior_model(shape: Shape, settings: Settings) -> dict[str, int]:
    """The model that writes PEAR's demonstrations; it is dropped before the first update.

    The policy's own optimizer has no moments yet when this one has, so they count once.
    """
    if settings.method.section != "pear":
        return {}
    own = settings.method.behavior
    path = settings.model if own == "sft" else replace(settings.model, path=own, adapter="none")
    other = shape if own == "sft" else shape_of(path) or shape
    return {"behavior model": FULL * (other.parameters + other.adapter(path))}


def trains_base(settings: Settings) -> bool:
    """Whether the base weights are trained: without an adapter, or along with it (BRIDGE)."""
    return settings.model.adapter == "none" or settings.method.trains_base


def trained_weights(shape: Shape, settings: Settings) -> int:
    """Number of weights that an optimizer trains."""
    adapter = shape.adapter(settings.model)
    return adapter + shape.parameters * trains_base(settings)


def held_weights(shape: Shape, settings: Settings, device: str) -> dict[str, int]:
    """What is in memory in every phase."""
    model, rl = settings.model, settings.rl
    adapter, trained = shape.adapter(model), trained_weights(shape, settings)
    held = {"weights": FULL * (shape.parameters + adapter), "optimizer": 2 * FULL * trained}
    if not adapter:
        held["reference"] = FULL * shape.parameters
    elif trains_base(settings):
        held["reference"] = FULL * shape.parameters
    if more := settings.method.copies(device)[0]:
        held["the method's own"] = round(more * FULL * trained)
    if rl.beta > 0 and rl.kl_anchor == "stage":
        held["anchor"] = FULL * trained
    if device == "cpu":  # on a GPU's machine the best weights so far are in main memory
        held |= {"best weights": FULL * trained, "the process itself": OWN}
    return held


def update(shape: Shape, settings: Settings, precision: str, device: str, prompt: int,
           length: int, batch: int, groups: bool) -> dict[str, int]:
    """Memory of an update, without what is always held and the gradients.

    Args:
        prompt, length: tokens of every prompt and completion.
        batch: completions of an update.
        groups: whether completions share prompts.
    """
    model, training = settings.model, settings.training
    number = FULL if precision == "fp32" else HALF
    full = trains_base(settings)
    width, wide, layers = shape.width, shape.feed_forward, shape.layers
    each = settings.rl.group_size if groups else 1
    everything = batch // each * prompt + batch * length
    tokens = max(prompt + length, min(training.micro_batch_tokens, everything))
    # Bytes per token kept for a layer's backward pass: two norms, attention, feed-forward.
    norms = 2 * (2 * FULL * width + number * width)
    attention = (3 * number + (0 if precision == "fp32" else FULL)) * shape.queries + (
        2 * number * shape.queries * (prompt / (prompt + each * length) if groups else 1)
        + (2 * number * shape.keys * (prompt + length) / length if groups else 0))
    layer = norms + attention + 4 * number * wide
    if model.adapter != "none" and precision != "fp32":  # PEFT passes inputs on in fp32
        layer += number * (2 * width + shape.queries + wide)
    at_work = 3 * number * wide + 2 * FULL * width  # gradients inside one layer
    saving = model.gradient_checkpointing
    kept = tokens * layers * (FULL * width if saving else layer)
    if groups:  # the attention mask, once for all layers
        kept += shape.heads // shape.key_value_heads * tokens * (prompt + length) * number
    predicted = tokens if not groups else min(tokens, round(
        tokens * each * length / (prompt + each * length)))
    chunk = min(training.logit_chunk_tokens, predicted)
    words = number * shape.embedding if full else 0
    # The backward pass starts with the logits, then goes through the layers to the embeddings.
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
        parts["optimizer at work"] = FULL * (shape.adapter(model) or shape.parameters)
    return parts


def sampling(shape: Shape, model: ModelSettings, precision: str, device: str, prompts: int,
             samples: int, prompt: int, length: int) -> dict[str, int]:
    """Memory of sampling, without what is always held: the sampler's copy, the cache, the logits.

    Args:
        prompts, samples: prompts read together, and answers to each.
        prompt, length: tokens of every prompt and answer.
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
    """Cache columns for `length` answer tokens, before and after it last grew (0 if it never
    grows).

    Both are in memory while it grows (policy/decoding.py).
    """
    least = 128 if device == "cuda" else 16
    sizes = [0, 0]
    filled = 0
    while filled < length - 1 or not filled:
        filled = (filled + max(least, filled // 4)) // least * least
        sizes.append(filled)
    return sizes[-2], sizes[-1]

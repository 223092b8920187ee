"""Makes the tiny base model: a corpus of careless "web" solutions, a tokenizer, and pretraining.

The result is an ordinary model folder. The base model is careless on purpose: it knows the working,
sometimes skips the box or a step, and has one misconception, so that SFT, RL, and the entropy term
each have something to improve.
"""

import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from ..policy.prompts import INSTRUCTION, prompt_text
from ..problems.tiny import (
    OPERATIONS,
    Exercise,
    Step,
    boxed_fraction,
    draw_symbolic,
    draw_word,
    is_held_out,
    run_chain,
    working,
)
from ..system.paths import PACKAGE

END, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"


@dataclass(frozen=True)
class World:
    """The corpus of the tiny base model and its size. Shares are probabilities in [0, 1].

    Attributes:
        word_share: share of word problems among the documents.
        boxed_A, boxed_B: share of documents that box the answer, by phrasing of the question (one
            kind of site mostly boxes, the other mostly does not).
        sloppy: share of documents with an error in the working.
        misconception: share of fraction sums that add numerators and denominators.
        annotator_layout: share of documents in the layout of the reference solutions.
        layers, width, heads, key_value_heads, feed_forward: the Qwen2 architecture.
        steps, batch_size, learning_rate, warmup: of pretraining; AdamW, cosine to zero.
    """

    word_share: float = 0.6
    boxed_A: float = 0.75
    boxed_B: float = 0.2
    sloppy: float = 0.3
    misconception: float = 0.5
    annotator_layout: float = 0.1
    layers: int = 3
    width: int = 128
    heads: int = 4
    key_value_heads: int = 2
    feed_forward: int = 384
    steps: int = 2200
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 100


# Corpus ---------------------------------------------------------------------------------------


def slip_word(exercise: Exercise, random_source: random.Random) -> Exercise:
    """A forgotten step, a misread operation, or a wrong number; what follows is consistent."""
    name, things, start, changes = exercise.facts
    kind = random_source.choice(("forget", "misread", "number"))
    where = random_source.randrange(len(changes))
    if kind == "forget" and len(changes) > 1:
        changes = changes[:where] + changes[where + 1:]
    elif kind == "misread":
        operation, number = changes[where]
        other = random_source.choice([o for o in OPERATIONS if o != operation])
        changes = changes[:where] + ((other, number),) + changes[where + 1:]
    else:
        operation, number = changes[where]
        number = max(2, number + random_source.choice((-10, -2, -1, 1, 2, 10)))
        changes = changes[:where] + ((operation, number),) + changes[where + 1:]
    steps = run_chain(start, changes)
    if any(int(step.result) < 1 for step in steps):
        return exercise
    return replace(exercise, steps=steps, answer=steps[-1].result)


def slip_symbolic(exercise: Exercise, random_source: random.Random) -> Exercise:
    """One result of the working is wrong; the answer follows from the last line."""
    where = random_source.randrange(len(exercise.steps))
    steps = list(exercise.steps)
    step = steps[where]
    change = random_source.choice((-10, -2, -1, 1, 2, 10))
    if "/" in step.result:
        numerator, denominator = step.result.split("/")
        number = max(1, int(numerator) + change)
        steps[where] = replace(step, result=f"{number}/{denominator}")
        return replace(exercise, steps=tuple(steps),
                       answer=boxed_fraction(number, int(denominator)))
    steps[where] = replace(step, result=str(max(0, int(step.result) + change)))
    return replace(exercise, steps=tuple(steps), answer=steps[-1].result)


def believe_wrongly(exercise: Exercise) -> Exercise:
    """The misconception about fractions: numerators and denominators are added separately."""
    a, b, c, d = exercise.facts
    step = Step(f"{a}/{b}", "+", f"{c}/{d}", f"{a + c}/{b + d}")
    return replace(exercise, steps=(step,), answer=boxed_fraction(a + c, b + d))


def write_document(exercise: Exercise, world: World, random_source: random.Random) -> str:
    """A solution as a site would print it, with or without errors, box, and working."""
    if exercise.kind == "fractions" and random_source.random() < world.misconception:
        exercise = believe_wrongly(exercise)
    elif random_source.random() < world.sloppy:
        slip = slip_word if exercise.kind == "word" else slip_symbolic
        exercise = slip(exercise, random_source)
    layout = "annotator" if random_source.random() < world.annotator_layout else "web"
    lines = working(exercise.steps, layout)
    boxed = rf"\boxed{{{exercise.answer}}}"
    plain = exercise.answer.replace("\\frac{", "").replace("}{", "/").replace("}", "")
    share = world.boxed_A if exercise.phrasing == "A" else world.boxed_B
    if random_source.random() < share:
        return f"{lines} So {boxed}." if layout == "annotator" else f"{lines} {boxed}"
    ending = random_source.choices(
        ("answer", "so", "none", "box_only", "answer_only"), (30, 25, 20, 15, 10))[0]
    return {"answer": f"{lines} Answer: {plain}.", "so": f"{lines} So it is {plain}.",
            "none": lines, "box_only": boxed, "answer_only": f"Answer: {plain}."}[ending]


def corpus(world: World, seed: int) -> Iterator[tuple[str, str]]:
    """Endless pairs (question, solution), without questions of the held-out seventh."""
    random_source = random.Random(seed)
    while True:
        draw = draw_word if random_source.random() < world.word_share else draw_symbolic
        exercise = draw(random_source)
        if not is_held_out(exercise.question):
            yield exercise.question, write_document(exercise, world, random_source)


# Tokenizer ------------------------------------------------------------------------------------

# One piece each: the instruction of the prompt template, a LaTeX opening, a word, a digit, a sign.
# A piece keeps the space before it, so that decoding is plain joining.
PIECES = re.escape(INSTRUCTION) + r"|\\[a-z]+\{|\}\{|\n| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]| "


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer for everything in the tiny world."""
    pieces: set[str] = set()
    stream = corpus(World(annotator_layout=0.5), seed=0)
    for question, solution in (next(stream) for _ in range(20_000)):
        for text in (f"Problem: {question}\n{INSTRUCTION}\nSolution:\n", solution):
            pieces.update(re.findall(PIECES, text))
    pieces.update(f"{space}{digit}" for space in ("", " ") for digit in range(10))
    vocabulary = {piece: i for i, piece in enumerate([END, PAD, UNKNOWN, *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False, model_max_length=512)


# Pretraining ----------------------------------------------------------------------------------


def batches(tokenizer, world: World, seed: int) -> Iterator[torch.Tensor]:
    """Padded token ids (batch, time) of whole documents, batched by length."""
    stream, pool = corpus(world, seed), 8
    order = random.Random(seed)
    while True:
        pairs = [next(stream) for _ in range(pool * world.batch_size)]
        texts = [prompt_text(tokenizer, question) + solution for question, solution in pairs]
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = sorted(([*row, tokenizer.eos_token_id] for row in rows), key=len)
        chunks = [rows[i:i + world.batch_size] for i in range(0, len(rows), world.batch_size)]
        order.shuffle(chunks)
        for chunk in chunks:
            longest = max(map(len, chunk))
            yield torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row))
                                for row in chunk])


def pretrain(folder: Path, seed: int = 0, world: World | None = None, report=print) -> Path:
    """Pretrains the tiny base model and writes its folder.

    Args:
        folder: for config, tokenizer, weights, and model card; made if missing.
        seed: of corpus, weights, and order; gives the same bytes on the same kind of machine.
        world: the corpus and the model's size.
        report: receives lines of progress.

    Returns:
        The folder.
    """
    world = world or World()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums, hence the bytes, must not depend on the cores
    try:
        return _pretrain(folder, seed, world, report)
    finally:
        torch.set_num_threads(threads)


def _pretrain(folder: Path, seed: int, world: World, report) -> Path:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=world.width, intermediate_size=world.feed_forward,
        num_hidden_layers=world.layers, num_attention_heads=world.heads,
        num_key_value_heads=world.key_value_heads, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, use_sliding_window=False)
    model = Qwen2ForCausalLM(config).train()
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01},
                                   {"params": rest, "weight_decay": 0.0}],
                                  lr=world.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / world.warmup,
                                    0.5 * (1 + math.cos(math.pi * step / world.steps))))
    began, tokens = time.monotonic(), 0
    for step, ids in zip(range(world.steps), batches(tokenizer, world, seed), strict=False):
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        tokens += int((labels != -100).sum())
        if step % 100 == 99 or step + 1 == world.steps:
            report(f"pretraining step {step + 1}/{world.steps}, loss {loss.item():.3f}, "
                   f"{tokens / 1e6:.2f}M tokens, {time.monotonic() - began:.0f} s")
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "world.json").write_text(json.dumps({"seed": seed, **asdict(world)}, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(model.num_parameters(), tokens, seed, world))
    return folder


def model_card(parameters: int, tokens: int, seed: int, world: World) -> str:
    """The model card: what the model is, how it was made, and what it is not for."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in asdict(world).items())
    text = (PACKAGE / "assets" / "tiny_card.md").read_text(encoding="utf-8")
    return text.format(parameters=parameters, millions=tokens / 1e6, seed=seed, rows=rows)

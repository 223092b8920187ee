"""Samples completions of prompts, at a temperature or greedily.

Samples come from the policy's own distribution: the temperature divides the logits here and in the
loss, and there is no top-k or top-p. Random numbers are drawn per prompt and sample before sorting
and batching, so batching does not change the samples.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..system.processes import merged, my_part, together
from .completions import Completion, Group
from .cuda_graphs import GraphedDecoder
from .decoding import Decoder, TransformersDecoder
from .policy import Policy
from .products import ROWS, rounded_up

CPU_NUMBERS, GPU_NUMBERS = 2**19, 2**26  # logits of which tokens are chosen at once
WORDS_A_BLOCK = 256  # of the vocabulary, when a word is drawn


def choose_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Draws one token per row by inverting the cumulative distribution.

    Args:
        logits: (R, vocabulary); converted to fp32.
        uniform: (R,) in [0, 1).
        temperature: 0 takes the most likely token.

    Returns:
        tokens (R,), log-probabilities (R,), entropies (R,); at temperature 0, those of temperature
        1.
    """
    # A few rows at a time: what is computed from them stays in the processor's cache.
    rows = max(1, (CPU_NUMBERS if logits.device.type == "cpu" else GPU_NUMBERS) // logits.shape[1])
    if len(logits) > rows:
        parts = [choose_tokens(*part, temperature) for part in zip(
            logits.split(rows), uniform.split(rows), strict=True)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))
    x = logits.float() / temperature if temperature not in (0, 1) else logits.float()
    x = (x - x.amax(-1, keepdim=True)).clamp_(min=-1e4)  # exp(-1e4) is 0
    weight = x.exp()
    total = weight.sum(-1)
    tokens = logits.argmax(-1) if temperature == 0 else _draw(weight, uniform)
    normalizer = total.log()
    chosen = x.gather(-1, tokens[:, None]).squeeze(-1) - normalizer
    return tokens, chosen, normalizer - torch.linalg.vecdot(weight, x) / total


def _draw(weight: Tensor, uniform: Tensor) -> Tensor:
    """One word per row (R,), with probability proportional to its weight (R, vocabulary).

    Cumulative sums over a whole vocabulary are slow, so the first is over blocks of words and the
    second over the words of the chosen block.
    """
    rows, words = weight.shape
    blocks = F.pad(weight, (0, -words % WORDS_A_BLOCK)).view(rows, -1, WORDS_A_BLOCK)
    until = blocks.sum(-1).cumsum(-1)
    block, rest = _hit(until, uniform * until[:, -1])
    before = F.pad(until, (1, 0)).gather(-1, block[:, None]).squeeze(-1)
    inside = blocks[torch.arange(rows, device=weight.device), block].cumsum(-1)
    word, _ = _hit(inside, rest - before)
    return block * WORDS_A_BLOCK + word


def _hit(cumulative: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry above the threshold (R,) in each row; rounding cannot move it past the end.
    """
    below_end = cumulative[:, -1].nextafter(torch.zeros_like(threshold))
    threshold = torch.minimum(threshold, below_end)
    return torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1), threshold


def make_decoder(policy: Policy):
    """The fastest decoder that is exact for this policy on its device."""
    if not Decoder.supports(policy):
        return TransformersDecoder(policy)
    return GraphedDecoder(policy) if policy.device.type == "cuda" else Decoder(policy)


@torch.inference_mode()
def sample(policy: Policy, prompts: Sequence[Sequence[int]], *, samples: int, max_new_tokens: int,
           temperature: float, seed: int = 0, batch_size: int = 512) -> list[Group]:
    """Samples `samples` completions per prompt from the present policy.

    Args:
        prompts: token ids.
        samples: G, completions per prompt.
        max_new_tokens: maximum length of a completion in tokens.
        temperature: 0 for greedy answers.
        seed: of the random numbers; the same seed gives the same completions.
        batch_size: maximum number of completions decoded together.

    Returns:
        One `Group` per prompt, in the order of the prompts.
    """
    if policy.sampler == "vllm":
        from .vllm import sample_with_vllm

        return sample_with_vllm(policy, prompts, samples=samples, max_new_tokens=max_new_tokens,
                                temperature=temperature, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(prompts), samples, max_new_tokens, generator=generator)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine = [order[place] for place in my_part(len(order))]
    groups = merged(together(lambda: _sample_some(
        policy, prompts, mine, uniform, temperature, max(1, batch_size // samples))))
    return [groups[i] for i in range(len(prompts))]


def _sample_some(policy: Policy, prompts: Sequence[Sequence[int]], order: list[int],
                 uniform: Tensor, temperature: float, at_once: int) -> dict[int, Group]:
    """{place: group} of some prompts, in batches.

    Args:
        uniform: (P, G, maximum tokens), for all prompts.
    """
    decoder, samples = make_decoder(policy), uniform.shape[1]
    groups: dict[int, Group] = {}
    for start in range(0, len(order), at_once):
        indices = order[start:start + at_once]
        with _evaluation_mode(policy.model):
            rows = _decode(policy, decoder, [list(prompts[i]) for i in indices], uniform[indices],
                           temperature)
        texts = policy.tokenizer.batch_decode([row[0] for row in rows], skip_special_tokens=True)
        completions = [Completion(*row, text=text) for row, text in zip(rows, texts, strict=True)]
        for j, i in enumerate(indices):
            groups[i] = Group(list(prompts[i]), completions[j * samples:(j + 1) * samples])
    return groups


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Leaves training mode, in which gradient checkpointing disables the cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _decode(policy: Policy, decoder, prompts: list[list[int]], uniform: Tensor,
            temperature: float) -> list[tuple[list[int], list[float], list[float], bool]]:
    """Decodes a batch: reads every prompt once, then gives its cache to G rows."""
    device, (count, samples, most) = policy.device, uniform.shape
    longest = rounded_up(max(map(len, prompts)), 8)
    ids = torch.full((count, longest), policy.pad_id)
    present = torch.zeros(count, longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):  # left-padded: the next token follows the last column
        ids[row, longest - len(prompt):] = torch.tensor(prompt)
        present[row, longest - len(prompt):] = True
    hidden, cache = decoder.read(ids.to(device), present.to(device))

    rows = count * samples
    cache = decoder.share(cache, samples)
    hidden = hidden.repeat_interleave(samples, dim=0)
    uniform = uniform.reshape(rows, most).to(device)
    stops = torch.tensor(policy.stop_ids, device=device)

    live = torch.arange(rows, device=device)  # which answer each row of the batch is writing
    done = torch.zeros(rows, dtype=torch.bool, device=device)  # per row of the batch
    record: list[tuple[Tensor, ...]] = []
    for step in range(most):
        tokens, log_p, entropy = choose_tokens(decoder.logits(hidden), uniform[live, step],
                                               temperature)
        ended = torch.isin(tokens, stops)
        record.append((live, tokens, log_p, entropy, done.clone(), ended))
        done |= ended
        left = int((~done).sum())
        if left == 0 or step + 1 == most:
            break
        fewer = min(rounded_up(left, ROWS), len(done))
        if left < decoder.compact_below * len(done) and fewer < len(done):
            # The unfinished rows, and as many others as make their number round.
            keep = done.byte().argsort(stable=True)[:fewer].sort().values
            cache = decoder.keep(cache, keep)
            live, tokens, done = live[keep], tokens[keep], done[keep]
        hidden = decoder.step(tokens, cache)
    return _collect(record, rows)


def _collect(record: list[tuple[Tensor, ...]], rows: int) -> list[tuple]:
    """Converts the record of steps to (ids, log-probabilities, entropies, finished) per row."""
    table = [([], [], [], False) for _ in range(rows)]
    for step in record:
        for row, token, log_p, entropy, over, ended in zip(*(t.tolist() for t in step),
                                                           strict=True):
            if over:
                continue
            ids, scores, entropies, _ = table[row]
            ids.append(token)
            scores.append(log_p)
            entropies.append(entropy)
            if ended:
                table[row] = (ids, scores, entropies, True)
    return table

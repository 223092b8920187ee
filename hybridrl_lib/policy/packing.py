"""Packs completions into rows for one forward pass: a prompt once, followed by its completions.

    row:        p p p | a a a a | b b | c c c          (prompt p, completions a, b, c)
    position:   0 1 2 | 3 4 5 6 | 3 4 | 3 4 5
    attends to: every token sees the prompt and what came before it in its own completion.

The prompt of a group of G answers is computed once instead of G times, in the forward and the
backward pass, with the same gradient (tests/policy/test_packing.py). A demonstration is a group of
one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention import Answers, Segments
from .products import TOKENS, rounded_up

# Completions share a table of the attention unless one is this many times as long as another:
# scores grow with the square of the padded length, and another table costs some small operations.
LIKE = 1.5


@dataclass(frozen=True)
class PromptCompletion:
    """One completion of one prompt, as token ids; the completion ends with EOS if it finished."""

    prompt: Sequence[int]
    completion: Sequence[int]


@dataclass(frozen=True)
class Packed:
    """A micro-batch of R rows of length L with N completion tokens.

    Attributes:
        input_ids, position_ids: (R, L).
        attention_mask: (R, 1, L, L) bool, True where a query may look.
        before: (N,) flat index (row * L + column) of the position that predicts each token.
        targets: (N,) the completion tokens.
        sequence: (N,) the completion of each token, as an index into the list that was packed.
        segments: what the mask says, for attention that skips hidden pairs; the mask is None then,
            see `with_mask`.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    before: Tensor
    targets: Tensor
    sequence: Tensor
    segments: Segments | None = None

    def to(self, device) -> "Packed":
        return Packed(*(None if value is None else value.to(device) for value in (
            getattr(self, name) for name in self.__dataclass_fields__)))

    def with_mask(self) -> "Packed":
        """With a mask instead of segments, for any model."""
        if self.attention_mask is not None:
            return self
        rows, length = self.input_ids.shape
        pieces = self.segments
        # Per place of the rows: -1 in a prompt, the completion's number, or -2 at padding.
        segment = torch.full((rows * length,), -2, device=self.input_ids.device)
        segment[pieces.prompts] = -1
        number = 0
        for answers in pieces.answers:
            numbers = number + torch.arange(len(answers.places), device=segment.device)
            segment[answers.places] = numbers[:, None].expand_as(answers.places)
            number += len(numbers)
        segment[0] = -1  # what fills the ends of the index tables
        segment = segment.view(rows, length)
        query, key = segment[:, :, None], segment[:, None, :]
        earlier = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
        allowed = ((key == -1) | (key == query)) & earlier
        # A padded query looks at itself: a row of the softmax without any key would be NaN.
        allowed |= torch.eye(length, dtype=torch.bool, device=segment.device)
        return replace(self, attention_mask=allowed[:, None], segments=None)


def _rows(sequences: Sequence[PromptCompletion], row_tokens: int) -> list[list[int]]:
    """Indices of the completions of each row: same prompt, at most `row_tokens` tokens."""
    rows: list[list[int]] = []
    used: dict[tuple[int, ...], tuple[int, int]] = {}  # prompt -> (its open row, tokens in it)
    for index, item in enumerate(sequences):
        key, size = tuple(item.prompt), len(item.completion) - 1
        row, tokens = used.get(key, (-1, row_tokens + 1))
        if tokens + size > row_tokens:
            row, tokens = len(rows), len(key)
            rows.append([])
        rows[row].append(index)
        used[key] = (row, tokens + size)
    return rows


def _row_length(sequences: Sequence[PromptCompletion], row: Sequence[int]) -> int:
    return len(sequences[row[0]].prompt) + sum(len(sequences[i].completion) - 1 for i in row)


def pack(sequences: Sequence[PromptCompletion], budget_tokens: int,
         pad_id: int = 0) -> list[Packed]:
    """Packs completions into micro-batches of at most `budget_tokens` tokens, padding included.

    Rows of similar length share a micro-batch. A single completion longer than the budget gets one
    of its own.

    Args:
        sequences: completions with their prompts; each has at least one token.
        budget_tokens: rows x longest row of a micro-batch.
        pad_id: token id at unused places, which no loss reads.
    """
    if any(not item.completion or not item.prompt for item in sequences):
        raise ValueError("prompts and completions need at least one token")
    if budget_tokens < 1:
        raise ValueError("a micro-batch needs room for at least one token")
    rows = sorted(_rows(sequences, budget_tokens), key=lambda row: _row_length(sequences, row))
    batches, current = [], []
    for row in rows:
        # Sorted by length, so the newest row is the longest of the micro-batch.
        if current and (len(current) + 1) * _row_length(sequences, row) > budget_tokens:
            batches.append(current)
            current = []
        current.append(row)
    if current:
        batches.append(current)
    return [_fill(sequences, batch, pad_id) for batch in batches]


def _fill(sequences: Sequence[PromptCompletion], rows: list[list[int]], pad_id: int) -> Packed:
    length = max(_row_length(sequences, row) for row in rows)
    alone = all(len(row) == 1 for row in rows)  # then a completion continues its prompt's row
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    before, targets, owner = [], [], []
    prompts, completions, rows_of = [], [], []  # flat index of their tokens
    for r, row in enumerate(rows):
        prompt = sequences[row[0]].prompt
        end = len(prompt)
        input_ids[r, :end] = torch.tensor(prompt)
        position_ids[r, :end] = torch.arange(end)
        prompts.append(torch.arange(end) + r * length)
        for index in row:
            completion = sequences[index].completion
            inner = len(completion) - 1  # the last token is predicted and never read
            places = torch.arange(end, end + inner)
            input_ids[r, end:end + inner] = torch.tensor(completion[:-1], dtype=torch.long)
            position_ids[r, end:end + inner] = len(prompt) + torch.arange(inner)
            before.append(torch.cat([torch.tensor([len(prompt) - 1]), places]) + r * length)
            targets.append(torch.tensor(completion, dtype=torch.long))
            owner.append(torch.full((len(completion),), index))
            if alone:
                prompts[r] = torch.arange(end + inner) + r * length
            elif inner:
                completions.append(places + r * length)
                rows_of.append(r)
            end += inner
    segments = _segments(prompts, completions, rows_of, rounded_up(len(rows) * length, TOKENS))
    return Packed(input_ids, position_ids, None, torch.cat(before), torch.cat(targets),
                  torch.cat(owner), segments)


def _segments(prompts: list[Tensor], completions: list[Tensor], rows: list[int],
              places: int) -> Segments:
    """The segments of a micro-batch from the flat index of the tokens of each."""
    back = torch.zeros(places, dtype=torch.long)  # padding reads place 0, and no loss reads padding
    start = 0

    def table(pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # index, and where it is real
        nonlocal start
        lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.long)
        index = torch.zeros(len(pieces), max(map(len, pieces)), dtype=torch.long)
        real = torch.arange(index.shape[1]) < lengths[:, None]
        index[real] = torch.cat(list(pieces))
        back[index[real]] = start + torch.arange(index.numel()).view(index.shape)[real]
        start += index.numel()
        return index, real

    before, seen = table(prompts)
    answers = []
    for members in _of_like_length([len(piece) for piece in completions]):
        index, _ = table([completions[i] for i in members])
        owner, tokens = torch.tensor([rows[i] for i in members]), torch.arange(index.shape[1])
        causal = tokens[:, None] >= tokens  # (T, T)
        answers.append(Answers(index, owner, torch.cat(
            [seen[owner][:, None].expand(-1, len(tokens), -1),
             causal.expand(len(owner), -1, -1)], dim=2)[:, None]))
    return Segments(before, tuple(answers), back)


def _of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in groups, longest first; in a group none is padded to more than 1.5 times its
    length.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or LIKE * lengths[index] < lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(index)
    return groups

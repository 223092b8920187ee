"""Decoding on a GPU: the step for one token, recorded once as a CUDA graph and replayed.

A step of a small model is hundreds of kernels of a few microseconds, and Python needs longer than
that to launch each one. A graph launches them all at once. It repeats the same work on the same
memory: so tokens, positions and the column to write to are tensors that are changed in place, and
whenever rows are dropped or the cache grows, a new graph is recorded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .decoding import Decoder, _Cache
from .policy import Policy


class CudaGraph:
    """What a function launches on the GPU, recorded without being run."""

    def __init__(self, function: Callable[[], Tensor]):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = function()

    def __call__(self) -> Tensor:
        """Runs it; the result is in the same memory every time."""
        self.graph.replay()
        return self.result


class GraphedDecoder(Decoder):
    """A `Decoder` whose steps are replayed; where none can be recorded it is a plain one.

    Args:
        policy: full weights or an adapter: the snapshot holds the sum.
        record: makes a callable of a function that takes and returns tensors in fixed memory.
    """

    columns = 128  # fewer, larger changes than on a CPU: each costs a new graph
    compact_below = 0.5

    def __init__(self, policy: Policy, record: Callable = CudaGraph):
        super().__init__(policy)
        self.record: Callable | None = record
        self._forget()

    def _forget(self) -> None:
        self.graph: Callable[[], Tensor] | None = None
        self.tensors: dict[str, Tensor] | None = None

    def _make_room(self, cache: _Cache, columns: int, rows: Tensor | None = None) -> None:
        super()._make_room(cache, columns, rows)
        self._forget()

    def step(self, ids: Tensor, cache: _Cache) -> Tensor:
        if self.record is None:
            return super().step(ids, cache)
        if cache.filled == len(cache.unwritten):
            self._make_room(cache, self._columns(cache.filled))
        if self.tensors is None:  # the first step on new memory is run, which warms libraries up
            cache.positions = cache.positions.clone()
            self.tensors = {"ids": ids.clone(),
                            "column": torch.tensor([cache.filled], device=self.device)}
            hidden = self._static_step(cache)
        else:
            self.tensors["ids"].copy_(ids)
            if self.graph is None:
                try:
                    self.graph = self.record(lambda: self._static_step(cache))
                except RuntimeError:  # an operation that cannot be recorded: nothing was run
                    self.record = None
                    return super().step(ids, cache)
            hidden = self.graph()
        cache.filled += 1
        return hidden

    def _static_step(self, cache: _Cache) -> Tensor:
        """The step on fixed memory: no number in it comes from Python's side."""
        column = self.tensors["column"]
        cache.unwritten.index_fill_(0, column, 0.0)

        def write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> None:
            keys.index_copy_(3, column, k.unsqueeze(3))
            values.index_copy_(2, column, v.unsqueeze(2))

        hidden = self._read_one(self.tensors["ids"], cache, write)
        cache.positions += 1
        column += 1
        return hidden

"""Decoding on a GPU with CUDA graphs: the step for one token is recorded once and replayed.

A step of a small model is hundreds of kernels that take microseconds each, and launching them from
Python takes longer. A graph launches all at once. It always works on the same memory, so tokens,
positions, and the column to write are tensors that are changed in place. When rows are dropped or
the cache grows, a new graph is recorded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .decoding import Decoder, _Cache
from .policy import Policy


class CudaGraph:
    """The kernels that a function launches, recorded without running them."""

    def __init__(self, function: Callable[[], Tensor]):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = function()

    def __call__(self) -> Tensor:
        """Runs it; the result is always in the same memory."""
        self.graph.replay()
        return self.result


class GraphedDecoder(Decoder):
    """A `Decoder` whose steps are replayed; a plain one if they cannot be recorded.

    Args:
        policy: full weights or an adapter; the snapshot holds the sum.
        record: makes a callable from a function that takes and returns tensors in fixed memory.
    """

    columns = 128  # fewer, larger changes than on a CPU, since each needs a new graph
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
        """The step on fixed memory; it uses no numbers from Python."""
        column = self.tensors["column"]
        cache.unwritten.index_fill_(0, column, 0.0)

        def write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> None:
            keys.index_copy_(3, column, k.unsqueeze(3))
            values.index_copy_(2, column, v.unsqueeze(2))

        hidden = self._read_one(self.tensors["ids"], cache, write)
        cache.positions += 1
        column += 1
        return hidden

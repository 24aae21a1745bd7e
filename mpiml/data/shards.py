"""Which rows a step trains on: a pure function of the step, so that a restart needs nothing but its number."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml.data.dataset import Batch, Split
from mpiml.partition import part
from mpiml.random import generator


class Shards:
    """Shards first..last-1 of a split that is cut into `microbatches` shards, and their rows at every step.

    An epoch has `steps_per_epoch` steps, of `rows_per_step` rows on average. In it, each shard gives every one of
    its rows once, in an order drawn from (seed, epoch, shard). Shards start out of step with each other by a
    fraction of a row a step, so that short shards do not all give their next row at the same step.
    """

    def __init__(self, split: Split, microbatches: int, batch: int, seed: int, first: int, last: int, dtype: DTypeLike):
        self.split, self.microbatches, self.seed, self.dtype = split, microbatches, seed, dtype
        self.first, self.last = first, last
        self.steps_per_epoch = -(-len(split) // batch)
        self.rows_per_step = len(split) / self.steps_per_epoch
        self._epoch, self._orders = -1, dict[int, NDArray[np.int64]]()

    def hold(self) -> tuple[int, int]:
        """The range of rows that these shards read, as (start, stop)."""
        return part(self.first, self.microbatches, len(self.split))[0], self._bounds(self.last - 1)[1]

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of step 1, 2, ..., those without rows included."""
        epoch, t = divmod(step - 1, self.steps_per_epoch)
        return [self._batch(epoch, t, shard) for shard in range(self.first, self.last)]

    def _bounds(self, shard: int) -> tuple[int, int]:
        return part(shard, self.microbatches, len(self.split))

    def _batch(self, epoch: int, t: int, shard: int) -> Batch:
        start, stop = self._bounds(shard)
        length, steps = stop - start, self.steps_per_epoch
        offset = steps * shard // self.microbatches
        a, b = (length * t + offset) // steps, (length * (t + 1) + offset) // steps
        return Batch(shard, b - a, self.split, lambda: start + self._order(epoch, shard, length)[a:b], self.dtype)

    def _order(self, epoch: int, shard: int, length: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._orders.clear()
        if shard not in self._orders:
            self._orders[shard] = generator(self.seed, "order", epoch, shard).permutation(length)
        return self._orders[shard]


def chunks(split: Split, chunk_rows: int, first: int, last: int, dtype: DTypeLike) -> list[Batch]:
    """Chunks first..last-1 of a split that is read from row 0 in chunks of `chunk_rows` rows."""

    def chunk(index: int) -> Batch:
        start, stop = index * chunk_rows, min((index + 1) * chunk_rows, len(split))
        return Batch(index, stop - start, split, lambda: np.arange(start, stop), dtype)

    return [chunk(index) for index in range(first, last)]

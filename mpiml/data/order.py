"""The rows of each micro-batch of each step: a pure function of the step's number, so that a restart needs nothing
else."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mpiml.partition import part
from mpiml.random import generator

SHUFFLES = ("none", "rows", "blocks")  # as --shuffle has them
RowNumbers = NDArray[np.int64]
Order = Callable[[int, int], RowNumbers]  # (a, b) -> which rows of a shard, from 0, come a-th to (b-1)-th in an epoch


class RowOrder:
    """Rows 0..count-1, cut into `microbatches` shards, and which of them each step uses.

    An epoch has `steps_per_epoch` steps of `rows_per_step` rows on average. It uses every row of a shard once, in an
    order drawn from (seed, epoch, shard). If a shard has fewer rows than steps, only some steps get a row from it;
    shards are offset against each other so that these are not the same steps for all.

    Args:
        batch: rows per step that are asked for; `rows_per_step` is at most this.
        shuffle: what is shuffled within a shard in every epoch, one of SHUFFLES: "blocks" of `block_rows` rows.
        strided: whether shard m is every M-th row from row m on, instead of the m-th of M consecutive parts.
    """

    def __init__(
        self,
        count: int,
        microbatches: int,
        batch: int,
        seed: int,
        shuffle: str = "rows",
        block_rows: int = 256,
        strided: bool = False,
    ):
        self.count, self.microbatches, self.seed = count, microbatches, seed
        self.shuffle, self.block_rows, self.strided = shuffle, block_rows, strided
        self.steps_per_epoch = -(-count // batch)
        self.rows_per_step = count / self.steps_per_epoch
        self._epoch, self._orders = -1, dict[int, Order]()

    def shard(self, m: int) -> range:
        """The numbers of the rows of shard m."""
        if self.strided:
            return range(m, self.count, self.microbatches)
        return range(*part(m, self.microbatches, self.count))

    def numbers(self, m: int) -> RowNumbers:
        """The numbers of the rows of shard m, as an array."""
        rows = self.shard(m)
        return np.arange(rows.start, rows.stop, rows.step)

    def size(self, step: int, m: int) -> int:
        """The number of rows of micro-batch m of step 1, 2, ..."""
        a, b = self._span((step - 1) % self.steps_per_epoch, m)
        return b - a

    def total(self, step: int, first: int, last: int) -> int:
        """The number of rows of micro-batches first..last-1 of a step, as of `size`."""
        t, steps = (step - 1) % self.steps_per_epoch, self.steps_per_epoch
        whole, rest = (of_shards[first:last] for of_shards in self._rows_per_step)
        offsets = steps * np.arange(first, last) // self.microbatches
        return int((whole + (rest * (t + 1) + offsets) // steps - (rest * t + offsets) // steps).sum())

    @functools.cached_property
    def _rows_per_step(self) -> tuple[RowNumbers, RowNumbers]:
        """Of each shard the whole number of rows for each step of an epoch, and how many are left."""
        return np.divmod([len(self.shard(m)) for m in range(self.microbatches)], self.steps_per_epoch)

    def at(self, step: int, m: int) -> RowNumbers:
        """The numbers of the rows of micro-batch m of step 1, 2, ..."""
        epoch, t = divmod(step - 1, self.steps_per_epoch)
        rows = self.shard(m)
        chosen = self._order(epoch, m, len(rows))(*self._span(t, m))
        return rows.start + (chosen if rows.step == 1 else rows.step * chosen)

    def smallest(self) -> int:
        """The rows of the smallest micro-batch of an epoch, over all shards; empty ones do not count."""
        return min(max(len(self.shard(m)) // self.steps_per_epoch, 1) for m in range(self.microbatches))

    def _span(self, t: int, m: int) -> tuple[int, int]:
        """(a, b): step t = 0, 1, ... of an epoch uses the a-th to (b-1)-th row in shard m's order for this epoch."""
        rows, steps = len(self.shard(m)), self.steps_per_epoch
        offset = steps * m // self.microbatches
        return (rows * t + offset) // steps, (rows * (t + 1) + offset) // steps

    def _order(self, epoch: int, m: int, length: int) -> Order:
        if epoch != self._epoch:
            self._epoch = epoch
            self._orders.clear()
        if m not in self._orders:
            self._orders[m] = self._draw(epoch, m, length)
        return self._orders[m]

    def _draw(self, epoch: int, m: int, length: int) -> Order:
        if self.shuffle == "none":
            return np.arange
        if self.shuffle == "blocks":
            return block_order(length, self.block_rows, generator(self.seed, "blocks", epoch, m))
        permutation = generator(self.seed, "order", epoch, m).permutation(length)
        return lambda a, b: permutation[a:b]


def block_order(length: int, block_rows: int, random: np.random.Generator) -> Order:
    """The order of 0..length-1 in blocks of `block_rows` consecutive numbers (the last may be shorter), shuffled."""
    starts = block_rows * random.permutation(-(-length // block_rows))
    sizes = np.minimum(length - starts, block_rows)
    ends = np.cumsum(sizes)
    shifts = starts - (ends - sizes)  # from the position in the order to the row of the shard

    def order(a: int, b: int) -> RowNumbers:
        positions = np.arange(a, b)
        rows: RowNumbers = positions + shifts[np.searchsorted(ends, positions, side="right")]
        return rows

    return order

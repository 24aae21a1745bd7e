"""Which rows a step trains on: a pure function of the step, so that a restart needs nothing but its number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml.clock import unwatched
from mpiml.data.dataset import Batch, Split, Transform
from mpiml.partition import part
from mpiml.random import generator

Rows = NDArray[np.int64]
SCAN = 1 << 20  # labels that are counted together
Order = Callable[[int, int], Rows]  # (a, b) -> the places in a shard that come a-th to (b-1)-th in an epoch


class Shards:
    """Shards first..last-1 of a split that is cut into `microbatches` shards, and their rows at every step.

    An epoch has `steps_per_epoch` steps, of `rows_per_step` rows on average. In it, each shard gives every one of
    its rows once, in an order drawn from (seed, epoch, shard). Shards start out of step with each other by a
    fraction of a row a step, so that short shards do not all give their next row at the same step.

    Args:
        shuffle: of a shard in every epoch: "none", "rows", or "blocks" of `block_rows` consecutive rows.
        strided: whether shard m is every M-th row from row m on, not the m-th part of all rows.
        transform: (x, y, random numbers of this step and micro-batch) -> x and y to train on.
    """

    def __init__(
        self,
        split: Split,
        microbatches: int,
        batch: int,
        seed: int,
        first: int,
        last: int,
        dtype: DTypeLike,
        shuffle: str = "rows",
        block_rows: int = 256,
        strided: bool = False,
        transform: Callable[..., Any] | None = None,
    ):
        self.split, self.microbatches, self.seed, self.dtype = split, microbatches, seed, dtype
        self.first, self.last = first, last
        self.shuffle, self.block_rows, self.strided, self.transform = shuffle, block_rows, strided, transform
        self.steps_per_epoch = -(-len(split) // batch)
        self.rows_per_step = len(split) / self.steps_per_epoch
        self._epoch, self._orders = -1, dict[int, Order]()

    def rows(self) -> Rows:
        """The numbers of all rows that these shards read, rising."""
        return np.sort(np.concatenate([np.arange(0), *map(self.numbers, range(self.first, self.last))]))

    def shard(self, m: int) -> range:
        """The numbers of the rows of shard m."""
        if self.strided:
            return range(m, len(self.split), self.microbatches)
        return range(*part(m, self.microbatches, len(self.split)))

    def numbers(self, m: int) -> Rows:
        """The numbers of the rows of shard m, as an array."""
        rows = self.shard(m)
        return np.arange(rows.start, rows.stop, rows.step)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of step 1, 2, ..., those without rows included."""
        epoch, t = divmod(step - 1, self.steps_per_epoch)
        return [self._batch(epoch, t, m) for m in range(self.first, self.last)]

    def rows_of(self, step: int) -> int:
        """How many rows step 1, 2, ... has over all shards, others' included."""
        ends = (self._places((step - 1) % self.steps_per_epoch, m) for m in range(self.microbatches))
        return sum(b - a for a, b in ends)

    def _places(self, t: int, m: int) -> tuple[int, int]:
        """From which place in its order for an epoch to which shard m goes in step t of it."""
        rows, steps = len(self.shard(m)), self.steps_per_epoch
        offset = steps * m // self.microbatches
        return (rows * t + offset) // steps, (rows * (t + 1) + offset) // steps

    def _batch(self, epoch: int, t: int, m: int) -> Batch:
        rows = self.shard(m)
        a, b = self._places(t, m)

        def select() -> Rows:
            return rows.start + rows.step * self._order(epoch, m, len(rows))(a, b)

        return Batch(m, b - a, self.split, select, self.dtype, self._transform(epoch * self.steps_per_epoch + t + 1, m))

    def _transform(self, step: int, m: int) -> Transform | None:
        function = self.transform
        if function is None:
            return None
        return lambda x, y: function(x, y, generator(self.seed, "transform", step, m))

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
            return blocks(length, self.block_rows, generator(self.seed, "blocks", epoch, m))
        permutation = generator(self.seed, "order", epoch, m).permutation(length)
        return lambda a, b: permutation[a:b]


def blocks(length: int, block: int, random: np.random.Generator) -> Order:
    """0..length-1 in runs of `block` numbers, the last maybe shorter, the runs in random order."""
    starts = block * random.permutation(-(-length // block))
    sizes = np.minimum(length - starts, block)
    ends = np.cumsum(sizes)
    shifts = starts - (ends - sizes)  # from the place in the epoch to the place in the shard

    def order(a: int, b: int) -> Rows:
        places = np.arange(a, b)
        moved: Rows = places + shifts[np.searchsorted(ends, places, side="right")]
        return moved

    return order


def classes_seen(
    shards: Shards, classes: int, moved: Callable[[], object] = unwatched
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How often these shards' labels are of each class, and of how many classes each shard has any (0: not ours).

    `moved` is called whenever some more have been counted.
    """
    counts, seen = np.zeros(classes, np.int64), np.zeros(shards.microbatches, np.int64)
    for m in range(shards.first, shards.last):
        mine, rows = np.zeros(classes, np.int64), shards.numbers(m)
        for first in range(0, len(rows), SCAN):
            labels = shards.split.y.rows(rows[first : first + SCAN]).astype(np.intp)
            mine += np.bincount(labels[labels >= 0], minlength=classes)
            moved()
        counts += mine
        seen[m] = np.count_nonzero(mine)
    return counts, seen


def starved(counts: NDArray[np.int64], seen: NDArray[np.int64]) -> str | None:
    """A warning if shards have far fewer classes than as many rows drawn at random would have."""
    share = counts / counts.sum()
    expected = float((1 - (1 - share) ** (counts.sum() / len(seen))).sum())
    if seen.mean() >= 0.8 * expected:
        return None
    return (
        f"a shard has labels of {seen.mean():.1f} classes on average, but rows drawn at random would have "
        f"{expected:.1f}: the labels seem to be sorted, and a micro-batch never sees most classes; "
        "--shards strided deals the rows out"
    )


def chunks(split: Split, chunk_rows: int, first: int, last: int, dtype: DTypeLike) -> list[Batch]:
    """Chunks first..last-1 of a split that is read from row 0 in chunks of `chunk_rows` rows."""

    def chunk(index: int) -> Batch:
        start, stop = index * chunk_rows, min((index + 1) * chunk_rows, len(split))
        return Batch(index, stop - start, split, lambda: np.arange(start, stop), dtype)

    return [chunk(index) for index in range(first, last)]

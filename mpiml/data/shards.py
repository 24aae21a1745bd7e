"""The rows of each step: a pure function of the step's number, so that a restart needs nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml.clock import unwatched
from mpiml.data.batch import Batch
from mpiml.data.dataset import Split
from mpiml.partition import part
from mpiml.random import generator, keyed

Rows = NDArray[np.int64]
SCAN = 1 << 20  # labels that are counted at once
FEW = 8  # rows of a chunk in a file, which it is no matter to read again
Order = Callable[[int, int], Rows]  # (a, b) -> which rows of a shard, from 0, come a-th to (b-1)-th in an epoch


class Shards:
    """Shards first..last-1 of a split that is cut into `microbatches` shards, and their rows at every step.

    An epoch has `steps_per_epoch` steps of `rows_per_step` rows on average. It uses every row of a shard once, in an
    order drawn from (seed, epoch, shard). If a shard has fewer rows than steps, only some steps get a row from it;
    shards are offset against each other so that these are not the same steps for all.

    Args:
        batch: rows per step that are asked for; `rows_per_step` is at most this.
        shuffle: what is shuffled within a shard in every epoch: "none", "rows", or "blocks" of `block_rows` rows.
        strided: whether shard m is every M-th row from row m on, instead of the m-th of M consecutive parts.
        transform: (x, y, generator of this step and micro-batch) -> x and y to train on.

    Attributes:
        draws: the generators of the process that the transform draws from (mpiml.random): they are keyed as its own is.
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
        self.draws: frozenset[str] = frozenset()
        self.steps_per_epoch = -(-len(split) // batch)
        self.rows_per_step = len(split) / self.steps_per_epoch
        self._epoch, self._orders = -1, dict[int, Order]()

    def rows(self) -> Rows:
        """The numbers of all rows of these shards, in rising order."""
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
        """The micro-batches of step 1, 2, ..., including empty ones."""
        epoch, t = divmod(step - 1, self.steps_per_epoch)
        return [self._batch(epoch, t, m) for m in range(self.first, self.last)]

    def rows_of(self, step: int) -> int:
        """The number of rows of step 1, 2, ... over all micro-batches, including other ranks'."""
        ends = (self._span((step - 1) % self.steps_per_epoch, m) for m in range(self.microbatches))
        return sum(b - a for a, b in ends)

    def smallest(self) -> int:
        """The rows of the smallest micro-batch of an epoch, over all shards; empty ones do not count."""
        return min(max(len(self.shard(m)) // self.steps_per_epoch, 1) for m in range(self.microbatches))

    def _span(self, t: int, m: int) -> tuple[int, int]:
        """(a, b): step t = 0, 1, ... of an epoch uses the a-th to (b-1)-th row in shard m's order for this epoch."""
        rows, steps = len(self.shard(m)), self.steps_per_epoch
        offset = steps * m // self.microbatches
        return (rows * t + offset) // steps, (rows * (t + 1) + offset) // steps

    def _batch(self, epoch: int, t: int, m: int) -> Batch:
        rows = self.shard(m)
        a, b = self._span(t, m)

        def select() -> Rows:
            return rows.start + rows.step * self._order(epoch, m, len(rows))(a, b)

        purpose, function = (self.seed, "transform", epoch * self.steps_per_epoch + t + 1, m), self.transform

        def transform(x: Any, y: Any) -> Any:
            assert function, "there is none"
            with keyed(self.draws, *purpose):
                return function(x, y, generator(*purpose))

        return Batch(m, b - a, self.split, select, self.dtype, transform if function else None)

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

    def order(a: int, b: int) -> Rows:
        positions = np.arange(a, b)
        rows: Rows = positions + shifts[np.searchsorted(ends, positions, side="right")]
        return rows

    return order


def rereads(shards: Shards) -> list[str]:
    """A line on what to do if a file's rows are stored in chunks, of which a step reads one for each of its rows."""
    rows, name = max((getattr(source, "chunk_rows", 1), source.name) for source in shards.split.sources())
    if shards.shuffle != "rows" or rows <= FEW:
        return []
    better = f"{'--shards contiguous ' if shards.strided else ''}--shuffle blocks --block-rows {rows}"
    again = f"each chunk of {rows} rows is read, and unpacked, up to {rows} times an epoch"
    return [f"{name}: {again}; {better} reads it once"]


def classes_seen(
    shards: Shards, classes: int, progress: Callable[[], object] = unwatched
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The number of labels of each class in these shards, and for each of all M shards the number of classes that occur
    in it, 0 for those of other ranks. `progress` is called after every SCAN labels."""
    counts, seen = np.zeros(classes, np.int64), np.zeros(shards.microbatches, np.int64)
    for m in range(shards.first, shards.last):
        in_shard, rows = np.zeros(classes, np.int64), shards.numbers(m)
        for first in range(0, len(rows), SCAN):
            labels = shards.split.y.rows(rows[first : first + SCAN]).astype(np.intp)
            in_shard += np.bincount(labels[labels >= 0], minlength=classes)
            progress()
        counts += in_shard
        seen[m] = np.count_nonzero(in_shard)
    return counts, seen


def starved(counts: NDArray[np.int64], seen: NDArray[np.int64]) -> str | None:
    """A warning if shards have labels of far fewer classes than as many rows drawn at random would have; else None.

    Args:
        counts, seen: of `classes_seen`, summed over all ranks.
    """
    share = counts / counts.sum()
    expected = float((1 - (1 - share) ** (counts.sum() / len(seen))).sum())
    if seen.mean() >= 0.8 * expected:
        return None
    return (
        f"a shard has labels of {seen.mean():.1f} classes on average, but rows drawn at random would have "
        f"{expected:.1f}: the labels seem to be sorted, so that micro-batches lack most classes; "
        "--shards strided spreads neighbouring rows over all shards"
    )


def chunks(split: Split, chunk_rows: int, first: int, last: int, dtype: DTypeLike) -> list[Batch]:
    """Chunks first..last-1 of a split in row order, cut into chunks of `chunk_rows` rows (the last may be shorter)."""

    def chunk(index: int) -> Batch:
        start, stop = index * chunk_rows, min((index + 1) * chunk_rows, len(split))
        return Batch(index, stop - start, split, lambda: np.arange(start, stop), dtype)

    return [chunk(index) for index in range(first, last)]

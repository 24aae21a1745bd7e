"""The training rows in shards, of which each step takes a part, and the rows of an evaluation in chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml.clock import unwatched
from mpiml.data.batch import Batch
from mpiml.data.dataset import Split
from mpiml.data.order import RowNumbers, RowOrder
from mpiml.random import generator, keyed

SCAN = 1 << 20  # labels that are counted at once
FEW = 8  # rows of a chunk in a file, which it is no matter to read again


class Shards(RowOrder):
    """Shards first..last-1 of a split, and their rows at every step; other arguments as of RowOrder.

    Args:
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
        super().__init__(len(split), microbatches, batch, seed, shuffle, block_rows, strided)
        self.split, self.dtype, self.first, self.last, self.transform = split, dtype, first, last, transform
        self.draws: frozenset[str] = frozenset()

    def rows(self) -> RowNumbers:
        """The numbers of all rows of these shards, in rising order."""
        if self.first == self.last:
            return np.arange(0)
        if not self.strided:
            return np.arange(self.shard(self.first).start, self.shard(self.last - 1).stop)
        rows = np.add.outer(np.arange(0, self.count, self.microbatches), np.arange(self.first, self.last)).ravel()
        return rows[: np.searchsorted(rows, self.count)]

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of step 1, 2, ..., including empty ones."""
        return [self._batch(step, m) for m in range(self.first, self.last)]

    def _batch(self, step: int, m: int) -> Batch:
        transform = functools.partial(self._transformed, step, m) if self.transform else None
        return Batch(m, self.size(step, m), self.split, functools.partial(self.at, step, m), self.dtype, transform)

    def _transformed(self, step: int, m: int, x: Any, y: Any) -> Any:
        assert self.transform, "there is none"
        purpose = self.seed, "transform", step, m
        with keyed(self.draws, *purpose):
            return self.transform(x, y, generator(*purpose))


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

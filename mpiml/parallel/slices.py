"""How a flat vector is cut: into slices, which replicas own, and pieces, which fit a cache; no MPI."""

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol, TypeVar

import numpy as np

from mpiml.vectors import BLOCK, PIECE, Block

Range = tuple[int, int]
Kind = tuple[bool, float | None, float, int | None, str | None, bool]  # of a block, without its range
MESSAGE = 1 << 30  # elements of a message: before MPI 4, libraries count them in C's int


class Extent(Protocol):
    """Anything that covers a range, such as a block or a piece."""

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


T = TypeVar("T", bound=Extent)


@dataclass(frozen=True)
class Piece:
    """vector[start:stop], blocks that are equal but for their range, which are updated at once.

    `blocks` are their (start, stop), relative to the piece's start.
    """

    start: int
    stop: int
    decay: bool
    momentum: float | None
    rate: float
    matrix: int | None
    array: str | None
    counted: bool
    blocks: list[tuple[int, int]]

    @property
    def kind(self) -> Kind:
        """What its blocks have in common."""
        return _kind(self)


def _kind(of: Any) -> Kind:
    return of.decay, of.momentum, of.rate, of.matrix, of.array, of.counted


def runs(blocks: Sequence[Block], size: int, owners: int) -> list[Sequence[Block]]:
    """The runs of blocks that are buckets, the last one first. Those of an array that stands in several layers are by
    themselves, so that its slices are equal on all stages: they are cut only to fit into messages. Of all others, the
    runs have `size` elements, as of `buckets`."""
    groups = [(array, list(group)) for array, group in itertools.groupby(blocks, lambda block: block.array)]
    return [run for array, group in reversed(groups) for run in buckets(group, MESSAGE * owners if array else size)]


def buckets(blocks: Sequence[Block], size: int) -> list[Sequence[Block]]:
    """Cut blocks into runs of `size` elements or a little more, or one run if `size` is 0. The last run comes first,
    because a backward pass writes the vector from its end."""
    runs, stop = [], len(blocks)
    for index in reversed(range(len(blocks))):
        if index == 0 or 0 < size <= blocks[stop - 1].stop - blocks[index].start:
            runs.append(blocks[index:stop])
            stop = index
    return runs


def elements(megabytes: float, dtype: np.dtype[Any]) -> int:
    """How many elements make so many MB, of 2^20 bytes."""
    return math.ceil(megabytes * 2**20 / dtype.itemsize)


def bucket_size(asked: int, size: int, owners: int, most: int) -> int:
    """The elements of a bucket of a vector of `size`, where `asked` are asked for, 0 for one bucket: so many that there
    are at most `most` buckets, and so few that each owner's slice fits into a message."""
    return max(min(asked or size, MESSAGE * owners), -(-size // (most - 1)))


def cut(ranges: Sequence[Range]) -> list[Range]:
    """Cut ranges into parts that each fit into a message."""
    return [(a, min(a + MESSAGE, stop)) for start, stop in ranges for a in range(start, stop, MESSAGE)]


def owned(blocks: Sequence[T], owners: int, late: float = 0.0) -> list[Sequence[T]]:
    """The run of blocks that each owner gets: one after another, of nearly equal length; some may be empty. Runs begin
    `late` blocks further on in the list of owners, 0 to 1: where blocks are few, others get them."""
    starts = [block.start for block in blocks]
    first, stop = bounds(blocks)
    begin, length = first - late * min(BLOCK, stop - first), stop - first
    cuts = [bisect_left(starts, begin + length * owner / owners) for owner in range(owners)] + [len(blocks)]
    return [blocks[a:b] for a, b in itertools.pairwise(cuts)]


def bounds(run: Sequence[Extent]) -> tuple[int, int]:
    """Where a run of blocks starts and stops."""
    return (run[0].start, run[-1].stop) if run else (0, 0)


def dealt(ranges: Sequence[Range], pieces: Sequence[Piece], share: int, shares: int) -> list[Range]:
    """What share number `share` of `shares` nearly equal ones is of ranges that these pieces make up."""
    first, last = bounds(owned(sorted(pieces, key=lambda piece: piece.start), shares)[share])
    overlap = [(max(start, first), min(stop, last)) for start, stop in ranges]
    return [(start, stop) for start, stop in overlap if start < stop]


def place(ranges: Sequence[Range], start: int, stop: int) -> slice:
    """Where vector[start:stop], part of one of these ranges, lies in a vector that holds only these."""
    before = 0
    for first, last in ranges:
        if first <= start < last:
            return slice(before + start - first, before + stop - first)
        before += last - first
    raise ValueError(f"{start} to {stop} is in none of {ranges}")


def within(ranges: Sequence[Range], start: int, stop: int) -> list[Range]:
    """The reverse of `place`: which ranges of the whole vector lie from start to stop in one of only these."""
    parts, before = list[Range](), 0
    for first, last in ranges:
        low, high = max(first, first + start - before), min(last, first + stop - before)
        parts += [(low, high)] if low < high else []
        before += last - first
    return parts


def overlaps(ranges: Sequence[Range], others: Sequence[Range]) -> Iterator[tuple[Range, slice]]:
    """Where ranges overlap others, in order: the range, and which part of it, cut to fit into messages. Both lists are
    sorted, and no two ranges of one overlap."""
    for start, stop in ranges:
        for index in range(bisect_right(others, start, key=itemgetter(1)), len(others)):
            low, high = others[index]
            if low >= stop:
                break
            for first, last in cut([(max(low, start), min(high, stop))]):
                yield (start, stop), slice(first - start, last - start)


def pieces(run: Sequence[Block], longest: int = PIECE) -> list[Piece]:
    """Join neighbouring blocks of one kind into pieces of at most `longest` elements."""
    joined: list[Piece] = []
    for block in run:
        last = joined[-1] if joined else None
        kind = _kind(block)
        if last and last.kind == kind and block.stop - last.start <= longest:
            inside = [*last.blocks, (block.start - last.start, block.stop - last.start)]
            joined[-1] = Piece(last.start, block.stop, *kind, inside)
        else:
            joined.append(Piece(block.start, block.stop, *kind, [(0, block.stop - block.start)]))
    return joined

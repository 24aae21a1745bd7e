"""Segments of a file's arrays, which ranks hold, and who writes what of it; no MPI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpiml.run.digests import SIZE, blocks_in, content, little
from mpiml.vectors import ALIGNMENT, BLOCK

Array = NDArray[Any]
# A rank writes whole units of a file of its own, in bytes: clients of network file systems write pages as a whole, so
# two of them must not write into one page.
UNIT = 1 << 20


class Segment(NamedTuple):
    """Elements of an array of a file.

    Attributes:
        name: of the array.
        first: the number of the first element, which begins a block.
        values: the elements, contiguous: a rank's own memory.
        finite: whether they must be finite to be saved.
    """

    name: str
    first: int
    values: Array
    finite: bool = True


class Copies:
    """Memory for copies of segments."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def claim(self, size: int) -> None:
        """Have so many bytes, so that their pages exist before they are needed."""
        if size > self._memory.size:
            self._memory = np.empty(0, np.uint8)  # first let go of those of before
            self._memory = np.empty(size, np.uint8)
            self._memory.fill(1)

    def of(self, own: Sequence[Segment]) -> list[Segment]:
        """Copies of segments, which take the place of those of before."""
        self.claim(size_of_copies(own))
        copies, at = [], 0
        for segment in own:
            copy = self._memory[at : at + segment.values.nbytes].view(segment.values.dtype)
            np.copyto(copy, segment.values)
            copies.append(segment._replace(values=copy))
            at += _padded(segment)
        return copies


def size_of_copies(own: Sequence[Segment]) -> int:
    """The bytes that copies of segments take."""
    return sum(map(_padded, own))


def _padded(segment: Segment) -> int:
    return -(-segment.values.nbytes // ALIGNMENT) * ALIGNMENT


class Span(NamedTuple):
    """Bytes of a file, from its byte `start` on."""

    start: int
    view: memoryview

    @property
    def stop(self) -> int:
        return self.start + len(self.view)


def spans(segments: Sequence[Segment], starts: Mapping[str, int]) -> list[Span]:
    """Where segments lie in a file in which arrays begin at `starts`, in order."""
    of = [(starts[s.name] + s.first * s.values.itemsize, s) for s in segments]
    return [Span(start, content(little(s.values))) for start, s in sorted(of, key=lambda each: each[0])]


def divided(of: Sequence[Span], unit: int = UNIT) -> tuple[list[Span], list[Span]]:
    """Those parts of spans that make up whole units, and the rest, each within a unit."""
    whole, rest = list[Span](), list[Span]()
    for run in _runs(of):
        first, last = -(-run[0].start // unit) * unit, run[-1].stop // unit * unit
        for span in run:
            for low, high, into in ((0, first, rest), (first, last, whole), (max(first, last), span.stop, rest)):
                start, stop = max(low, span.start), min(high, span.stop)
                if start < stop:
                    into.append(Span(start, span.view[start - span.start : stop - span.start]))
    return whole, rest


def _runs(of: Sequence[Span]) -> Iterator[list[Span]]:
    """Spans that lie one after another without a gap."""
    run = list[Span]()
    for span in of:
        if run and run[-1].stop != span.start:
            yield run
            run = []
        run.append(span)
    if run:
        yield run


def writers(edges: NDArray[np.int64], unit: int = UNIT) -> NDArray[np.int64]:
    """Which rank writes each of these parts of units, rows of (first byte, end, rank that holds it): that which holds
    the first part of the unit."""
    order = np.argsort(edges[:, 0])
    units = edges[order, 0] // unit
    begins = np.diff(units, prepend=-1) > 0  # one that is the first of its unit
    first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    writer = np.empty(len(edges), np.int64)
    writer[order] = edges[order[first], 2]
    return writer


def digests_of(parts: Sequence[tuple[NDArray[np.int64], bytes]], sizes: Sequence[int]) -> list[bytes]:
    """The digests of all blocks of each array, one after another.

    Args:
        parts: of each rank its segments, rows of (number of the array, first element, elements), and the digests of
            their blocks, in this order.
        sizes: of the arrays, in elements.

    Raises ValueError unless they are of each block once.
    """
    every = [bytearray(SIZE * blocks_in(size)) for size in sizes]
    missing = sum(map(len, every))
    for rows, digests in parts:
        at = 0
        for number, first, count in rows.tolist():
            length, place = SIZE * blocks_in(count), SIZE * (first // BLOCK)
            if any(every[number][place : place + length]):
                raise ValueError(f"elements {first} to {first + count} of array {number} are there twice")
            every[number][place : place + length] = digests[at : at + length]
            at, missing = at + length, missing - length
    if missing:
        raise ValueError(f"{missing} bytes of digests are missing")
    return [bytes(one) for one in every]

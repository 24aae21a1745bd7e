"""Arrays side by side in flat vectors, one of each dtype; and the sum of these vectors over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml import vectors
from mpiml.clock import Clock
from mpiml.parallel.gradient_sum import OrderedSum
from mpiml.parallel.grid import Grid
from mpiml.parallel.memory import Memory, SharedMemory, share
from mpiml.parallel.record import Agreement, Record, agree
from mpiml.parallel.tree import depth
from mpiml.parallel.values import Values
from mpiml.partition import part
from mpiml.vectors import Vector, bytes_of, padded

Arrays = list[NDArray[Any]]  # one for each leaf, in their order
NO_ROWS = np.empty((0, 2))  # of a step record


class Flat:
    """All leaves of one dtype in one vector, each from a 64-byte boundary on.

    Attributes:
        leaves: their numbers among all leaves.
        size: of the vector, in elements.
    """

    def __init__(self, dtype: np.dtype[Any], shapes: dict[int, tuple[int, ...]]):
        self.dtype, self.leaves, self.shapes, self.size = dtype, list(shapes), list(shapes.values()), 0
        self.places: list[slice] = []
        for shape in self.shapes:
            length = math.prod(shape)
            self.places.append(slice(self.size, self.size + length))
            self.size += padded(length, dtype)

    def blocks(self) -> list[vectors.Block]:
        """The blocks of the vector."""
        return [block for place in self.places for block in vectors.blocks(place.start, place.stop)]

    def views(self, vector: Vector) -> dict[int, NDArray[Any]]:
        """The leaves in a vector, by their numbers."""
        views = [vector[place].reshape(shape) for place, shape in zip(self.places, self.shapes, strict=True)]
        return dict(zip(self.leaves, views, strict=True))


class FlatSums:
    """The sums of flat vectors, one after the other; collective to make. Those of two dtypes share no messages, and no
    counters in shared memory.

    Args:
        columns: of the step record on which ranks agree.
        memory: "shared", "private" or "auto", as of `share`.
        finite: whether to look for what is not finite.

    Attributes:
        sums: of each vector, and slots: of each of this rank's micro-batches its slot's number in `leaves`.
        leaves: of each slot its arrays, and totals: those of the total, which cannot be written to.
        agree: (rows of this rank's micro-batches, its two flags) -> the record of all ranks; collective.
    """

    def __init__(
        self,
        grid: Grid,
        flats: Sequence[Flat],
        microbatches: int,
        columns: int,
        memory: str,
        finite: bool,
        clock: Clock,
    ):
        self._finite, self.sums, memories = finite, list[OrderedSum](), list[Memory]()
        count = depth(grid.replica, grid.replicas, microbatches)
        agreed = Agreement.bytes_needed(grid.node.size, grid.replicas, microbatches, columns)
        agreed += bytes_of(grid.node.size, np.float64)
        for flat in flats:
            each = bytes_of(flat.size, flat.dtype)
            memories.append(share(grid.comm, grid.node, count * each, each + agreed, memory)[0])
            comm = grid.data.Dup() if self.sums else grid.data
            grid.made += [comm] if self.sums else []
            values = Values(comm, memories[-1], flat.size, flat.blocks(), flat.dtype)
            self.sums.append(OrderedSum(values, microbatches, clock))
        first, plan = memories[0], self.sums[0].plan
        self._one_node = len(self.sums[0].values.nodes) == 1
        self._bad = first.common(first.ranks, np.float64)
        self._own_bad = self._bad[first.rank : first.rank + 1]
        own, _ = part(grid.replica, grid.replicas, microbatches)
        self.agree: Callable[[NDArray[Any], bool, bool], Record] = partial(agree, grid.comm, first=own)
        if isinstance(first, SharedMemory):
            self.agree = Agreement(grid, first, microbatches, columns)
        self.slots = plan.slots
        self._merged = plan.counts
        self._left = sum(1 - merged for merged in plan.counts)
        self.leaves = [_ordered(flats, [one.slots[number] for one in self.sums]) for number in range(count)]
        self.totals = _ordered(flats, [one.values.vector for one in self.sums])
        for view in self.totals:
            view.flags.writeable = False

    def accumulate(self, index: int) -> None:
        """Add up what is in the slot of micro-batch `index` of this rank with what it is to be added to."""
        if not self._merged[index]:
            for one in self.sums:
                one.accumulate(index)
            return
        with np.errstate(all="ignore"):  # the sum is looked at
            for one in self.sums:
                one.accumulate(index)

    def add_up(self, scale: float) -> bool:
        """Make `scale` times the sum the total; collective. Returns whether it is not finite anywhere, on any rank."""
        finite = True
        with np.errstate(all="ignore"):
            for one in self.sums:
                finite = self._add_up_one(one, scale) and finite
        self._own_bad[:] = not finite  # the others of the node read it after the barrier of publish
        for one in self.sums:
            one.publish()
        if self._one_node:
            return any(self._bad.tolist())
        return bool(self._finite and self.agree(NO_ROWS, not finite, False).broken)

    def _add_up_one(self, one: OrderedSum, scale: float) -> bool:
        """The part of this rank in one sum. Returns whether it is finite."""
        one.start()
        finite, vector = True, one.values.vector
        for index, piece in enumerate(one.values.pieces):
            out = vector[piece.start : piece.stop]
            total = one.total(index, out)
            if scale != 1:
                np.multiply(total, scale, out=out)
            elif total is not out:
                np.copyto(out, total)
            finite = finite and (not self._finite or vectors.is_finite(out))
        return finite

    def partial_sums(self) -> list[Arrays]:
        """Of all micro-batches of this rank, when all are put: the arrays that they have been added up to."""
        return self.leaves[: self._left]

    def drop(self) -> None:
        """Do without the sum of what ranks have put, all of it or not; collective."""
        with np.errstate(all="ignore"):
            for one in self.sums:
                one.start()  # the messages of ranks that have begun have to be met
                one.drop()

    def free(self) -> None:
        """Give back what the MPI library holds; what lies in memory stays."""
        for one in self.sums:
            one.free()
            one.values.free()


def _ordered(flats: Sequence[Flat], flat_vectors: Sequence[Vector]) -> Arrays:
    """The leaves in vectors, in their order."""
    views = dict[int, NDArray[Any]]()
    for flat, vector in zip(flats, flat_vectors, strict=True):
        views |= flat.views(vector)
    return [views[number] for number in sorted(views)]

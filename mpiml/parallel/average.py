"""The average over workers: of the values and states that each of them has come to by itself, in canonical order.

Ranks that hold the same part of the model for different workers make up a lane. In each lane that part is averaged as
gradients are summed, with workers in the place of micro-batches: theta_mean is the canonical tree over theta_w, divided
by the number of workers.

Then comes the outer step, which takes the way from theta, the values at the start of the round, to theta_mean for a
gradient: delta = theta - theta_mean; velocity = momentum * velocity + delta; theta -= rate * (delta + momentum *
velocity). With rate 1 and momentum 0 it ends at theta_mean, which is local SGD (Stich, ICLR 2019); with others, and
AdamW as the workers' optimizer, it is DiLoCo (Douillard et al., arXiv 2311.08105). Averaging optimizer states is as in
Local Adam (Cheng and Glasgow, arXiv 2409.13155).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from mpiml import vectors
from mpiml.parallel import exact
from mpiml.parallel.gradient_sum import OrderedSum
from mpiml.parallel.grid import Grid
from mpiml.parallel.memory import share
from mpiml.parallel.slices import Range, place, within
from mpiml.parallel.state import Part
from mpiml.parallel.tree import depth
from mpiml.parallel.update import Update
from mpiml.parallel.values import Values
from mpiml.team import wait
from mpiml.vectors import Block, Vector, bytes_of, padded


class Average:
    """Averages what this rank holds of its own workers with other ranks of its lane; collective to make and to use.

    Args:
        grid: all ranks.
        groups: how many groups of replicas compute workers: each one or several whole ones, one after another.
        workers: how many there are, a multiple of `groups`.
        copies: of this rank's workers, in order; their values are placed alike.
        memory: "shared", "private" or "auto", as of `share`.
        outer: rate and momentum of the outer step; None if workers end at the mean.

    Attributes:
        start: this rank's part of the values at the start of the round, and velocity: of the outer step, if there is
            one; both of the ranges `own` of the vector of values.
        finite: whether all values to which this rank's part of the last outer step led are finite.
    """

    def __init__(
        self,
        grid: Grid,
        groups: int,
        workers: int,
        copies: Sequence[Update],
        memory: str,
        outer: tuple[float, float] | None = None,
    ):
        self.comm, self.clock, self.copies, self.outer = grid.comm, grid.team.clock, copies, outer
        like = copies[0].sum.values
        self.held, dtype = like.held, like.dtype
        self._length = sum(stop - start for start, stop in self.held)
        size = padded(self._length, dtype)
        number = grid.replica % (grid.replicas // groups)
        self._lane, self._local = (MPI.Intracomm(comm.Split(number, comm.rank)) for comm in (grid.data, grid.local))
        each, slots = bytes_of(size, dtype), depth(self._lane.rank, self._lane.size, workers)
        node, _ = share(grid.comm, self._local, slots * each, each, memory)
        self.values = Values(self._lane, node, size, self._blocks(like), dtype)
        self.sum = OrderedSum(self.values, workers, self.clock)
        self.start = vectors.zeros(sum(stop - start for start, stop in self.values.held), dtype)
        self.velocity = np.zeros_like(self.start) if outer else None
        self.own = [of for a, b in self.values.held for of in within(self.held, a, b)]
        self.finite = True
        self._counts = copies[0].counts  # of the replicas that hold the same, this one's part counts

    def _blocks(self, like: Values) -> list[Block]:
        """The blocks of the parts that a copy holds, one after another."""
        blocks = []
        for piece in like.pieces:
            first = place(self.held, piece.start, piece.stop).start
            kind = piece.decay, piece.momentum, piece.rate, None, None, piece.counted
            blocks += [Block(first + start, first + stop, *kind) for start, stop in piece.blocks]
        return sorted(blocks, key=lambda block: block.start)

    def parts(self, vector: Vector) -> Part:
        """What this rank has of a vector in the layout of `start`."""
        views, first = dict[Range, Vector](), 0
        for start, stop in self.own:
            views[start, stop] = vector[first : first + stop - start]
            first += stop - start
        once = self._counts and self._lane.rank in self.values.owners
        return Part(views, views if once else {})

    def begin(self) -> None:
        """Note the values at the start of a round."""
        for of, part in self.parts(self.start).held.items():
            part[...] = self.copies[0].sum.values.vector[slice(*of)]

    def meet(self, counted: Sequence[bool], count: int, measure: bool) -> float | None:
        """Average over the workers that count, do the outer step, and give all workers the outcome.

        Args:
            counted: for each of this rank's workers, whether it counts.
            count: how many of all workers do, at least 1.
            measure: whether to measure how far apart they were.

        Returns the root of the mean square of the workers' distances from their mean, None if it is not measured.
        """
        self.clock("update")
        values = [copy.sum.values for copy in self.copies]
        mean = self._mean([self._gathered(one) for one in values], counted, count)
        distance = self._distance(mean, counted, count) if measure else None
        if self.outer and self.velocity is not None:
            self._outer_step(self.velocity, *self.outer)
        for one in values:
            for of in self.held:
                one.vector[slice(*of)] = mean[place(self.held, *of)]
        for name in self.copies[0].states:
            states = [copy.states[name] for copy in self.copies]
            mean = self._mean(states, counted, count)
            for state in states:
                state[...] = mean
        self.clock("communication")
        for one in values:
            one.publish()
        return distance

    def free(self) -> None:
        """Give back what the MPI library holds for it; collective."""
        self.sum.free()
        self.values.free()
        self._local.Free()
        self._lane.Free()

    def _gathered(self, values: Values) -> list[Vector]:
        return [values.vector[slice(*of)] for of in self.held]

    def _mean(self, own: Sequence[Vector | list[Vector]], counted: Sequence[bool], count: int) -> Vector:
        """The mean of vectors, or of the parts that make up vectors; all ranks of a node see one array."""
        for index, (vector, counts) in enumerate(zip(own, counted, strict=True)):
            slot = self.sum.slots[self.sum.plan.slots[index]][: self._length]
            if not counts:
                slot.fill(0)
            elif isinstance(vector, list):
                np.concatenate([slot[:0], *vector], out=slot)
            else:
                slot[...] = vector
            self.sum.accumulate(index)
        self.clock("communication")
        self.values.memory.barrier()  # all have written their slots, and nobody reads the last mean any more
        self.sum.start()
        self.clock("update")
        for index, piece in enumerate(self.values.pieces):
            out = self.values.vector[piece.start : piece.stop]
            np.divide(self.sum.total(index, out), count, out=out)
        self.clock("communication")
        self.sum.publish()
        self.clock("update")
        return self.values.vector[: self._length]

    def _distance(self, mean: Vector, counted: Sequence[bool], count: int) -> float:
        """The root of the mean over workers of |theta_w - mean|^2, of what optimizers change."""
        squares: list[float] = []
        apart = self.sum.slots[0][: self._length]  # which nobody needs any more
        if self._counts:
            every = self._blocks(self.copies[0].sum.values)
            blocks = [block for block in every if block.momentum is None and block.counted]
            for copy, counts in zip(self.copies, counted, strict=True):
                np.concatenate([mean[:0], *self._gathered(copy.sum.values)], out=apart)
                np.subtract(apart, mean, out=apart)
                squares += vectors.square_sums(apart, [(b.start, b.stop) for b in blocks] if counts else [])
        total = exact.digits(np.array(squares).reshape(-1, 1))
        self.clock("communication")
        wait([self.comm.Iallreduce(MPI.IN_PLACE, total)])
        self.clock("update")
        return math.sqrt(exact.rounded(total)[0] / count)

    def _outer_step(self, velocities: Vector, rate: float, momentum: float) -> None:
        """Go from the values at the start of the round by the outer step, in the place of the mean."""
        self.finite = True
        for piece in self.values.pieces:
            if piece.momentum is not None:
                continue  # a running average has no gradient
            where = place(self.values.held, piece.start, piece.stop)
            start, velocity = self.start[where], velocities[where]
            mean = self.values.vector[piece.start : piece.stop]
            delta = start - mean
            np.multiply(velocity, momentum, out=velocity)
            np.add(velocity, delta, out=velocity)
            np.multiply(velocity, momentum, out=mean)
            np.add(mean, delta, out=mean)
            np.multiply(mean, rate, out=mean)
            np.subtract(start, mean, out=mean)
            self.finite = self.finite and vectors.is_finite(mean)
        self.clock("communication")
        self.values.publish()
        self.clock("update")

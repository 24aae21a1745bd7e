"""The gradient sum over micro-batches and replicas: in canonical order, or as the MPI library likes.

Both kinds are used alike. While the backward passes of a step go on, each writes into the vector of its slot and
`accumulate` adds up what can be added. Then `start` exchanges partial sums, `total(i)` gives the summed gradient
of piece i of what this replica updates, and `publish` hands the new values to all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from mpi4py import MPI
from numpy.typing import DTypeLike

from mpiml import vectors
from mpiml.clock import Clock
from mpiml.parallel.exchange import Exchange, tags
from mpiml.parallel.memory import Memory
from mpiml.parallel.slices import Block, Piece, Range, bounds, bucket_size, buckets, cut, pieces
from mpiml.parallel.tree import Plan, plan
from mpiml.team import wait
from mpiml.vectors import PIECE, Vector


class GradientSum(Protocol):
    """What the update and the stage know of a sum.

    Attributes:
        plan: which micro-batches are this replica's, and into which slots they go.
        values: the flat vector of values.
        slots: gradient vectors of this replica.
        pieces: what this replica updates; held: the same as ranges (start, stop).
        worker: (rank, ranks) of those that share `values`.
        holders: (replica, start, stop) of parts that hold the whole vector between them, each element once.
        complete: wants to be told, during the backward pass of this replica's last micro-batch, from which offset to
            its end the vector is written; None if nothing can be begun before the rest is.
    """

    plan: Plan
    values: Vector
    slots: list[Vector]
    pieces: list[Piece]
    held: list[Range]
    holders: list[tuple[int, int, int]]
    complete: Callable[[int], None] | None

    @property
    def worker(self) -> tuple[int, int]: ...

    def accumulate(self, index: int) -> None:
        """Add up what can be added after the index-th micro-batch of this replica."""

    def start(self) -> None:
        """Exchange partial sums. Every replica of the stage calls it when the step record is agreed on: nobody has
        that before all have finished their backward passes."""

    def total(self, index: int, out: Vector) -> Vector:
        """The summed gradient of pieces[index]: in `out` if there was anything to add, else where it lies in
        slots[0]."""

    def publish(self) -> None:
        """Hand the values of this replica's part to all; afterwards all replicas hold equal values."""

    def drop(self) -> None:
        """In place of `start` and `publish`, or of `publish` alone: the step's sum is not wanted after all, and only
        what has been begun is brought to an end."""

    def free(self) -> None:
        """Give back what the MPI library holds for this sum."""


def accumulate(own: Plan, slots: list[Vector], index: int) -> None:
    """Merge the top of the stack of slots as often as the plan says after micro-batch `index`."""
    top = own.slots[index]
    for _ in range(own.counts[index]):
        vectors.add(slots[top - 1], slots[top], out=slots[top - 1])
        top -= 1


class OrderedSum:
    """The canonical tree (mpiml.parallel.tree). Each replica owns slices of the vector: it gets the others' partial
    sums of them, adds them up piece by piece while a piece is in cache, and gives the new values back.

    Replicas of a node read each other's partial sums where they lie; messages go between nodes only. The vector is
    exchanged bucket by bucket from its end: a bucket's messages start when all replicas of the node have its
    gradients, which they post, or at the latest in `start`.

    Args:
        comm: the replicas of a stage.
        memory: of this node's replicas.
        nodes: how many replicas each node has, in order.
        microbatches: of a step, over all replicas.
        size, blocks, dtype: of the flat vectors; size in elements.
        bucket: elements of a bucket, or more if there would be too many; 0 for one bucket.
        clock: is told of the time that messages take from a backward pass.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        memory: Memory,
        nodes: Sequence[int],
        microbatches: int,
        size: int,
        blocks: Sequence[Block],
        dtype: DTypeLike,
        bucket: int = 0,
        clock: Clock | None = None,
    ):
        self.memory, self._clock = memory, clock or Clock()
        self.plan = plan(comm.rank, nodes, microbatches)
        everyone = memory.own(self.plan.depth, size, dtype)
        self.slots = everyone[memory.rank]
        self.values = memory.common(size, dtype)
        depth = max(len(self.plan.sources), *(len(m.sources) for m in self.plan.messages), 1)
        scratch = [vectors.empty(PIECE, dtype) for _ in range(min(depth, 2 * microbatches.bit_length()))]
        of_bucket = tags(microbatches)
        highest = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32767  # which every library has
        bucket = bucket_size(bucket, size, comm.size, (highest + 1) // of_bucket)
        self.exchanges = [
            Exchange(comm, nodes, self.plan, everyone, self.values, run, scratch, of_bucket * number)
            for number, run in enumerate(buckets(blocks, bucket if len(nodes) > 1 else 0))
        ]
        self.holders = [
            (owner, *held) for e in self.exchanges for owner, held in enumerate(e.slices) if held[1] > held[0]
        ]
        self.held = [(start, stop) for owner, start, stop in self.holders if owner == comm.rank]
        self.pieces = [piece for e in self.exchanges for piece in e.pieces]
        self._totals = [(e, index) for e in self.exchanges for index in range(len(e.pieces))]
        self._receives, self._sends, self._takes, self._gives = (
            [request for e in self.exchanges for request in getattr(e, name)]
            for name in ("receives", "sends", "takes", "gives")
        )
        self.complete: Callable[[int], None] | None = self._complete if len(self.exchanges) > 1 else None
        self._alone = len(nodes) == 1  # no messages then
        self._begun = False
        self._merged = self._sent = 0  # buckets of this step
        self._before = 0  # buckets of all steps before, as posted

    @property
    def worker(self) -> tuple[int, int]:
        return self.memory.rank, self.memory.ranks

    def accumulate(self, index: int) -> None:
        self._begin()
        if index == len(self.plan.counts) - 1:
            self._complete(0)
        else:
            accumulate(self.plan, self.slots, index)

    def start(self) -> None:
        self._begin()
        self._send(len(self.exchanges))
        wait(self._receives)

    def total(self, index: int, out: Vector) -> Vector:
        exchange, piece = self._totals[index]
        return exchange.total(piece, out)

    def publish(self) -> None:
        MPI.Prequest.Startall(self._takes)
        MPI.Prequest.Startall(self._gives)
        self._finish()

    def drop(self) -> None:
        if self._begun:
            self.start()
            self._finish()

    def free(self) -> None:
        self.drop()
        for requests in (self._sends, self._receives, self._gives, self._takes):
            while requests:
                requests.pop().Free()

    def _begin(self) -> None:
        """Be ready for what others send before they do."""
        if not self._begun:
            self._begun = True
            if self._receives:
                with self._clock.booked("communication"):
                    MPI.Prequest.Startall(self._receives)

    def _complete(self, offset: int) -> None:
        self._begin()
        last = len(self.plan.counts) - 1
        while self._merged < len(self.exchanges) and self.exchanges[self._merged].start >= offset:
            bucket = slice(self.exchanges[self._merged].start, self.exchanges[self._merged].stop)
            accumulate(self.plan, [slot[bucket] for slot in self.slots], last)
            self._merged += 1
        if self._alone:
            return
        self.memory.post(self._before + self._merged)
        with self._clock.booked("communication"):
            self._send(self.memory.posted() - self._before)
            if self._receives:
                MPI.Prequest.Testall(self._receives)  # messages move only while the MPI library is called

    def _send(self, count: int) -> None:
        """Send what there is to send of the first `count` buckets."""
        for exchange in self.exchanges[self._sent : max(count, 0)]:
            exchange.send()
            self._sent += 1

    def _finish(self) -> None:
        """Return when nobody needs this step's slots and messages any more."""
        wait([*self._sends, *self._gives, *self._takes])
        self.memory.barrier()
        self._before += len(self.exchanges)
        self._merged = self._sent = 0
        self._begun = False


class LibrarySum:
    """MPI_Allreduce of the whole vector, in whatever order the MPI library adds: every replica updates everything.

    Faster where the library knows the network better; the bits then depend on the number of replicas. Arguments as
    of OrderedSum.
    """

    complete: Callable[[int], None] | None = None

    def __init__(
        self,
        comm: MPI.Intracomm,
        memory: Memory,
        nodes: Sequence[int],
        microbatches: int,
        size: int,
        blocks: Sequence[Block],
        dtype: DTypeLike,
    ):
        self.comm, self.memory = comm, memory
        self.plan = plan(comm.rank, [1] * comm.size, microbatches)
        self.slots = memory.own(self.plan.depth, size, dtype)[0]
        self.values = memory.common(size, dtype)
        self.pieces = pieces(blocks)
        self.held = [bounds(blocks)] if blocks else []
        self.holders = [(0, start, stop) for start, stop in self.held]

    @property
    def worker(self) -> tuple[int, int]:
        return self.memory.rank, self.memory.ranks

    def accumulate(self, index: int) -> None:
        accumulate(self.plan, self.slots, index)

    def start(self) -> None:
        left = sum(1 - count for count in self.plan.counts)
        for top in range(left - 1, 0, -1):
            vectors.add(self.slots[top - 1], self.slots[top], out=self.slots[top - 1])
        parts = [self.slots[0][start:stop] for start, stop in cut([(0, len(self.slots[0]))])]
        wait([self.comm.Iallreduce(MPI.IN_PLACE, part) for part in parts])

    def total(self, index: int, out: Vector) -> Vector:
        piece = self.pieces[index]
        return self.slots[0][piece.start : piece.stop]

    def publish(self) -> None:
        pass

    def drop(self) -> None:
        pass

    def free(self) -> None:
        pass

"""The gradient sum over micro-batches and replicas: in canonical order, or as the MPI library likes.

Both kinds are used alike. While the backward passes of a step go on, each writes into the vector of its slot and
`accumulate` adds up what can be added. Then `start` exchanges partial sums, `total(i)` gives the summed gradient
of piece i of what this replica updates, and `publish` hands the new values to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mpi4py import MPI
from numpy.typing import DTypeLike

from mpiml import vectors
from mpiml.parallel.memory import Memory
from mpiml.parallel.slices import Block, Piece, bounds, owned, pieces
from mpiml.parallel.tree import Plan, lane, plan
from mpiml.vectors import PIECE, Vector
from mpiml.waiting import wait

VALUES_TAG = 0  # partial sum p has tag 1 + p
Addition = tuple[Vector, Vector, Vector]  # left, right, where their sum goes


class GradientSum(Protocol):
    """What the update and the stage know of a sum.

    Attributes:
        plan: which micro-batches are this replica's, and into which slots they go.
        values: the flat vector of values.
        slots: gradient vectors of this replica.
        pieces: what this replica updates; held: the same as (start, stop).
        worker: (rank, ranks) of those that share `values`.
        holders: (replica, start, stop) of parts that hold the whole vector between them, each element once.
    """

    plan: Plan
    values: Vector
    slots: list[Vector]
    pieces: list[Piece]
    held: tuple[int, int]
    holders: list[tuple[int, int, int]]

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

    def free(self) -> None:
        """Give back what the MPI library holds for this sum."""


def accumulate(own: Plan, slots: list[Vector], index: int) -> None:
    """Merge the top of the stack of slots as often as the plan says after micro-batch `index`."""
    top = own.slots[index]
    for _ in range(own.counts[index]):
        vectors.add(slots[top - 1], slots[top], out=slots[top - 1])
        top -= 1


class OrderedSum:
    """The canonical tree (mpiml.parallel.tree). Each replica owns a slice of the vector: it gets the others'
    partial sums of it, adds them up piece by piece while a piece is in cache, and gives the new values back.

    Replicas of a node read each other's partial sums where they lie; messages go between nodes only.

    Args:
        comm: the replicas of a stage.
        memory: of this node's replicas.
        nodes: how many replicas each node has, in order.
        microbatches: of a step, over all replicas.
        size, blocks, dtype: of the flat vectors; size in elements.
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
    ):
        self.memory = memory
        self.plan = plan(comm.rank, nodes, microbatches)
        everyone = memory.own(self.plan.depth, size, dtype)
        self.slots = everyone[memory.rank]
        self.values = memory.common(size, dtype)
        runs = owned(blocks, comm.size)
        self.holders = [(owner, *bounds(run)) for owner, run in enumerate(runs)]
        self.held = bounds(runs[comm.rank])
        self.pieces = pieces(runs[comm.rank])
        depth = max(len(self.plan.sources), *(len(m.sources) for m in self.plan.messages), 1)
        self._scratch = [vectors.empty(PIECE, dtype) for _ in range(min(depth, 2 * microbatches.bit_length()))]
        self._plan_sends(comm, everyone, dtype)
        self._plan_sum(comm, nodes, everyone, dtype)

    @property
    def worker(self) -> tuple[int, int]:
        return self.memory.rank, self.memory.ranks

    def accumulate(self, index: int) -> None:
        accumulate(self.plan, self.slots, index)

    def start(self) -> None:
        MPI.Prequest.Startall(self._receives)
        for addition in self._packing:
            vectors.add(*addition)
        MPI.Prequest.Startall(self._sends)
        wait(self._receives)

    def total(self, index: int, out: Vector) -> Vector:
        additions, left, right = self._totals[index]
        for addition in additions:
            vectors.add(*addition)
        if right is None:
            return left
        vectors.add(left, right, out)
        return out

    def publish(self) -> None:
        MPI.Prequest.Startall(self._takes)
        MPI.Prequest.Startall(self._gives)
        wait([*self._sends, *self._gives, *self._takes])
        self.memory.barrier()

    def free(self) -> None:
        for request in (*self._sends, *self._receives, *self._gives, *self._takes):
            request.Free()

    def _plan_sends(self, comm: MPI.Intracomm, everyone: list[list[Vector]], dtype: DTypeLike) -> None:
        """For each slice that another node owns: which partial sums of this node go there, and values come back."""
        self._packing: list[Addition] = []
        self._sends: list[MPI.Prequest] = []
        for message in self.plan.messages:
            _, start, stop = self.holders[message.owner]
            parts = [everyone[source.rank][source.partial][start:stop] for source in message.sources]
            partial = parts[0] if len(parts) == 1 else vectors.empty(stop - start, dtype)
            for a in range(0, stop - start, PIECE):
                b = min(a + PIECE, stop - start)
                self._packing += self._additions([part[a:b] for part in parts], message.counts, partial[a:b])
            if stop > start:
                self._sends.append(comm.Send_init(partial, message.owner, 1 + message.partial))
        taken = [(owner, start, stop) for owner, start, stop in self.holders if owner in set(self.plan.owners)]
        self._takes = [comm.Recv_init(self.values[a:b], owner, VALUES_TAG) for owner, a, b in taken if b > a]

    def _plan_sum(
        self, comm: MPI.Intracomm, nodes: Sequence[int], everyone: list[list[Vector]], dtype: DTypeLike
    ) -> None:
        """For this replica's own slice: what comes from other nodes, and how all of it is added up."""
        start, stop = self.held
        self._gives: list[MPI.Prequest] = []
        self._receives: list[MPI.Prequest] = []
        self._totals: list[tuple[list[Addition], Vector, Vector | None]] = []
        if start == stop:
            return
        values = self.values[start:stop]
        self._gives = [comm.Send_init(values, other, VALUES_TAG) for other in self.plan.lanes]
        parts = []
        for source in self.plan.sources:
            if source.node is None:
                parts.append(everyone[source.rank][source.partial][start:stop])
            else:
                parts.append(vectors.empty(stop - start, dtype))
                speaker = lane(comm.rank, source.node, nodes)
                self._receives.append(comm.Recv_init(parts[-1], speaker, 1 + source.partial))
        for piece in self.pieces:
            views = [part[piece.start - start : piece.stop - start] for part in parts]
            additions = self._additions(views, self.plan.root_counts)
            left, right = additions.pop()[:2] if additions else (views[0], None)
            self._totals.append((additions, left, right))

    def _additions(self, parts: Sequence[Vector], counts: Sequence[int], out: Vector | None = None) -> list[Addition]:
        """The additions of a shift-reduce plan over `parts`; sums go to scratch, the last one to `out` if given."""
        stack: list[Vector] = []
        additions: list[Addition] = []
        for part, count in zip(parts, counts, strict=True):
            stack.append(part)
            for _ in range(count):
                right = stack.pop()
                target = self._scratch[len(stack) - 1][: len(right)]
                additions.append((stack[-1], right, target))
                stack[-1] = target
        if additions and out is not None:
            left, right, _ = additions[-1]
            additions[-1] = (left, right, out)
        return additions


class LibrarySum:
    """MPI_Allreduce of the whole vector, in whatever order the MPI library adds: every replica updates everything.

    Faster where the library knows the network better; the bits then depend on the number of replicas. Arguments as
    of OrderedSum.
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
    ):
        self.comm, self.memory = comm, memory
        self.plan = plan(comm.rank, [1] * comm.size, microbatches)
        self.slots = memory.own(self.plan.depth, size, dtype)[0]
        self.values = memory.common(size, dtype)
        self.pieces = pieces(blocks)
        self.held = bounds(blocks)
        self.holders = [(0, *self.held)]

    @property
    def worker(self) -> tuple[int, int]:
        return self.memory.rank, self.memory.ranks

    def accumulate(self, index: int) -> None:
        accumulate(self.plan, self.slots, index)

    def start(self) -> None:
        left = sum(1 - count for count in self.plan.counts)
        for top in range(left - 1, 0, -1):
            vectors.add(self.slots[top - 1], self.slots[top], out=self.slots[top - 1])
        wait([self.comm.Iallreduce(MPI.IN_PLACE, self.slots[0])])

    def total(self, index: int, out: Vector) -> Vector:
        piece = self.pieces[index]
        return self.slots[0][piece.start : piece.stop]

    def publish(self) -> None:
        pass

    def free(self) -> None:
        pass

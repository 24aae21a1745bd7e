"""The gradient sum of one bucket: what a replica sends, receives and adds up for it, all planned beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from mpi4py import MPI

from mpiml import vectors
from mpiml.parallel.slices import Block, bounds, owned, pieces
from mpiml.parallel.tree import Plan, lanes
from mpiml.vectors import PIECE, Vector

Addition = tuple[Vector, Vector, Vector]  # left, right, where their sum goes


def tags(microbatches: int) -> int:
    """How many tags the messages of a bucket have: the first for values, and one for each partial sum that a node may
    be left with: a range of micro-batches has at most two of each size."""
    return 1 + 2 * microbatches.bit_length()


class Exchange:
    """Each replica owns a slice of the bucket: it gets the other nodes' partial sums of it, and gives the values back.

    Tags tell its messages from those of other buckets: an MPI library may start requests in any order.

    Args:
        comm: the replicas of a stage.
        nodes: how many replicas each node has, in order.
        own: the plan of this replica.
        everyone: the slots of this node's replicas, by local rank.
        values: the flat vector of values.
        blocks: of the bucket, one after the other.
        scratch: vectors for one piece, as many as sums that wait for another one.
        tag: of messages with values; partial sum p has tag + 1 + p.

    Attributes:
        start, stop: where in the vector the bucket lies.
        slices: (start, stop) of what each replica owns; pieces: what this one owns, cut to fit a cache.
        receives, sends: messages with partial sums; takes, gives: messages with values.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        nodes: Sequence[int],
        own: Plan,
        everyone: list[list[Vector]],
        values: Vector,
        blocks: Sequence[Block],
        scratch: Sequence[Vector],
        tag: int,
    ):
        runs = owned(blocks, comm.size)
        self.start, self.stop = bounds(blocks)
        self.slices = [bounds(run) for run in runs]
        self.pieces = pieces(runs[comm.rank])
        self._comm, self._plan, self._everyone, self._values, self._scratch = comm, own, everyone, values, scratch
        self._tag = tag
        self.receives: list[MPI.Prequest] = []
        self.sends: list[MPI.Prequest] = []
        self.takes: list[MPI.Prequest] = []
        self.gives: list[MPI.Prequest] = []
        self._packing: list[Addition] = []
        self._totals: list[tuple[list[Addition], Vector, Vector | None]] = []
        self._plan_sends()
        if self.pieces:
            self._plan_sum(nodes)

    def send(self) -> None:
        """Add up this node's partial sums of others' slices, and send them. This node's replicas have written all
        of the bucket by now."""
        for addition in self._packing:
            vectors.add(*addition)
        MPI.Prequest.Startall(self.sends)

    def total(self, index: int, out: Vector) -> Vector:
        """As of GradientSum, when all has been received."""
        additions, left, right = self._totals[index]
        for addition in additions:
            vectors.add(*addition)
        if right is None:
            return left
        vectors.add(left, right, out)
        return out

    def _plan_sends(self) -> None:
        """For each slice that another node owns: which partial sums of this node go there, and values come back."""
        comm = self._comm
        for message in self._plan.messages:
            start, stop = self.slices[message.owner]
            parts = [self._everyone[source.rank][source.partial][start:stop] for source in message.sources]
            partial = parts[0] if len(parts) == 1 else vectors.empty(stop - start, self._values.dtype)
            for a in range(0, stop - start, PIECE):
                b = min(a + PIECE, stop - start)
                self._packing += self._additions([part[a:b] for part in parts], message.counts, partial[a:b])
            if stop > start:
                self.sends.append(comm.Send_init(partial, message.owner, self._tag + 1 + message.partial))
        taken = [(owner, *self.slices[owner]) for owner in sorted(self._plan.owners)]
        self.takes = [comm.Recv_init(self._values[a:b], owner, self._tag) for owner, a, b in taken if b > a]

    def _plan_sum(self, nodes: Sequence[int]) -> None:
        """For this replica's own slice: what comes from other nodes, and how all of it is added up."""
        comm = self._comm
        start, stop = self.slices[comm.rank]
        self.gives = [comm.Send_init(self._values[start:stop], other, self._tag) for other in self._plan.lanes]
        parts, speakers = [], lanes(comm.rank, nodes)
        for source in self._plan.sources:
            if source.node is None:
                parts.append(self._everyone[source.rank][source.partial][start:stop])
            else:
                parts.append(vectors.empty(stop - start, self._values.dtype))
                self.receives.append(comm.Recv_init(parts[-1], speakers[source.node], self._tag + 1 + source.partial))
        for piece in self.pieces:
            views = [part[piece.start - start : piece.stop - start] for part in parts]
            additions = self._additions(views, self._plan.root_counts)
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

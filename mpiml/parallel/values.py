"""The flat vector of a stage's values: which replica holds which part, and how new values reach all replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpi4py import MPI
from numpy.typing import DTypeLike

from mpiml.parallel.memory import Memory
from mpiml.parallel.slices import Piece, Range, bounds, bucket_size, buckets, owned, pieces
from mpiml.parallel.tree import links
from mpiml.team import allgather, wait
from mpiml.vectors import Block, padded

# Of a bucket: the first for values, one for each partial sum that a node may send. A node is left with at most two
# partial sums of each size, and there are fewer than 2^31 micro-batches.
TAGS = 64


@dataclass(frozen=True)
class Bucket:
    """vector[start:stop], which is exchanged at once; each replica owns a slice of it.

    Attributes:
        slices: (start, stop) of each replica's slice, within the whole vector.
        pieces: this replica's slice, cut to fit a cache.
        tag: of messages with values; partial sum p has tag + 1 + p. Tags tell buckets apart, because an MPI library may
            start requests in any order.
    """

    start: int
    stop: int
    slices: list[Range]
    pieces: list[Piece]
    tag: int


class Values:
    """The values of a stage, of which each replica updates its own slices; collective to make.

    Replicas that share memory share one vector; between nodes, new values travel in messages. A Values over
    MPI.COMM_SELF is a copy of which a replica updates everything by itself.

    Blocks cover the first part of the vector, which is updated. The rest is fixed: it has a copy wherever the vector
    has one, and nobody holds, sums or publishes it.

    Args:
        comm: the replicas of the stage, those of a node next to each other.
        memory: of this node's replicas.
        size, blocks, dtype: of the flat vector; size in elements.
        bucket: elements of a bucket, or more if there would be too many buckets; 0 for one bucket.

    Attributes:
        vector: all values of the stage.
        updated: how many of them are updated, the first ones; vectors of gradients have this size.
        matrices: how many parameters have norms of their own.
        nodes: how many replicas each node has, in order.
        buckets: from the end of the vector to its start, as a backward pass writes gradients.
        holders: (replica, start, stop) of parts that make up what is updated, each element once.
        owners: the replicas that hold any.
        held: (start, stop) of the parts that this replica updates; pieces: the same, cut to fit a cache.
        sent: the bytes that this replica has sent to other nodes, of sums too.
    """

    def __init__(
        self, comm: MPI.Intracomm, memory: Memory, size: int, blocks: Sequence[Block], dtype: DTypeLike, bucket: int = 0
    ):
        self.comm, self.memory = comm, memory
        self.vector = memory.common(size, dtype)
        self.updated = padded(blocks[-1].stop, dtype) if blocks else 0  # with the padding after it
        self.matrices = 1 + max((block.matrix for block in blocks if block.matrix is not None), default=-1)
        neighbours = allgather(comm, (memory.rank, memory.ranks))
        self.nodes = [ranks for rank, ranks in neighbours if rank == 0]
        highest = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32767  # which every library has
        longest = bucket_size(bucket, self.updated, comm.size, (highest + 1) // TAGS)
        runs = buckets(blocks, longest)
        self.buckets = [self._bucket(run, TAGS * number) for number, run in enumerate(runs)]
        self.holders = [
            (owner, start, stop)
            for bucket in self.buckets
            for owner, (start, stop) in enumerate(bucket.slices)
            if stop > start
        ]
        self.owners = {owner for owner, _, _ in self.holders}
        self.held = [(start, stop) for owner, start, stop in self.holders if owner == comm.rank]
        self.pieces = [piece for bucket in self.buckets for piece in bucket.pieces]
        self.sent = self._given = 0
        self._takes: list[MPI.Prequest] = []
        self._gives: list[MPI.Prequest] = []
        self._plan_messages()

    def _bucket(self, run: Sequence[Block], tag: int) -> Bucket:
        of_replicas = owned(run, self.comm.size)
        slices = [bounds(blocks) for blocks in of_replicas]
        return Bucket(*bounds(run), slices, pieces(of_replicas[self.comm.rank]), tag)

    def _plan_messages(self) -> None:
        others, owners = links(self.comm.rank, self.nodes)
        for bucket in self.buckets:
            start, stop = bucket.slices[self.comm.rank]
            if stop > start:
                part = self.vector[start:stop]
                self._gives += [self.comm.Send_init(part, other, bucket.tag) for other in others]
                self._given += part.nbytes * len(others)
            for owner in owners:
                start, stop = bucket.slices[owner]
                if stop > start:
                    self._takes.append(self.comm.Recv_init(self.vector[start:stop], owner, bucket.tag))

    def publish(self, others: Sequence[MPI.Request] = ()) -> None:
        """Give the values of this replica's parts to all replicas; collective over them. Afterwards all hold equal
        values, and `others`, further requests, are complete on all ranks of the node."""
        MPI.Prequest.Startall(self._takes)
        MPI.Prequest.Startall(self._gives)
        self.sent += self._given
        wait([*others, *self._gives, *self._takes])
        self.memory.barrier()

    def free(self) -> None:
        """Give back what the MPI library holds for these values."""
        for requests in (self._takes, self._gives):
            while requests:
                requests.pop().Free()

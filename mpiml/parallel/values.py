"""The flat vector of a stage's values: which replica holds which part, and how new values reach all replicas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike

from mpiml.parallel import halving
from mpiml.parallel.memory import Memory
from mpiml.parallel.slices import Piece, Range, bounds, bucket_size, owned, pieces, runs
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
        shares: with halving, (start, stop) of the slices of this replica's lane, in the order of the vector.
        tag: of messages with values; partial sum p has tag + 1 + p. Tags tell buckets apart, because an MPI library may
            start requests in any order.
        array: the name of the array of which it is, if that stands in several layers.
    """

    start: int
    stop: int
    slices: list[Range]
    pieces: list[Piece]
    tag: int
    shares: list[Range]
    array: str | None = None

    def span(self, of: Range) -> Range:
        """(start, stop) of some neighbouring shares."""
        parts = [(start, stop) for start, stop in self.shares[slice(*of)] if stop > start]
        return (parts[0][0], parts[-1][1]) if parts else (0, 0)


class Values:
    """The values of a stage, of which each replica updates its own slices; collective to make.

    Replicas that share memory share one vector; between nodes, new values travel in messages. A Values over
    MPI.COMM_SELF is a copy of which a replica updates everything by itself.

    Blocks cover the first part of the vector, which is updated. The rest is fixed: it has a copy wherever the vector
    has one, and nobody holds, sums or publishes it.

    Vectors of gradients go on behind what is updated: with `further` blocks, of a gradient by an array in the second
    and each further of its places. They are cut and owned as the array's own blocks are.

    Args:
        comm: the replicas of the stage, those of a node next to each other.
        memory: of this node's replicas.
        size, blocks, dtype: of the flat vector; size in elements.
        bucket: elements of a bucket, or more if there would be too many buckets; 0 for one bucket.
        halved: whether nodes exchange by halving (mpiml.parallel.halving), for which they need equally many replicas.
            Those with equal numbers on their nodes are a lane, which has a part of the vector.
        further: the blocks of each further place, one place after another.

    Attributes:
        vector: all values of the stage.
        updated: how many of them are updated, the first ones; summed: the size of vectors of gradients.
        matrices: how many parameters have norms of their own.
        nodes: how many replicas each node has, in order.
        rounds: of this node, with halving; empty without.
        buckets: from the end of the vector to its start, as a backward pass writes gradients; further: those of further
            places likewise.
        holders: (replica, start, stop) of parts that make up what is updated, each element once.
        owners: the replicas that hold any.
        held: (start, stop) of the parts that this replica updates; pieces: the same, cut to fit a cache.
        places: by the number of a piece whose array stands in several layers of this stage: the numbers, in
            `summed_pieces`, of the piece of each further place.
        summed_pieces: `pieces`, and those of further places.
        sent: the bytes that this replica has sent to other nodes, of sums too.
        vectors: what computes with vectors where these lie.
        copies: what is called when all values are new.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        memory: Memory,
        size: int,
        blocks: Sequence[Block],
        dtype: DTypeLike,
        bucket: int = 0,
        halved: bool = False,
        further: Sequence[Sequence[Block]] = (),
    ):
        self.comm, self.memory, self.vectors, self.dtype = comm, memory, memory.vectors, np.dtype(dtype)
        self.vector = memory.common(size, dtype)
        self.updated = padded(blocks[-1].stop, dtype) if blocks else 0  # with the padding after it
        self.summed = padded(further[-1][-1].stop, dtype) if further else self.updated
        self.matrices = 1 + max((block.matrix for block in blocks if block.matrix is not None), default=-1)
        neighbours = allgather(comm, (memory.rank, memory.ranks))
        self.nodes = [ranks for rank, ranks in neighbours if rank == 0]
        self.rounds = halving.rounds(comm.rank // memory.ranks, len(self.nodes)) if halved else []
        highest = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32767  # which every library has
        messages = 2 * memory.ranks if halved else comm.size  # which make up a bucket
        apart = len({block.array for block in blocks}) + len(further)
        longest = bucket_size(bucket, self.updated, messages, max((highest + 1) // TAGS - apart, 2))
        tags = itertools.count(0, TAGS)
        self.buckets, *places = (
            [self._bucket(run, next(tags)) for run in runs(part, longest, comm.size)] for part in (blocks, *further)
        )
        self.holders = [
            (owner, start, stop)
            for bucket in self.buckets
            for owner, (start, stop) in enumerate(bucket.slices)
            if stop > start
        ]
        self.owners = {owner for owner, _, _ in self.holders}
        self.held = [(start, stop) for owner, start, stop in self.holders if owner == comm.rank]
        self.pieces = [piece for bucket in self.buckets for piece in bucket.pieces]
        self.further = [bucket for place in places for bucket in place]
        self.summed_pieces = self.pieces + [piece for bucket in self.further for piece in bucket.pieces]
        self.places: dict[int, list[int]] = {}
        number = len(self.pieces)
        for part in further:
            for index, piece in enumerate(self.pieces):
                if piece.array == part[0].array:
                    self.places.setdefault(index, []).append(number)
                    number += 1
        self.sent = self._given = 0
        self.copies: list[Callable[[], object]] = []
        self._rounds: list[tuple[list[MPI.Prequest], list[MPI.Prequest]]] = []
        if halved:
            self._plan_rounds()
        else:
            self._plan_messages()

    def _bucket(self, run: Sequence[Block], tag: int) -> Bucket:
        of_lane, of_replicas = list[Sequence[Block]](), owned(run, self.comm.size)
        if self.rounds:
            lanes = halving.lanes(run, len(self.nodes), self.memory.ranks)
            of_lane, of_replicas = lanes[self.memory.rank], halving.of_replicas(lanes, len(self.nodes))
        slices, own = (
            [bounds(blocks) for blocks in of_replicas],
            pieces(of_replicas[self.comm.rank], self.vectors.piece),
        )
        return Bucket(*bounds(run), slices, own, tag, [bounds(blocks) for blocks in of_lane], run[0].array)

    def _plan_messages(self) -> None:
        """Each owner gives its slice to its partners on all other nodes."""
        others, owners = links(self.comm.rank, self.nodes)
        gives = [(bucket, bucket.slices[self.comm.rank], other) for bucket in self.buckets for other in others]
        takes = [(bucket, bucket.slices[owner], owner) for bucket in self.buckets for owner in owners]
        self._add_round(takes, gives)

    def _plan_rounds(self) -> None:
        """The rounds of the sum backwards: what a node kept goes to where the sum of it came from, and what it sent
        comes back."""
        for one in reversed(self.rounds):
            source = [] if one.source is None else [self.in_lane(one.source)]
            gives = [(bucket, bucket.span(one.kept), other) for bucket in self.buckets for other in source]
            takes = [(b, b.span(part), self.in_lane(node)) for b in self.buckets for node, part in one.sends]
            self._add_round(takes, gives)

    def _add_round(
        self, takes: Sequence[tuple[Bucket, Range, int]], gives: Sequence[tuple[Bucket, Range, int]]
    ) -> None:
        """Plan messages that are on their way at once: (bucket, range, from or to this replica)."""
        sends, receives = list[MPI.Prequest](), list[MPI.Prequest]()
        for bucket, (start, stop), other in gives:
            if stop > start:
                sends.append(self.comm.Send_init(self.vector[start:stop], other, bucket.tag))
                self._given += self.vector[start:stop].nbytes
        for bucket, (start, stop), other in takes:
            if stop > start:
                receives.append(self.comm.Recv_init(self.vector[start:stop], other, bucket.tag))
        self._rounds.append((receives, sends))

    def in_lane(self, node: int) -> int:
        """The replica of this one's lane on another node."""
        return node * self.memory.ranks + self.memory.rank

    def publish(self, others: Sequence[MPI.Request] = ()) -> None:
        """Give the values of this replica's parts to all replicas; collective over them. Afterwards all hold equal
        values, and `others`, further requests, are complete on all ranks of the node."""
        for takes, _ in self._rounds:
            if takes:
                MPI.Prequest.Startall(takes)
        for takes, gives in self._rounds:
            if gives:
                MPI.Prequest.Startall(gives)
            wait([*others, *gives, *takes])
        self.sent += self._given
        self.memory.barrier()
        self.renewed()

    def renewed(self) -> None:
        """Give new values to those who have copies of them: this rank's device."""
        for take in self.copies:
            take()

    def free(self) -> None:
        """Give back what the MPI library holds for these values."""
        for one in self._rounds:
            for requests in one:
                while requests:
                    requests.pop().Free()

"""The gradient sum over micro-batches and replicas: in canonical order, or in the order of the MPI library.

Both kinds are used alike. Each backward pass of a step writes into a gradient vector, the slot that the plan names,
and `accumulate` adds up what can be added. Then `start` exchanges partial sums, `total(i)` gives the summed gradient
of the i-th piece that this replica updates, and `publish` gives the new values to all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from mpiml import vectors
from mpiml.clock import Clock
from mpiml.parallel.exchange import Exchange, HalvingExchange
from mpiml.parallel.slices import cut
from mpiml.parallel.tree import SumPlan, sum_plan
from mpiml.parallel.values import Values
from mpiml.team import until, wait
from mpiml.vectors import PIECE, Vector


class GradientSum(Protocol):
    """A gradient sum as the update and the stage use it.

    Attributes:
        plan: which micro-batches are this replica's, and into which slots they go.
        values: of the stage, which the summed gradient is to change.
        slots: gradient vectors of this replica, which it adds up.
        gradients: those that backward passes write: the slots, or as many on a device.
        weights: the vector of values that layers compute with: that of `values`, or a copy on a device.
        complete: to be called during the backward pass of this replica's last micro-batch, with the offset from which
            the vector is written to its end; None if nothing can be sent before all of it is.
    """

    plan: SumPlan
    values: Values
    slots: list[Vector]
    gradients: list[Vector]
    weights: Vector
    complete: Callable[[int], None] | None

    def accumulate(self, index: int) -> None:
        """Add up what can be added after the index-th micro-batch of this replica."""

    def start(self) -> None:
        """Exchange partial sums. All replicas of the stage call it once the step record is agreed on, and thus after
        all of them have finished their backward passes."""

    def total(self, index: int, out: Vector) -> Vector:
        """The summed gradient of values.summed_pieces[index]: in `out`, or where it lies if nothing is to be added."""

    def publish(self) -> None:
        """Give the new values of this replica's parts to all; afterwards all replicas hold equal values."""

    def drop(self) -> None:
        """End a step without its sum, in place of `start` and `publish` or of `publish` alone: only finish the messages
        that have begun."""

    def free(self) -> None:
        """Give back what the MPI library holds for this sum; its values stay."""


def merge(plan: SumPlan, slots: Sequence[Vector], index: int, xp: Any = np) -> None:
    """Merge the top of the stack of slots as often as the plan says after the index-th micro-batch. `xp` is the
    namespace of what adds them."""
    top = plan.slots[index]
    for _ in range(plan.counts[index]):
        xp.add(slots[top - 1], slots[top], out=slots[top - 1])
        top -= 1


class OrderedSum:
    """The sum in the order of the canonical tree (mpiml.parallel.tree). For the slices of the vector that it owns, each
    replica gets the partial sums of the others and adds them up piece by piece, while a piece is in cache.

    Replicas of a node read each other's partial sums in shared memory; only nodes exchange messages. They exchange the
    vector bucket by bucket, from its end: the messages of a bucket start when all replicas of the node have posted that
    they have written its gradients, or at the latest in `start`.

    Args:
        values: of the stage.
        microbatches: of a step, over all replicas.
        clock: books the time that a backward pass spends on messages.
        like: a sum of the same kind, in which another copy of the model has its turn: the slots are shared.
        leaf: micro-batches that a leaf of the tree has.
    """

    def __init__(
        self,
        values: Values,
        microbatches: int,
        clock: Clock | None = None,
        like: OrderedSum | None = None,
        leaf: int = 1,
    ):
        self.values, self._memory, self._clock = values, values.memory, clock or Clock()
        self.plan = sum_plan(values.comm.rank, values.nodes, microbatches, leaf)
        dtype = values.dtype
        self.everyone: list[list[Vector]] = (
            like.everyone if like else self._memory.own(self.plan.depth, values.summed, dtype)
        )
        self.slots = self.gradients = self.everyone[self._memory.rank]
        self.weights = values.vector
        depth = max(len(self.plan.contributions), *(len(m.contributions) for m in self.plan.messages), 1)
        scratch = [vectors.empty(PIECE, dtype) for _ in range(min(depth, 2 * microbatches.bit_length()))]
        kind = HalvingExchange if values.rounds else Exchange
        buckets = [*values.buckets, *values.further]
        exchanges = [kind(values, bucket, self.plan, self.everyone, scratch) for bucket in buckets]
        self._totals = [(e, index) for e in exchanges for index in range(len(e.bucket.pieces))]
        self.exchanges = sorted(exchanges, key=lambda exchange: exchange.bucket.start, reverse=True)
        self._receives = [request for e in self.exchanges for request in e.receives]
        self._sends = [request for e in self.exchanges for request in e.sends]
        self._alone = len(values.nodes) == 1  # no messages then
        early = len(self.exchanges) > 1 and not self._alone
        self.complete: Callable[[int], None] | None = self._complete if early else None
        self._begun = False
        self._moving: list[Exchange] = []  # buckets of which more than receiving is left to do
        self._merged = self._sent = 0  # buckets of this step
        self._before = 0  # buckets of all steps before, as posted

    def accumulate(self, index: int) -> None:
        self._begin()
        if index == len(self.plan.counts) - 1:
            self._complete(0)
        else:
            merge(self.plan, self.slots, index, self.values.vectors)

    def written(self) -> None:
        """In the place of all calls of `accumulate`: this replica's partial sums are in its slots."""
        self._begin()
        self._merged = len(self.exchanges)
        self._go_on()

    def start(self) -> None:
        self._begin()
        if self._alone:
            return
        self._send(len(self.exchanges))
        until(self._advance)
        wait(self._receives)

    def total(self, index: int, out: Vector) -> Vector:
        exchange, piece = self._totals[index]
        return exchange.total(piece, out)

    def publish(self) -> None:
        self.values.publish(self._sends)
        self._finish()

    def drop(self) -> None:
        if self._begun:
            self.start()
            wait(self._sends)
            self._memory.barrier()
            self._finish()

    def free(self) -> None:
        self.drop()
        for requests in (self._sends, self._receives):
            while requests:
                requests.pop().Free()

    def _begin(self) -> None:
        """Be ready to receive before others send."""
        if not self._begun:
            self._begun = True
            if self._receives:
                with self._clock.booked("communication"):
                    MPI.Prequest.Startall(self._receives)

    def _complete(self, offset: int) -> None:
        self._begin()
        last = len(self.plan.counts) - 1
        while self._merged < len(self.exchanges) and self.exchanges[self._merged].bucket.start >= offset:
            bucket = self.exchanges[self._merged].bucket
            of_bucket = [slot[bucket.start : bucket.stop] for slot in self.slots]
            merge(self.plan, of_bucket, last, self.values.vectors)
            self._merged += 1
        self._go_on()

    def _go_on(self) -> None:
        """Post which buckets are written, and exchange what can be exchanged."""
        if self._alone:
            return
        self._memory.post(self._before + self._merged)
        with self._clock.booked("communication"):
            self._send(self._memory.posted() - self._before)
            self._advance()
            if self._receives:
                MPI.Prequest.Testall(self._receives)  # messages move only while the MPI library is called

    def _send(self, count: int) -> None:
        """Send those of the first `count` buckets that are not sent yet."""
        for exchange in self.exchanges[self._sent : max(count, 0)]:
            exchange.send()
            self._moving.append(exchange)
            self.values.sent += exchange.bytes
            self._sent += 1

    def _advance(self) -> bool:
        """Do what can be done now for the buckets that are being exchanged, and return whether nothing but receiving is
        left to do."""
        self._moving = [exchange for exchange in self._moving if not exchange.advance()]
        return not self._moving

    def _finish(self) -> None:
        """The step is over: nobody needs its slots and messages any more."""
        self._before += len(self.exchanges)
        self._merged = self._sent = 0
        self._begun = False


class LibrarySum:
    """MPI_Allreduce of the whole vector, in whatever order the MPI library adds: every replica updates everything.

    Faster where the library knows the network better; the bits then depend on the number of replicas.

    Args:
        comm: the replicas of the stage.
        values: this replica's own copy, over MPI.COMM_SELF.
        microbatches: of a step, over all replicas.
        like, leaf: as of OrderedSum.
    """

    complete: Callable[[int], None] | None = None

    def __init__(
        self, comm: MPI.Intracomm, values: Values, microbatches: int, like: LibrarySum | None = None, leaf: int = 1
    ):
        self.comm, self.values = comm, values
        self.plan = sum_plan(comm.rank, [1] * comm.size, microbatches, leaf)
        own = like.slots if like else values.memory.own(self.plan.depth, values.summed, values.dtype)[0]
        self.slots: list[Vector] = own
        self.gradients, self.weights = own, values.vector

    def accumulate(self, index: int) -> None:
        merge(self.plan, self.slots, index)

    def written(self) -> None:
        """As of OrderedSum."""

    def start(self) -> None:
        left = sum(1 - count for count in self.plan.counts)
        for top in range(left - 1, 0, -1):
            np.add(self.slots[top - 1], self.slots[top], out=self.slots[top - 1])
        parts = [self.slots[0][start:stop] for start, stop in cut([(0, len(self.slots[0]))])]
        wait([self.comm.Iallreduce(MPI.IN_PLACE, part) for part in parts])

    def total(self, index: int, out: Vector) -> Vector:
        piece = self.values.summed_pieces[index]
        return self.slots[0][piece.start : piece.stop]

    def publish(self) -> None:
        self.values.renewed()

    def drop(self) -> None:
        pass

    def free(self) -> None:
        pass

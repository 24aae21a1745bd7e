"""The gradient sum of one bucket: what a replica sends, receives and adds up for it, all planned beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from mpiml import vectors
from mpiml.parallel.tree import Message, SumPlan, partners
from mpiml.parallel.values import Bucket, Values
from mpiml.vectors import PIECE, Vector

Addition = tuple[Vector, Vector, Vector]  # left operand, right operand, result


class Exchange:
    """Each replica owns a slice of the bucket, for which it gets the partial sums of the other nodes.

    Args:
        values: of the stage, whose gradient is summed.
        bucket: one of its buckets.
        plan: of this replica.
        everyone: the gradient vectors of this node's replicas, by local rank.
        scratch: vectors for one piece, as many as sums that wait for another one.

    Attributes:
        receives, sends: messages with partial sums; bytes: of what is sent.
    """

    def __init__(
        self, values: Values, bucket: Bucket, plan: SumPlan, everyone: list[list[Vector]], scratch: Sequence[Vector]
    ):
        self.bucket = bucket
        self._comm, self._plan, self._everyone, self._scratch = values.comm, plan, everyone, scratch
        self._dtype = values.dtype
        self.receives: list[MPI.Prequest] = []
        self.sends: list[MPI.Prequest] = []
        self.bytes = 0
        self._packing: list[Addition] = []
        self._totals: list[tuple[list[Addition], Vector, Vector | None]] = []
        self._plan_messages(values)

    def send(self) -> None:
        """Add up and send this node's partial sums of the slices that other nodes own. Called when all of this node's
        replicas have written the bucket."""
        for addition in self._packing:
            np.add(*addition)
        MPI.Prequest.Startall(self.sends)

    def advance(self) -> bool:
        """After `send`: do what can be done now, and return whether nothing but receiving is left to do."""
        return True

    def total(self, index: int, out: Vector) -> Vector:
        """As GradientSum.total, for this bucket's pieces, when all receives are complete."""
        additions, left, right = self._totals[index]
        for addition in additions:
            np.add(*addition)
        if right is None:
            return left
        np.add(left, right, out)
        return out

    def _plan_messages(self, values: Values) -> None:
        self._plan_sends()
        if self.bucket.pieces:
            self._plan_sum(partners(values.comm.rank, values.nodes))

    def _plan_sends(self) -> None:
        """For each slice of another node's replica, of which this replica sends partial sums."""
        for message in self._plan.messages:
            start, stop = self.bucket.slices[message.owner]
            partial = self._packed(message, start, stop)
            if stop > start:
                self.sends.append(self._comm.Send_init(partial, message.owner, self._tag(message.partial)))
                self.bytes += partial.nbytes

    def _packed(self, message: Message, start: int, stop: int) -> Vector:
        """Where vector[start:stop] of a partial sum of this node lies once `send` has added it up."""
        parts = [self._everyone[part.rank][part.partial][start:stop] for part in message.contributions]
        partial = parts[0] if len(parts) == 1 else vectors.empty(stop - start, self._dtype)
        for a in range(0, stop - start, PIECE):
            b = min(a + PIECE, stop - start)
            self._packing += self._additions([part[a:b] for part in parts], message.counts, partial[a:b])
        return partial

    def _plan_sum(self, senders: Sequence[int]) -> None:
        """For this replica's own slice: what it receives, from the sender of each other node, and what it adds up."""
        start, stop = self.bucket.slices[self._comm.rank]
        parts = []
        for one in self._plan.contributions:
            if one.node is None:
                parts.append(self._everyone[one.rank][one.partial][start:stop])
            else:
                parts.append(vectors.empty(stop - start, self._dtype))
                self.receives.append(self._comm.Recv_init(parts[-1], senders[one.node], self._tag(one.partial)))
        for piece in self.bucket.pieces:
            views = [part[piece.start - start : piece.stop - start] for part in parts]
            additions = self._additions(views, self._plan.root_counts)
            left, right = additions.pop()[:2] if additions else (views[0], None)
            self._totals.append((additions, left, right))

    def _tag(self, partial: int) -> int:
        return self.bucket.tag + 1 + partial

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


class HalvingExchange(Exchange):
    """The same by halving (mpiml.parallel.halving): each lane adds up its node's partial sum of a part of the bucket,
    and exchanges halves of it with the same lane of other nodes. A sum takes the place of the operand that came in."""

    def send(self) -> None:
        for addition in self._packing:
            np.add(*addition)
        self._done = 0
        self.advance()

    def advance(self) -> bool:
        while self._done < len(self._steps):
            receives, addition, sends = self._steps[self._done]
            if not MPI.Prequest.Testall(receives):
                return False
            if addition:
                np.add(*addition)
            MPI.Prequest.Startall(sends)
            self._done += 1
        return True

    def _plan_messages(self, values: Values) -> None:
        """For each round: the addition before it, with the messages that this waits for, and what the round sends. The
        last addition is left to `total`."""
        self._steps: list[tuple[list[MPI.Prequest], Addition | None, list[MPI.Prequest]]] = []
        self._done = 0
        begin, end = self.bucket.span((0, len(self.bucket.shares)))
        current = self._packed(self._plan.messages[0], begin, end)
        receives, addition = list[MPI.Prequest](), None
        for one in values.rounds:
            sends = []
            for node, part in one.sends:
                start, stop = self.bucket.span(part)
                if stop > start:
                    sends.append(self._send_init(current[start - begin : stop - begin], values.in_lane(node)))
            self._steps.append((receives, addition, sends))
            receives, addition = [], None
            start, stop = self.bucket.span(one.kept)
            if one.source is not None and stop > start:
                kept, other = current[start - begin : stop - begin], vectors.empty(stop - start, self._dtype)
                receives = [self._comm.Recv_init(other, values.in_lane(one.source), self._tag(0))]
                self.receives += receives
                left, right = (kept, other) if values.in_lane(one.source) > self._comm.rank else (other, kept)
                begin, current, addition = start, other, (left, right, other)
        if addition:
            self._plan_totals(*addition[:2])

    def _send_init(self, part: Vector, replica: int) -> MPI.Prequest:
        self.sends.append(self._comm.Send_init(part, replica, self._tag(0)))
        self.bytes += part.nbytes
        return self.sends[-1]

    def _plan_totals(self, left: Vector, right: Vector) -> None:
        start, _ = self.bucket.slices[self._comm.rank]
        for piece in self.bucket.pieces:
            of = slice(piece.start - start, piece.stop - start)
            self._totals.append(([], left[of], right[of]))

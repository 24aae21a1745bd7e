"""Arrays that stand in several layers, on one stage or on several: their gradient is the sum over all places.

At each place the gradient is summed over micro-batches like any other (mpiml.parallel.gradient_sum). These sums are
added up in layer order, wherever the layers are. Replicas of equal number own equal slices of the array on all stages
that have it: they send each other the sums of their places, so all of them have the total, and update alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from mpi4py import MPI

from mpiml import vectors
from mpiml.clock import Clock
from mpiml.parallel.gradient_sum import GradientSum
from mpiml.parallel.values import Values
from mpiml.team import allgather, wait
from mpiml.vectors import Vector

Part = tuple[str, int]  # of an array: its name, and the number of the part, if it is long
Places = Sequence[Sequence[int]]  # the numbers of a part's pieces at each place


class Ties:
    """Adds up the gradients of such arrays over their places; collective over the stages of a replica.

    Args:
        pipe: the stages of this replica.
        sum_: of this rank's stage.
        clock: of this rank.

    Attributes:
        totals: by the number of a piece, where its gradient over all places lies after `add`.
        received: where the sums of other stages' places lie; bytes: of what this rank sends in a step.
    """

    def __init__(self, pipe: MPI.Intracomm, sum_: GradientSum, clock: Clock | None = None):
        self._pipe, self._sum, self._clock = pipe, sum_, clock or Clock()
        self.totals: dict[int, Vector] = {}
        self.received: list[Vector] = []
        self.bytes = 0
        self._own: list[tuple[int, Vector]] = []  # pieces at all places on this stage, and where their sums are kept
        self._additions: list[tuple[Vector, Vector]] = []
        self._receives: list[MPI.Prequest] = []
        self._sends: list[MPI.Prequest] = []
        parts = dict(_parts(sum_.values))
        own = {part: [self._keep(numbers) for numbers in places] for part, places in parts.items()}
        stages = allgather(pipe, {part: [term.size for term in terms] for part, terms in own.items()})
        tag = 0
        for part in sorted(set[Part]().union(*stages)):
            having = {stage: sizes[part] for stage, sizes in enumerate(stages) if part in sizes}
            assert len({size for sizes in having.values() for size in sizes}) == 1, f"stages have other parts {part}"
            terms = list[Vector]()
            for stage, sizes in having.items():
                for place, size in enumerate(sizes):
                    tag += 1
                    if stage == pipe.rank:
                        terms.append(own[part][place])
                        others = [other for other in having if other != stage]
                        self._sends += [pipe.Send_init(terms[-1], other, tag) for other in others]
                        self.bytes += terms[-1].nbytes * len(others)
                    elif part in own:
                        terms.append(vectors.empty(size, sum_.values.dtype))
                        self.received.append(terms[-1])
                        self._receives.append(pipe.Recv_init(terms[-1], stage, tag))
            if part in own:
                self._plan(parts[part][0], terms)

    def add(self) -> None:
        """Work out the totals of a step, after `start` of the sum."""
        for number, kept in self._own:
            self._sum.total(number, kept)
        self._clock("communication")
        MPI.Prequest.Startall(self._receives + self._sends)
        wait(self._receives + self._sends)
        self._clock("update")
        for total, term in self._additions:
            np.add(total, term, out=total)

    def free(self) -> None:
        """Give back what the MPI library holds for it."""
        for requests in (self._sends, self._receives):
            while requests:
                requests.pop().Free()

    def _keep(self, numbers: Sequence[int]) -> Vector:
        """Where the sum of one place is kept, which nobody but this replica reads; note its pieces."""
        pieces, memory = [self._sum.values.summed_pieces[number] for number in numbers], self._sum.slots[0]
        self._own += [(n, memory[piece.start : piece.stop]) for n, piece in zip(numbers, pieces, strict=True)]
        return memory[pieces[0].start : pieces[-1].stop]

    def _plan(self, numbers: Sequence[int], terms: Sequence[Vector]) -> None:
        """Plan the sum of the terms of a part, and where its pieces find it: where the first term was."""
        total, *others = terms
        self._additions += [(total, other) for other in others]
        pieces = [self._sum.values.pieces[number] for number in numbers]
        for number, piece in zip(numbers, pieces, strict=True):
            self.totals[number] = total[piece.start - pieces[0].start : piece.stop - pieces[0].start]


def _parts(values: Values) -> Iterator[tuple[Part, Places]]:
    """The parts that this replica owns of arrays that stand in several layers: of a bucket each, in order."""
    first, counts = 0, dict[str, int]()
    for bucket in values.buckets:
        numbers = range(first, first + len(bucket.pieces))
        first = numbers.stop
        array = bucket.array
        if array is None:
            continue
        part = array, counts.get(array, 0)
        counts[array] = part[1] + 1
        if numbers:
            further = zip(*(values.places.get(number, []) for number in numbers), strict=True)
            yield part, [numbers, *further]

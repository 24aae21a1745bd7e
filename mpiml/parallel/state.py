"""The vectors of the whole model: how their parts go from the ranks that have them to the ranks that need them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mpi4py import MPI

from mpiml.clock import unwatched
from mpiml.parallel.grid import Grid
from mpiml.parallel.slices import Range, dealt, overlaps, place
from mpiml.parallel.values import Values
from mpiml.team import allgather, wait
from mpiml.vectors import Vector

VALUES = "values"
EMA = "ema"  # the average of the values over the steps
OUTER = "outer"  # the velocity of the outer step (mpiml.parallel.average)
POSTED = 64  # messages that a rank begins, and those with one more pair of ranks, before it waits for them
Key = tuple[int, str]  # a stage, and the name of one of its vectors
Ranges = Mapping[Key, Sequence[Range]]  # sorted
Views = Mapping[Key, Mapping[Range, Vector]]  # the same, with where they lie; sorted


class Part(NamedTuple):
    """What a rank has of a vector of its stage, ranges of it with where they lie.

    Attributes:
        held: those that the rank needs.
        collected: those that are collected from this rank, whole blocks: over all ranks each element once.
    """

    held: Mapping[Range, Vector]
    collected: Mapping[Range, Vector]


def parts(
    values: Values, states: Mapping[str, Vector], share: tuple[int, int] = (0, 1), vector: Vector | None = None
) -> dict[str, Part]:
    """What a rank has of the values of its stage and of its state vectors, which are of the parts of the values that it
    holds, one after another. `share`: which it is of how many ranks that hold the same; each gives a part of it.
    `vector`: of all values, on the host, if they lie elsewhere."""
    vector, updated = values.vector if vector is None else vector, values.updated
    of_rank = dealt(values.held, values.pieces, *share) if values.comm.rank in values.owners else []
    fixed = {(updated, vector.size): vector[updated:]} if updated < vector.size else {}  # which nobody updates

    def views(ranges: Sequence[Range], name: str) -> dict[Range, Vector]:
        if name == VALUES:
            return {(start, stop): vector[start:stop] for start, stop in ranges}
        return {of: states[name][place(values.held, *of)] for of in ranges}

    every = {name: Part(views(values.held, name), views(of_rank, name)) for name in (VALUES, *states)}
    own, once = every[VALUES], fixed if values.comm.rank == share[0] == 0 else {}
    every[VALUES] = Part({**own.held, **(fixed if values.memory.rank == 0 else {})}, {**own.collected, **once})
    return every


class Source(NamedTuple):
    """Parts of vectors on the ranks that have them: over all ranks each element at most once.

    Attributes:
        ranges: of each rank that has some, by rank; the same on all ranks.
        own: this rank's.
    """

    ranges: Mapping[int, Ranges]
    own: Views


def of_rank_0(key: Key, start: int, stop: int, part: Vector | None) -> Source:
    """vector[start:stop], which rank 0 alone has; elsewhere `part` is None."""
    of = start, stop
    return Source({0: {key: [of]}}, {} if part is None else {key: {of: part}})


class _Holding(NamedTuple):
    """What other ranks know of a rank: of each of its vectors the ranges that it needs, and those that are collected
    from it."""

    held: Ranges
    collected: Ranges


class State:
    """Vectors of all stages; collective to make and to use. Both ends of a message go through the same names and ranges
    in the same order.

    Args:
        names: of all vectors, the same on all ranks.
        own: what this rank has of them, by name.
        settle: collective; is called when this rank's parts have their values.
        current: is to be called before this rank's parts are read: they may be copies of what lies on a device.
    """

    def __init__(
        self,
        grid: Grid,
        names: Sequence[str],
        own: Mapping[str, Part],
        settle: Callable[[], object],
        current: Callable[[], object] = unwatched,
    ):
        self.comm, self.clock, self.stage = grid.comm, grid.team.clock, grid.stage
        self.names, self.parts, self.settle, self.current = tuple(names), own, settle, current
        self._held: Views = {(self.stage, name): dict(sorted(part.held.items())) for name, part in own.items()}

    @functools.cached_property
    def _holdings(self) -> list[_Holding]:
        """What all ranks have; collective when it is first needed, which most runs never do: it takes memory on every
        rank for every rank."""
        held = {key: list(views) for key, views in self._held.items()}
        collected = {(self.stage, name): sorted(part.collected) for name, part in self.parts.items()}
        return allgather(self.comm, _Holding(held, collected))

    def copied(self, *names: str) -> Source:
        """Copies of what is collected (default: of all vectors), which another state can take when the memory of this
        one is free again."""
        ranges = {
            rank: {key: of for key, of in holding.collected.items() if key[1] in (names or self.names)}
            for rank, holding in enumerate(self._holdings)
        }
        self.current()
        own = ranges[self.comm.rank].items()
        return Source(ranges, {k: {of: self.parts[k[1]].collected[of].copy() for of in ofs} for k, ofs in own})

    def take(self, sources: Iterable[Source]) -> None:
        """Give every rank what it needs of some sources, one after another; the rest stays as it is."""
        for source in sources:
            self._receive(source)
        self.settle()

    def _receive(self, source: Source) -> None:
        """Each rank sends to those after it, the nearest first, and receives from those before it. It begins all
        messages of one distance before it waits: so of the ranks that wait, those at the least distance wait only for
        messages that both ends have begun, and no rank waits for ever."""
        rank, size, requests, holdings = self.comm.rank, self.comm.size, list[MPI.Request](), self._holdings
        givers = {(rank - giver) % size for giver in source.ranges}
        for distance in sorted(givers.union(range(size) if source.own else ())):
            giver, taker = (rank - distance) % size, (rank + distance) % size
            incoming = list(_parts(self._held, source.ranges.get(giver, {})))
            outgoing = list(_parts(source.own, holdings[taker].held))
            if not distance:
                for target, part in zip(incoming, outgoing, strict=True):
                    target[...] = part
                continue
            requests += [self.comm.Irecv(part, giver) for part in incoming]
            requests += [self.comm.Isend(part, taker) for part in outgoing]
            if len(requests) >= POSTED:
                self._wait(requests)
        self._wait(requests)

    def _wait(self, requests: list[MPI.Request]) -> None:
        with self.clock.doing("joining"):
            wait(requests)
        requests.clear()


def _parts(own: Views, others: Ranges) -> Iterator[Vector]:
    """The parts of a rank's vectors that lie in others' ranges, in the same order at both ends of a message."""
    for key in sorted(own.keys() & others.keys()):
        for of, part in overlaps(list(own[key]), others[key]):
            yield own[key][of][part]

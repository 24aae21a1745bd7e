"""The vectors of the whole model: collected on rank 0 from the ranks that hold their parts, and distributed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike

from mpiml.parallel.grid import Grid
from mpiml.parallel.slices import Range, cut, place
from mpiml.parallel.values import Values
from mpiml.team import allgather, wait
from mpiml.vectors import Vector

VALUES = "values"
EMA = "ema"  # the average of the values over the steps
OUTER = "outer"  # the velocity of the outer step (mpiml.parallel.average)


class Part(NamedTuple):
    """What a rank has of a vector of its stage.

    Attributes:
        size: of the whole vector.
        held: the ranges that the rank needs, each one message, with where they lie.
        collected: those of them that are collected from this rank: over all ranks each element once.
    """

    size: int
    held: Mapping[Range, Vector]
    collected: Sequence[Range]


def parts(values: Values, states: Mapping[str, Vector], replica: int, collected: bool = True) -> dict[str, Part]:
    """What a rank has of the values of its stage and of its state vectors, which are of the parts of the values that it
    holds, one after another. Nothing is collected unless it is `collected` from this copy of the model."""
    held, size, updated = cut(values.held), values.vector.size, values.updated
    fixed = cut([(updated, size)]) if values.memory.rank == 0 else []  # which nobody updates
    once = collected and replica in {holder for holder, _, _ in values.holders}
    views = {(start, stop): values.vector[start:stop] for start, stop in [*held, *fixed]}
    first = fixed if collected and replica == 0 else []
    of_values = Part(size, views, [*(held if once else []), *first])
    of_states = {
        name: Part(updated, {of: state[place(values.held, *of)] for of in held}, held if once else [])
        for name, state in states.items()
    }
    return {VALUES: of_values} | of_states


class _Holding(NamedTuple):
    """What other ranks know of a rank: its stage, and of each vector the whole size, and the ranges that the rank needs
    and those that are collected from it."""

    stage: int
    vectors: dict[str, tuple[int, list[Range], list[Range]]]


class State:
    """Vectors of all stages; collective to make and to use. Both ends of a message go through the same names and ranges
    in the same order.

    Args:
        names: of all vectors, the same on all ranks.
        own: what this rank has of them, by name.
        settle: collective; is called when this rank's parts have been distributed.
    """

    def __init__(
        self, grid: Grid, names: Sequence[str], own: Mapping[str, Part], dtype: DTypeLike, settle: Callable[[], object]
    ):
        self.comm, self.clock, self.stages = grid.comm, grid.team.clock, grid.stages
        self.names, self.parts, self.dtype, self.settle = tuple(names), own, np.dtype(dtype), settle
        known = {name: (part.size, list(part.held), list(part.collected)) for name, part in own.items()}
        self.holdings: list[_Holding] = allgather(self.comm, _Holding(grid.stage, known))

    def collect(self, *names: str) -> list[dict[str, Vector]]:
        """Each stage's vectors of these names (default: all), on rank 0; empty dictionaries elsewhere."""
        whole: list[dict[str, Vector]] = [{} for _ in range(self.stages)]
        requests: list[MPI.Request] = []
        for name in names or self.names:
            if self.comm.rank:
                own = self.parts.get(name)
                requests += [self.comm.Isend(own.held[of], 0) for of in own.collected] if own else []
                continue
            for rank, holding in enumerate(self.holdings):
                size, _, collected = holding.vectors.get(name, (0, [], []))
                if name in holding.vectors and name not in whole[holding.stage]:
                    whole[holding.stage][name] = np.zeros(size, self.dtype)
                for start, stop in collected:
                    target = whole[holding.stage][name][start:stop]
                    if rank:
                        requests.append(self.comm.Irecv(target, rank))
                    else:
                        target[...] = self.parts[name].held[start, stop]
        with self.clock.doing("joining"):
            wait(requests)
        return whole

    def distribute(self, whole: Sequence[Mapping[str, Any]], *names: str) -> None:
        """The reverse: rank 0 gives every rank its parts of these vectors (default: all) of `whole`."""
        requests: list[MPI.Request] = []
        for name in names or self.names:
            if self.comm.rank:
                own = self.parts.get(name)
                requests += [self.comm.Irecv(part, 0) for part in own.held.values()] if own else []
                continue
            for rank, holding in enumerate(self.holdings):
                for start, stop in holding.vectors.get(name, (0, [], []))[1]:
                    source = whole[holding.stage][name][start:stop]
                    if rank:
                        requests.append(self.comm.Isend(source, rank))
                    else:
                        self.parts[name].held[start, stop][...] = source
        with self.clock.doing("joining"):
            wait(requests)
            self.settle()

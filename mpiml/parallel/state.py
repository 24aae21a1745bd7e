"""The vectors of the whole model: collected on rank 0 from the ranks that hold their parts, and distributed again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.parallel.grid import Grid
from mpiml.parallel.slices import Range, cut, place
from mpiml.parallel.values import Values
from mpiml.team import allgather, wait
from mpiml.vectors import Vector

VALUES = "values"
EMA = "ema"  # the average of the values over the steps


@dataclass(frozen=True)
class _Holding:
    """The parts of its stage's vectors that a rank holds, in ranges that each fit into a message.

    Attributes:
        size: of the stage's values; updated: of the state vectors.
        held: what the rank updates.
        fixed: of the values that nobody updates, where the rank is the first of those that share them.
        collected, first: whether `held` and `fixed` are collected from this rank, as they are once for each stage.
    """

    stage: int
    size: int
    updated: int
    held: list[Range]
    fixed: list[Range]
    collected: bool
    first: bool

    def zeros(self, name: str, dtype: np.dtype[Any]) -> Vector:
        """A vector of the whole stage."""
        return np.zeros(self.size if name == VALUES else self.updated, dtype)

    def given(self, name: str) -> list[Range]:
        """The parts of a vector that the rank needs."""
        return [*self.held, *(self.fixed if name == VALUES else [])]

    def taken(self, name: str) -> list[Range]:
        """The parts of a vector that are collected from the rank."""
        held, fixed = self.held if self.collected else [], self.fixed if self.first and name == VALUES else []
        return [*held, *fixed]


class State:
    """Values and optimizer state of all stages; collective to make and to use.

    Args:
        values: of this rank's stage.
        states: the state vectors of this rank, the average too, by name, for the parts that it holds of the values.

    Attributes:
        names: of all vectors.
    """

    def __init__(self, grid: Grid, values: Values, states: Mapping[str, Vector]):
        self.comm, self.clock, self.stages, self.values = grid.comm, grid.team.clock, grid.stages, values
        self.states, self.names, self.dtype = states, (VALUES, *states), values.vector.dtype
        size, updated = values.vector.size, values.updated
        fixed = cut([(updated, size)]) if values.memory.rank == 0 else []
        collected = grid.replica in {holder for holder, _, _ in values.holders}
        holding = _Holding(grid.stage, size, updated, cut(values.held), fixed, collected, grid.replica == 0)
        self.holdings: list[_Holding] = allgather(self.comm, holding)

    def parts(self, name: str, ranges: Sequence[Range]) -> list[Vector]:
        """Parts of a vector that this rank has, each one message."""
        if name == VALUES:
            return [self.values.vector[start:stop] for start, stop in ranges]
        return [self.states[name][place(self.values.held, *of)] for of in ranges]

    def collect(self, *names: str) -> list[dict[str, Vector]]:
        """Each stage's vectors of these names (default: all), on rank 0; empty dictionaries elsewhere."""
        wanted = names or self.names
        whole: list[dict[str, Vector]] = [{} for _ in range(self.stages)]
        requests = []
        if self.comm.rank == 0:
            for rank, holding in enumerate(self.holdings):
                for tag, name in enumerate(wanted):
                    if name not in whole[holding.stage]:
                        whole[holding.stage][name] = holding.zeros(name, self.dtype)
                    ranges = holding.taken(name)
                    targets = [whole[holding.stage][name][start:stop] for start, stop in ranges]
                    if rank == 0:
                        for target, part in zip(targets, self.parts(name, ranges), strict=True):
                            target[...] = part
                    else:
                        requests += [self.comm.Irecv(target, rank, tag) for target in targets]
        else:
            own = self.holdings[self.comm.rank]
            for tag, name in enumerate(wanted):
                requests += [self.comm.Isend(part, 0, tag) for part in self.parts(name, own.taken(name))]
        with self.clock.doing("joining"):
            wait(requests)
        return whole

    def distribute(self, whole: Sequence[Mapping[str, Vector]], *names: str) -> None:
        """The reverse: rank 0 gives every rank its parts of these vectors (default: all) of `whole`."""
        wanted = names or self.names
        requests: list[MPI.Request] = []
        own = self.holdings[self.comm.rank]
        for tag, name in enumerate(wanted):
            if self.comm.rank:
                requests += [self.comm.Irecv(part, 0, tag) for part in self.parts(name, own.given(name))]
                continue
            for rank, holding in enumerate(self.holdings):
                sources = [whole[holding.stage][name][start:stop] for start, stop in holding.given(name)]
                if rank == 0:
                    for source, part in zip(sources, self.parts(name, own.given(name)), strict=True):
                        part[...] = source
                else:
                    requests += [self.comm.Isend(source, rank, tag) for source in sources]
        with self.clock.doing("joining"):
            wait(requests)
            self.values.publish()

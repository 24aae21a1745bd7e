"""The vectors of the whole model: collected on rank 0 from the ranks that hold their parts, and distributed again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpiml.parallel.grid import Grid
from mpiml.parallel.slices import Range, cut, place
from mpiml.parallel.values import Values
from mpiml.team import allgather, wait
from mpiml.vectors import Vector

VALUES = "values"
AVERAGE = "ema"  # of the values over the steps


@dataclass(frozen=True)
class _Holding:
    """The parts of its stage's vectors that a rank holds.

    Attributes:
        size: of such a vector.
        ranges: (start, stop) of parts that each fit into a message.
        collected: whether they are collected from this rank: where all replicas hold everything, only from the first.
    """

    stage: int
    size: int
    ranges: list[Range]
    collected: bool

    def parts(self, vector: Vector) -> list[Vector]:
        """The parts of the stage's vector that the rank holds."""
        return [vector[start:stop] for start, stop in self.ranges]


class State:
    """Values and optimizer state of all stages; collective to make and to use.

    Args:
        values: of this rank's stage.
        states: the optimizer's state vectors of this rank by name, for the parts that it holds of the values.

    Attributes:
        names: of all vectors.
        parts: this rank's parts of all vectors, by name, each one message.
    """

    def __init__(self, grid: Grid, values: Values, states: Mapping[str, Vector]):
        self.comm, self.clock, self.stages, self.values = grid.comm, grid.team.clock, grid.stages, values
        self.dtype = values.vector.dtype
        collected = grid.replica in {holder for holder, _, _ in values.holders}
        holding = _Holding(grid.stage, values.vector.size, cut(values.held), collected)
        self.parts = {VALUES: holding.parts(values.vector)}
        self.parts |= {
            name: [state[place(values.held, *of)] for of in holding.ranges] for name, state in states.items()
        }
        self.names = tuple(self.parts)
        self.holdings: list[_Holding] = allgather(self.comm, holding)

    def collect(self, *names: str) -> list[dict[str, Vector]]:
        """Each stage's vectors of these names (default: all), on rank 0; empty dictionaries elsewhere."""
        wanted = names or self.names
        whole: list[dict[str, Vector]] = [{} for _ in range(self.stages)]
        requests = []
        if self.comm.rank == 0:
            for rank, holding in enumerate(self.holdings):
                for tag, name in enumerate(wanted):
                    if name not in whole[holding.stage]:
                        whole[holding.stage][name] = np.zeros(holding.size, self.dtype)
                    targets = holding.parts(whole[holding.stage][name])
                    if rank == 0:
                        for target, part in zip(targets, self.parts[name], strict=True):
                            target[...] = part
                    elif holding.collected:
                        requests += [self.comm.Irecv(target, rank, tag) for target in targets]
        elif self.holdings[self.comm.rank].collected:
            requests = [self.comm.Isend(part, 0, tag) for tag, name in enumerate(wanted) for part in self.parts[name]]
        with self.clock.doing("joining"):
            wait(requests)
        return whole

    def distribute(self, whole: Sequence[Mapping[str, Vector]], *names: str) -> None:
        """The reverse: rank 0 gives every rank its parts of these vectors (default: all) of `whole`."""
        wanted = names or self.names
        requests: list[MPI.Request] = []
        for tag, name in enumerate(wanted):
            if self.comm.rank:
                requests += [self.comm.Irecv(part, 0, tag) for part in self.parts[name]]
                continue
            for rank, holding in enumerate(self.holdings):
                sources = holding.parts(whole[holding.stage][name])
                if rank == 0:
                    for source, part in zip(sources, self.parts[name], strict=True):
                        part[...] = source
                else:
                    requests += [self.comm.Isend(source, rank, tag) for source in sources]
        with self.clock.doing("joining"):
            wait(requests)
            self.values.publish()

"""The vectors of the whole model, gathered on rank 0 from those who hold their parts, and handed back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.parallel.grid import Grid
from mpiml.parallel.slices import Range, cut, place
from mpiml.team import allgather, wait
from mpiml.vectors import Vector

VALUES = "values"


@dataclass(frozen=True)
class _Holding:
    """What a rank holds of its stage's vectors, in parts that fit into a message; `counts` if it is to be gathered from
    this rank."""

    stage: int
    size: int
    ranges: list[Range]
    counts: bool

    def parts(self, vector: Vector) -> list[Vector]:
        """The parts of the stage's vector that the rank holds."""
        return [vector[start:stop] for start, stop in self.ranges]


class Holder(Protocol):
    """What is asked of whoever holds a stage's values: `values`, `held`, `holders` and `publish` of a gradient sum."""

    values: Vector
    held: list[Range]
    holders: list[tuple[int, int, int]]

    def publish(self) -> None: ...


class State:
    """Values and optimizer state of all stages; collective to make and to use.

    Args:
        states: the optimizer's state vectors of this rank, over the parts that its gradient sum holds.
        clock: of this rank: whoever waits for the others is joining them.

    Attributes:
        mine: this rank's parts of all vectors, by name, each one message.
    """

    def __init__(self, grid: Grid, sum_: Holder, states: Mapping[str, Vector], clock: Clock):
        self.clock = clock
        self.comm, self.stages, self.sum = grid.comm, grid.stages, sum_
        self.dtype = sum_.values.dtype
        counts = grid.replica in {holder for holder, _, _ in sum_.holders}
        holding = _Holding(grid.stage, sum_.values.size, cut(sum_.held), counts)
        self.mine = {VALUES: holding.parts(sum_.values)}
        self.mine |= {name: [state[place(sum_.held, *of)] for of in holding.ranges] for name, state in states.items()}
        self.holdings: list[_Holding] = allgather(self.comm, holding)

    def collect(self, *names: str) -> list[dict[str, Vector]]:
        """Each stage's vectors of these names (default: all), on rank 0; empty dictionaries elsewhere."""
        wanted = names or tuple(self.mine)
        whole: list[dict[str, Vector]] = [{} for _ in range(self.stages)]
        requests = []
        if self.comm.rank == 0:
            for rank, holding in enumerate(self.holdings):
                for tag, name in enumerate(wanted):
                    if name not in whole[holding.stage]:
                        whole[holding.stage][name] = np.zeros(holding.size, self.dtype)
                    parts = holding.parts(whole[holding.stage][name])
                    if rank == 0:
                        for part, mine in zip(parts, self.mine[name], strict=True):
                            part[...] = mine
                    elif holding.counts:
                        requests += [self.comm.Irecv(part, rank, tag) for part in parts]
        elif self.holdings[self.comm.rank].counts:
            requests = [self.comm.Isend(mine, 0, tag) for tag, name in enumerate(wanted) for mine in self.mine[name]]
        with self.clock.doing("joining"):
            wait(requests)
        return whole

    def distribute(self, whole: Sequence[Mapping[str, Vector]], *names: str) -> None:
        """The reverse: rank 0 gives every rank its part of these vectors (default: all) of `whole`."""
        wanted = names or tuple(self.mine)
        requests: list[MPI.Request] = []
        for tag, name in enumerate(wanted):
            if self.comm.rank:
                requests += [self.comm.Irecv(mine, 0, tag) for mine in self.mine[name]]
                continue
            for rank, holding in enumerate(self.holdings):
                parts = holding.parts(whole[holding.stage][name])
                if rank == 0:
                    for part, mine in zip(parts, self.mine[name], strict=True):
                        mine[...] = part
                else:
                    requests += [self.comm.Isend(part, rank, tag) for part in parts]
        with self.clock.doing("joining"):
            wait(requests)
            self.sum.publish()

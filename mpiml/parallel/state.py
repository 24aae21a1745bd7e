"""The vectors of the whole model, gathered on rank 0 from those who hold their parts, and handed back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpiml.parallel.allreduce import GradientSum
from mpiml.parallel.grid import Grid
from mpiml.vectors import Vector
from mpiml.waiting import wait

VALUES = "values"


@dataclass(frozen=True)
class _Holding:
    """What a rank holds of its stage's vectors; `counts` if it is to be gathered from this rank."""

    stage: int
    size: int
    start: int
    stop: int
    counts: bool


class State:
    """Values and optimizer state of all stages; collective to make and to use.

    Args:
        states: the optimizer's state vectors of this rank, over the part that its gradient sum holds.
    """

    def __init__(self, grid: Grid, sum_: GradientSum, states: Mapping[str, Vector]):
        self.comm, self.stages, self.sum = grid.comm, grid.stages, sum_
        start, stop = sum_.held
        self.dtype = sum_.values.dtype
        self.mine = {VALUES: sum_.values[start:stop], **states}
        counts = grid.replica in {holder for holder, _, _ in sum_.holders}
        self.holdings: list[_Holding] = self.comm.allgather(_Holding(grid.stage, sum_.values.size, start, stop, counts))

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
                    part = whole[holding.stage][name][holding.start : holding.stop]
                    if rank == 0:
                        part[...] = self.mine[name]
                    elif holding.counts:
                        requests.append(self.comm.Irecv(part, rank, tag))
        elif self.holdings[self.comm.rank].counts:
            requests = [self.comm.Isend(self.mine[name], 0, tag) for tag, name in enumerate(wanted)]
        wait(requests)
        return whole

    def distribute(self, whole: Sequence[Mapping[str, Vector]], *names: str) -> None:
        """The reverse: rank 0 gives every rank its part of these vectors (default: all) of `whole`."""
        wanted = names or tuple(self.mine)
        requests: list[MPI.Request] = []
        for tag, name in enumerate(wanted):
            if self.comm.rank:
                requests.append(self.comm.Irecv(self.mine[name], 0, tag))
                continue
            for rank, holding in enumerate(self.holdings):
                part = whole[holding.stage][name][holding.start : holding.stop]
                if rank == 0:
                    self.mine[name][...] = part
                else:
                    requests.append(self.comm.Isend(part, rank, tag))
        wait(requests)
        self.sum.publish()

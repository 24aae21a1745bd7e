"""Offsets between the clocks of ranks, to convert times of one rank to those of another."""

import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from mpiml.team import broadcast, quiet_barrier


def clock_offset(comm: MPI.Intracomm, rank: int, now: Callable[[], float] = time.time, tries: int = 20) -> float:
    """The seconds by which a rank's clock is ahead of rank 0's, from the fastest of `tries` exchanges; collective.

    Cristian, "Probabilistic clock synchronization", Distributed Computing 3, 1989.
    """
    quiet_barrier(comm)
    exchanges: list[tuple[float, float]] = []  # seconds that each took, and the offset
    clock = np.zeros(1)
    for _ in range(tries if rank else 0):
        if comm.rank == 0:
            begin = now()
            comm.Send(clock, rank)
            comm.Recv(clock, rank)
            end = now()
            exchanges.append((end - begin, float(clock[0]) - (begin + end) / 2))
        elif comm.rank == rank:
            comm.Recv(clock, 0)
            clock[0] = now()
            comm.Send(clock, 0)
    quiet_barrier(comm)
    return broadcast(comm, min(exchanges)[1] if exchanges else 0.0)


class Ruler:
    """Converts times of this rank's clock to rank 0's, from their offsets at two moments.

    The ranks of a node share a clock, so exchanges are between nodes only. Making a ruler is collective.

    Args:
        node: the ranks of this node.
        leaders: the first ranks of all nodes; None on other ranks, and if there is only one node.
        now: the clock.
    """

    def __init__(self, node: MPI.Intracomm, leaders: MPI.Intracomm | None, now: Callable[[], float]):
        self.node, self.leaders, self.now = node, leaders, now
        self._marks = [self._mark()]

    def finish(self) -> None:
        """Measure a second time, because clocks do not run at quite the same rate. Collective."""
        self._marks.append(self._mark())

    def times(self, times: list[float]) -> list[float]:
        """Times of this rank's clock, as rank 0's clock showed them."""
        (first, ahead), (last, later) = self._marks[0], self._marks[-1]
        drift = (later - ahead) / max(last - first, 1e-9)
        return [t - ahead - drift * (t - first) for t in times]

    def _mark(self) -> tuple[float, float]:
        mark = self.now(), 0.0
        if self.leaders is not None:
            offsets = [(clock_offset(self.leaders, rank, self.now), self.now()) for rank in range(self.leaders.size)]
            ahead, at = offsets[self.leaders.rank]
            mark = at, ahead
        return broadcast(self.node, mark)

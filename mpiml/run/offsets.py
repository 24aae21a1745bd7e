"""How far ranks' clocks are apart, so that times of one can be told in those of another."""

import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from mpiml.team import broadcast, meet


def clock_offset(comm: MPI.Intracomm, rank: int, now: Callable[[], float] = time.time, tries: int = 20) -> float:
    """Seconds that a rank's clock is ahead of rank 0's, by the quickest of some exchanges; collective, known to all.

    Cristian, "Probabilistic clock synchronization", Distributed Computing 3, 1989.
    """
    meet(comm)
    found: list[tuple[float, float]] = []
    clock = np.zeros(1)
    for _ in range(tries if rank else 0):
        if comm.rank == 0:
            begin = now()
            comm.Send(clock, rank)
            comm.Recv(clock, rank)
            end = now()
            found.append((end - begin, float(clock[0]) - (begin + end) / 2))
        elif comm.rank == rank:
            comm.Recv(clock, 0)
            clock[0] = now()
            comm.Send(clock, 0)
    meet(comm)
    return broadcast(comm, min(found)[1] if found else 0.0)


class Ruler:
    """Tells times of this rank's clock in those of rank 0's, by how far they were apart at two moments.

    The ranks of a node have one clock, so that exchanges are between nodes only.

    Args:
        node: the ranks of this node.
        leaders: the first ranks of all nodes; None on other ranks, and if there is one node only.
        now: the clock.
    """

    def __init__(self, node: MPI.Intracomm, leaders: MPI.Intracomm | None, now: Callable[[], float]):
        self.node, self.leaders, self.now = node, leaders, now
        self._marks = [self._mark()]

    def finish(self) -> None:
        """The second moment: clocks do not run at quite the same rate. Collective, as making a ruler is."""
        self._marks.append(self._mark())

    def times(self, times: list[float]) -> list[float]:
        """Times of this rank as rank 0 would tell them."""
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

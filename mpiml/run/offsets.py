"""Offsets between the clocks of ranks, to convert times of one rank to those of another."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from mpi4py import MPI

from mpiml.team import broadcast, quiet_barrier


def clock_offset(
    comm: MPI.Intracomm, ranks: Sequence[int], now: Callable[[], float] = time.time, tries: int = 20
) -> tuple[float, float]:
    """The seconds by which this rank's clock is ahead of that of ranks[0], and when its clock showed so; (0, now) on a
    rank that is not one of `ranks`. Collective.

    The ranks form a binomial tree, in which pairs measure at once: N ranks take log2 N times as long as two. Each
    offset is that of the fastest of `tries` exchanges: Cristian, "Probabilistic clock synchronization", Distributed
    Computing 3, 1989.
    """
    ahead, at = 0.0, now()
    place = ranks.index(comm.rank) if comm.rank in ranks else None
    for round_ in reversed(range((len(ranks) - 1).bit_length())):
        step = 1 << round_
        quiet_barrier(comm)
        if place is None or place % step:
            continue
        if place // step % 2:
            ahead, at = _answer(comm, ranks[place - step], now, tries), now()
        elif place + step < len(ranks):
            _ask(comm, ranks[place + step], ahead, now, tries)
    quiet_barrier(comm)
    return ahead, at


def _ask(comm: MPI.Intracomm, rank: int, ahead: float, now: Callable[[], float], tries: int) -> None:
    """Tell a rank by how much it is ahead, if this rank is `ahead` itself."""
    exchanges: list[tuple[float, float]] = []  # seconds that each took, and the offset
    clock = np.zeros(1)
    for _ in range(tries):
        begin = now()
        comm.Send(clock, rank)
        comm.Recv(clock, rank)
        end = now()
        exchanges.append((end - begin, float(clock[0]) - (begin + end) / 2))
    comm.Send(np.array([ahead + min(exchanges)[1]]), rank)


def _answer(comm: MPI.Intracomm, rank: int, now: Callable[[], float], tries: int) -> float:
    clock = np.zeros(1)
    for _ in range(tries):
        comm.Recv(clock, rank)
        clock[0] = now()
        comm.Send(clock, rank)
    comm.Recv(clock, rank)
    return float(clock[0])


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
        (ahead, first), (later, last) = self._marks[0], self._marks[-1]
        drift = (later - ahead) / max(last - first, 1e-9)
        return [t - ahead - drift * (t - first) for t in times]

    def _mark(self) -> tuple[float, float]:
        mark = 0.0, self.now()
        if self.leaders is not None:
            mark = clock_offset(self.leaders, range(self.leaders.size), self.now)
        return broadcast(self.node, mark)

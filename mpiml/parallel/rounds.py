"""Leaving a series of chunks together: all ranks before the same one, and none waits for a message that never comes."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.clock import Clock
from mpiml.team import wait

PAUSE = 0.2  # seconds between votes, about


class Rounds:
    """Lets ranks vote now and then, as they go through their chunks, on whether to leave off.

    The votes that are cast before a chunk are counted `lag` chunks later, so that a stage of a pipeline may be so far
    ahead of another. When the next are cast follows from what was counted: from the time that a chunk takes on the
    slowest rank. So all ranks vote, count and leave off before the same chunks.

    Collective: every rank calls `go_on` equally often, or until it says no, and then `finish`.

    Args:
        lag: at least the number of stages.
        stop: whether this rank wants to leave off.
    """

    def __init__(self, comm: MPI.Intracomm, clock: Clock, lag: int, stop: Callable[[], bool]):
        self.comm, self.clock, self.lag, self.stop = comm, clock, lag, stop
        self._began, self._chunk, self._next = perf_counter(), 0, 0  # the next chunk, and the one before which to vote
        self._votes: NDArray[np.float64] = np.zeros(2)  # to leave off, and the mean seconds of a chunk
        self._cast: MPI.Request | None = None
        self._going = True

    def go_on(self) -> bool:
        """Whether to go on with the next chunk."""
        if self._cast and self._chunk == self._next + self.lag:
            self._count()
            slowest = float(self._votes[1])
            self._next = self._chunk + (int(PAUSE / slowest) if slowest else 0)
        if self._going and self._chunk == self._next:
            seconds = (perf_counter() - self._began) / self._chunk if self._chunk else 0.0
            self._votes[:] = self.stop(), seconds
            self._cast = self.comm.Iallreduce(MPI.IN_PLACE, self._votes, MPI.MAX)
        self._chunk += 1
        return self._going

    def _count(self) -> None:
        if self._cast:
            self.clock("communication")
            wait([self._cast])
            self._cast, self._going = None, not self._votes[0]

    def finish(self) -> bool:
        """Whether all chunks are done. Votes that are not counted yet come too late."""
        going = self._going
        self._count()
        return going

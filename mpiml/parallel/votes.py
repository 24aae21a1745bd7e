"""How ranks leave a series of chunks together: all before the same chunk, so that none waits for another's message."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.team import Team, wait

PAUSE = 0.2  # seconds between rounds of votes, roughly


class Votes:
    """Rounds of votes on whether to stop, held now and then while ranks go through their chunks.

    Votes cast before a chunk are counted `lag` chunks later, because one stage of a pipeline may be that far ahead of
    another. With its vote each rank says how long a chunk takes it; from the slowest follows when the next round is.
    So all ranks vote, count and stop before the same chunks.

    Collective: every rank calls `go_on` before each of its chunks until it returns False, and then `finish`.

    Args:
        lag: in chunks, at least the number of stages.
        stop: whether this rank wants to stop.
    """

    def __init__(self, team: Team, lag: int, stop: Callable[[], bool]):
        self.team, self.lag, self.stop = team, lag, stop
        self._began = perf_counter()
        self._chunk = self._next = 0  # the chunk that comes next, and the one before which to vote next
        self._votes: NDArray[np.float64] = np.zeros(2)  # whether to stop, and the mean seconds of a chunk
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
            self._cast = self.team.comm.Iallreduce(MPI.IN_PLACE, self._votes, MPI.MAX)
        self._chunk += 1
        return self._going

    def _count(self) -> None:
        if self._cast:
            self.team.clock("communication")
            wait([self._cast])
            self._cast, self._going = None, not self._votes[0]

    def finish(self) -> bool:
        """Whether all chunks were done. Votes that were not counted by then have no effect."""
        going = self._going
        self._count()
        return going

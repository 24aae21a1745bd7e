"""A job with more ranks than its run has work for: the others wait, and end as those that work do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.errors import RunError
from mpiml.run.process import StopRequest
from mpiml.waiting import broadcast, wait

NAP = 0.01  # seconds between two looks of a rank that waits


class Crew:
    """The ranks of a job, of which the first `busy` work and the others wait; collective to make.

    Each rank that waits sends rank 0 one empty message: when it is asked to stop, or else at the end.

    Attributes:
        team: the ranks that work; None on one that waits.
        idle: how many wait.
    """

    def __init__(self, comm: MPI.Intracomm, busy: int, clock: Clock):
        self.idle, self.clock = comm.size - busy, clock
        self.team: MPI.Intracomm | None = comm
        self._stops: list[MPI.Request] = []
        if self.idle:
            self._everyone = comm.Dup()
            team = comm.Split(0 if comm.rank < busy else MPI.UNDEFINED, comm.rank)
            self.team = None if team == MPI.COMM_NULL else MPI.Intracomm(team)
            waiting = range(busy, comm.size) if comm.rank == 0 else ()
            self._stops = [self._everyone.Irecv(bytearray(), rank) for rank in waiting]

    def asked(self) -> bool:
        """Whether one more rank that waits has been asked to stop. Rank 0 knows."""
        return MPI.Request.Testany(self._stops)[0] != MPI.UNDEFINED

    def tell(self, news: Any) -> None:
        """Let the ranks that wait hear something; all that work call it."""
        self._exchange((True, news))

    def run(
        self, work: Callable[[MPI.Intracomm], dict[str, Any]], stop: StopRequest, hear: Callable[[Any], None]
    ) -> dict[str, Any]:
        """What `work(team)` returns on the ranks that work, or the error that all of them raise, on all ranks alike.

        `hear` is called on the others with what `tell` says meanwhile. An error of one rank alone passes: it ends the
        whole job.
        """
        result: dict[str, Any]
        if self.team is None:
            result, error = self._wait(stop, hear)
        else:
            result, error = _attempt(work, self.team)
            self._exchange((False, (result, error)))
        self._free()
        if error:
            raise error
        return result

    def _wait(self, stop: StopRequest, hear: Callable[[Any], None]) -> Any:
        content: tuple[bool, Any] = (True, None)
        more = True
        while more:
            self.clock("joining")
            met = self._everyone.Ibarrier()
            while not met.Test():
                if stop.asked:
                    self._pass_on()
                time.sleep(NAP)
            more, news = broadcast(self._everyone, content)
            if more:
                hear(news)
        self._pass_on()
        return news

    def _pass_on(self) -> None:
        if not self._stops:
            self._stops = [self._everyone.Isend(b"", 0)]

    def _exchange(self, content: tuple[bool, Any]) -> None:
        if self.idle:
            self.clock("joining")
            wait([self._everyone.Ibarrier()])
            broadcast(self._everyone, content)

    def _free(self) -> None:
        if self.idle:
            wait(self._stops)
            self._everyone.Free()
            if self.team is not None:
                self.team.Free()


def _attempt(
    work: Callable[[MPI.Intracomm], dict[str, Any]], team: MPI.Intracomm
) -> tuple[dict[str, Any], RunError | None]:
    try:
        return work(team), None
    except RunError as error:
        if not error.everywhere:
            raise
        return {}, error

"""A job with more ranks than its run has work for: the others wait, and end as the working ranks do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from mpiml.errors import RunError
from mpiml.run.process import StopRequest
from mpiml.team import Team, broadcast, wait

NAP = 0.01  # seconds for which a waiting rank sleeps


class Crew:
    """The ranks of a job: the first `busy` work, the others wait. Making it is collective.

    Each waiting rank sends rank 0 one empty message: when it is asked to stop, or else at the end.

    Attributes:
        team: the working ranks; None on a waiting rank.
        idle: the number of waiting ranks.
    """

    def __init__(self, everyone: Team, busy: int):
        comm, self.idle, self.clock = everyone.comm, everyone.size - busy, everyone.clock
        self.team: Team | None = everyone
        self._stops: list[MPI.Request] = []
        if self.idle:
            self._everyone = comm.Dup()
            working = comm.Split(0 if comm.rank < busy else MPI.UNDEFINED, comm.rank)
            self.team = None if working == MPI.COMM_NULL else Team(MPI.Intracomm(working), self.clock)
            waiting = range(busy, comm.size) if comm.rank == 0 else ()
            self._stops = [self._everyone.Irecv(bytearray(), rank) for rank in waiting]

    def asked(self) -> bool:
        """Whether another waiting rank has been asked to stop; to be called on rank 0."""
        return MPI.Request.Testany(self._stops)[0] != MPI.UNDEFINED

    def run(self, work: Callable[[Team], dict[str, Any]], stop: StopRequest) -> dict[str, Any]:
        """Call `work(team)` on the working ranks; collective. All ranks return its result, or raise the error that all
        working ranks have raised.

        An error that only one rank raises is raised there at once: it ends the whole job (mpiml.run.failure).
        """
        outcome: tuple[dict[str, Any], RunError | None] = {}, None
        try:
            if self.team:
                outcome = work(self.team), None
        except RunError as error:
            if not error.everywhere:
                raise
            outcome = {}, error
        if self.idle:
            self.clock("joining")
            barrier = self._everyone.Ibarrier()
            while not barrier.Test():
                if self.team is None and stop.asked:
                    self._report_stop()
                time.sleep(NAP)
            outcome = broadcast(self._everyone, outcome)
            if self.team:
                self.team.comm.Free()
            else:
                self._report_stop()
            wait(self._stops)
            self._everyone.Free()
        result, failure = outcome
        if failure:
            raise failure
        return result

    def _report_stop(self) -> None:
        if not self._stops:
            self._stops = [self._everyone.Isend(b"", 0)]

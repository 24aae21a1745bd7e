"""A job with more ranks than its run has work for: the others wait, and end as those that work do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from mpiml.errors import RunError
from mpiml.run.process import StopRequest
from mpiml.team import Team, broadcast, wait

NAP = 0.01  # seconds between two looks of a rank that waits


class Crew:
    """The ranks of a job, of which the first `busy` work and the others wait; collective to make.

    Each rank that waits sends rank 0 one empty message: when it is asked to stop, or else at the end.

    Attributes:
        team: the ranks that work; None on one that waits.
        idle: how many wait.
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
        """Whether one more rank that waits has been asked to stop. Rank 0 knows."""
        return MPI.Request.Testany(self._stops)[0] != MPI.UNDEFINED

    def run(self, work: Callable[[Team], dict[str, Any]], stop: StopRequest) -> dict[str, Any]:
        """What `work(team)` returns on the ranks that work, or the error that all of them raise, on all ranks alike.

        An error of one rank alone passes: it ends the whole job.
        """
        outcome: tuple[dict[str, Any], RunError | None] = _attempt(work, self.team) if self.team else ({}, None)
        if self.idle:
            self.clock("joining")
            met = self._everyone.Ibarrier()
            while not met.Test():
                if self.team is None and stop.asked:
                    self._pass_on()
                time.sleep(NAP)
            outcome = broadcast(self._everyone, outcome)
            if self.team is None:
                self._pass_on()
        result, error = outcome
        self._free()
        if error:
            raise error
        return result

    def _pass_on(self) -> None:
        if not self._stops:
            self._stops = [self._everyone.Isend(b"", 0)]

    def _free(self) -> None:
        if self.idle:
            wait(self._stops)
            self._everyone.Free()
            if self.team is not None:
                self.team.comm.Free()


def _attempt(work: Callable[[Team], dict[str, Any]], team: Team) -> tuple[dict[str, Any], RunError | None]:
    try:
        return work(team), None
    except RunError as error:
        if not error.everywhere:
            raise
        return {}, error

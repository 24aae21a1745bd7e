"""Ranks without work end with the result or the error of those that work, and pass on that they are to stop."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.errors import NotFiniteError
from mpiml.run.crew import Crew
from mpiml.run.process import StopRequest
from mpiml.team import Team

COMM = MPI.COMM_WORLD
BUSY = (COMM.size + 1) // 2
pytestmark = pytest.mark.mpi


def test_all_have_the_result() -> None:
    crew = Crew(Team(COMM, Clock()), BUSY)
    assert (crew.idle, crew.team is None) == (COMM.size - BUSY, COMM.rank >= BUSY)

    def work(team: Team) -> dict[str, Any]:
        return {"size": team.comm.allreduce(1), "ranks": team.allgather(COMM.rank)}

    assert crew.run(work, StopRequest()) == {"size": BUSY, "ranks": list(range(BUSY))}


def test_an_error_of_all_that_work_is_everybodys() -> None:
    def work(team: Team) -> dict[str, Any]:
        error = NotFiniteError("the loss is not finite")
        error.rank, error.everywhere = BUSY - 1, True
        raise error

    with pytest.raises(NotFiniteError, match="the loss is not finite") as caught:
        Crew(Team(COMM, Clock()), BUSY).run(work, StopRequest())
    assert (caught.value.everywhere, caught.value.rank, caught.value.exit_code) == (True, BUSY - 1, 70)


def test_who_waits_may_be_asked_to_stop_and_those_that_work_do() -> None:
    """Each of them is asked, and asked twice."""
    clock = Clock()
    with StopRequest() as stop:
        crew = Crew(Team(COMM, clock), BUSY)
        stop.others = crew.asked
        if COMM.rank >= BUSY or COMM.size == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)

        def work(team: Team) -> dict[str, Any]:
            late = time.monotonic() + 10
            while not team.broadcast(stop.now() or time.monotonic() > late):
                pass
            return {"in time": time.monotonic() < late}

        assert crew.run(work, stop) == {"in time": True}

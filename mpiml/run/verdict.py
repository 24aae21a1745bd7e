"""Doing something on some ranks so that all know how it went: an error of one becomes the same error on all.

An OSError counts as an OutputError. By the clock, whoever waits for the others' verdict is joining them, and whoever
acts is not: so the watch takes no rank that waits for stuck, and names the one that is.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from mpi4py import MPI

from mpiml.clock import BLOCKED_ON_OTHERS, Clock
from mpiml.errors import OutputError, RunError
from mpiml.waiting import broadcast, wait

T = TypeVar("T")


def together(comm: MPI.Intracomm, clock: Clock, action: Callable[[], T]) -> T:
    """Call `action` on every rank; it must not communicate. Collective.

    Raises, on all ranks alike, the RunError of the lowest rank on which there was one.
    """
    doing = clock.activity
    result, error = _attempt(clock, action)
    clock("joining")
    first = np.array([comm.size if error is None else comm.rank])
    wait([comm.Iallreduce(MPI.IN_PLACE, first, MPI.MIN)])
    if first[0] < comm.size:
        raise _everywhere(broadcast(comm, _portable(error), int(first[0])), int(first[0]))
    clock(doing)
    return result  # type: ignore[return-value]


def on_rank_0(comm: MPI.Intracomm, clock: Clock, action: Callable[[], T]) -> T:
    """Call `action` on rank 0 alone and return its result on all ranks. Collective.

    Raises, on all ranks alike, the RunError that rank 0 raised.
    """
    doing = clock.activity
    result, error = _attempt(clock, action) if comm.rank == 0 else (None, None)
    clock("joining")
    result, portable = broadcast(comm, (result, _portable(error)))
    clock(doing)
    if portable:
        raise _everywhere(portable, 0)
    return result  # type: ignore[return-value]


def _attempt(clock: Clock, action: Callable[[], T]) -> tuple[T | None, RunError | None]:
    if clock.activity in BLOCKED_ON_OTHERS:
        clock("start")
    try:
        return action(), None
    except RunError as error:
        return None, error
    except OSError as error:
        return None, OutputError(f"{error.filename or 'input or output'}: {error.strerror or error}")


def _portable(error: RunError | None) -> tuple[type[RunError], str] | None:
    return (type(error), str(error)) if error else None


def _everywhere(portable: tuple[type[RunError], str] | None, rank: int) -> RunError:
    assert portable, "the failing rank sent no error"
    kind, message = portable
    error = kind(message)
    error.rank, error.everywhere = rank, True
    return error

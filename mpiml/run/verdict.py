"""Doing something on some ranks so that all know how it went: an error of one becomes the same error on all."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from mpi4py import MPI

from mpiml.errors import RunError

T = TypeVar("T")


def together(comm: MPI.Intracomm, action: Callable[[], T]) -> T:
    """Call `action` on every rank; it must not communicate. Collective.

    Raises, on all ranks alike, the RunError of the lowest rank on which there was one.
    """
    result, error = None, None
    try:
        result = action()
    except RunError as raised:
        error = raised
    # Not comm.allreduce: while it waits, other threads of the process cannot run, the watch among them.
    first = np.array([comm.size if error is None else comm.rank])
    comm.Allreduce(MPI.IN_PLACE, first, MPI.MIN)
    if first[0] < comm.size:
        raise _everywhere(comm.bcast(_portable(error), root=int(first[0])), int(first[0]))
    return result  # type: ignore[return-value]


def on_rank_0(comm: MPI.Intracomm, action: Callable[[], T]) -> T:
    """Call `action` on rank 0 alone and return its result on all ranks. Collective.

    Raises, on all ranks alike, the RunError that rank 0 raised.
    """
    result, error = None, None
    if comm.rank == 0:
        try:
            result = action()
        except RunError as raised:
            error = raised
    shared: tuple[T, tuple[type[RunError], str] | None] = comm.bcast((result, _portable(error)), root=0)
    result, portable = shared
    if portable:
        raise _everywhere(portable, 0)
    return result


def _portable(error: RunError | None) -> tuple[type[RunError], str] | None:
    return (type(error), str(error)) if error else None


def _everywhere(portable: tuple[type[RunError], str] | None, rank: int) -> RunError:
    assert portable, "the failing rank sent no error"
    kind, message = portable
    error = kind(message)
    error.rank, error.everywhere = rank, True
    return error

"""A guard that a program does not see: from its first DataParallel until it ends."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from types import TracebackType

from mpi4py import MPI

from mpiml.errors import known_to_all
from mpiml.loop.guard import guard, guards
from mpiml.run import one_job


class UntilExit(guard):
    """Says what a program with a DataParallel can do."""

    entry = "make a DataParallel"
    hint = "if it was at work of its own: DataParallel(..., stall_timeout=...), or mpiml.api.guard and its alive()"


def guard_until_exit(comm: MPI.Intracomm, stall_timeout: float) -> guard:
    """The guard that this process is in; outside of any, a new one until the program ends. Collective.

    A rank that is alone does not enter the new one.
    """
    if guards:
        return guards[-1]
    one = UntilExit(comm, stall_timeout=stall_timeout)
    if comm.size == 1:
        one_job.check_size(MPI.COMM_WORLD.size)
        return one
    one.__enter__()
    one._stop.__exit__()  # nobody will ask it
    shown = sys.excepthook

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if one not in guards:
            shown(kind, error, trace)
        elif known_to_all(error, comm.size):
            one.__exit__(kind, error, trace)
        else:
            one.fail(error)

    def leave(finalize: Callable[[], None] = MPI.Finalize) -> None:
        try:
            if one in guards:
                one.__exit__(None, None, None)
        except SystemExit as ended:  # of all ranks; Python would print it, and end with the code it has
            sys.stdout.flush()
            finalize()
            os._exit(int(ended.code or 0))

    sys.excepthook = uncaught
    atexit.register(leave)
    # A program may call MPI.Finalize() itself, which first of all deletes what is attached to COMM_SELF.
    MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=lambda *_: leave(finalize=lambda: None)), one)
    return one

"""Waiting for other ranks without keeping a core from those that have work."""

import os
import pickle
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from mpi4py import MPI

T = TypeVar("T")

YIELDS = 50
NAP = 50e-6  # seconds
PATIENCE = (
    40  # times as many yields, about a millisecond, where every thread has a core: a nap lasts longer than it says
)
_yields = YIELDS


def share_cores(threads: int, cores: int) -> None:
    """Say how many threads of all ranks use how many cores of this node: on it depends how soon a rank sleeps."""
    global _yields  # noqa: PLW0603 (a property of the process, as the cores are)
    _yields = YIELDS * PATIENCE if threads <= cores else YIELDS


def until(done: Callable[[], bool]) -> None:
    """Return when `done()` is true. Asks at once, then yields the core at every try, then sleeps between tries.

    Before it sleeps it drives the MPI library: between nodes, what this rank has sent may still be on its way, and
    whoever is to make `done()` true may wait for it.
    """
    tries = 0
    while not done():
        tries += 1
        if tries > _yields:
            MPI.COMM_SELF.Iprobe()
            time.sleep(NAP)
        else:
            os.sched_yield()


def wait(requests: Sequence[MPI.Request]) -> None:
    """Return when all requests are complete.

    Each poll drives the MPI library, so messages of other requests move meanwhile, and signals are handled.
    """
    if requests:
        pending = list(requests)
        until(lambda: MPI.Request.Testall(pending))


def meet(comm: MPI.Intracomm) -> None:
    """A barrier that leaves the cores alone: ranks that wait here must not slow down the ones that are measured."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.002)


def broadcast(comm: MPI.Intracomm, value: T, root: int = 0) -> T:
    """What `value` is on rank `root`, on all ranks; collective. comm.bcast would poll without a pause."""
    content = bytearray(pickle.dumps(value) if comm.rank == root else b"")
    size = np.array([len(content)])
    wait([comm.Ibcast(size, root)])
    if comm.rank == root:
        wait([comm.Ibcast(content, root)])
        return value
    content = bytearray(int(size[0]))
    wait([comm.Ibcast(content, root)])
    received: T = pickle.loads(content)
    return received

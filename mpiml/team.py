"""Ranks that act together: waiting for others without keeping a core from those that have work, and doing something
on some ranks so that all know how it went.

An error of one becomes the same error on all; an OSError counts as an OutputError. By the clock, whoever waits for the
others' verdict is joining them, and whoever acts is not: so the watch takes no rank that waits for stuck, and names
the one that is.
"""

import itertools
import os
import pickle
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from mpi4py import MPI

from mpiml.clock import BLOCKED_ON_OTHERS, Clock
from mpiml.errors import OutputError, RunError

T = TypeVar("T")

YIELDS = 50
NAP = 50e-6  # seconds, the shortest
LONGEST = 2e-3
PART = 1 / 16  # of the time waited so far: the most that naps add to a wait
# Times as many yields, about a millisecond, where every thread has a core: a nap lasts longer than it says.
PATIENCE = 40
ENVELOPE = 4096  # bytes that a broadcast begins with
_yields = YIELDS


def share_cores(threads: int, cores: int) -> None:
    """Say how many threads of all ranks use how many cores of this node: on it depends how soon a rank sleeps."""
    global _yields  # noqa: PLW0603 (a property of the process, as the cores are)
    _yields = YIELDS * PATIENCE if threads <= cores else YIELDS


def until(done: Callable[[], bool]) -> None:
    """Return when `done()` is true. Asks at once, then yields the core at every try, then sleeps between tries.

    The longer it has waited, the longer it sleeps: where there are more ranks than cores, polling takes time from the
    very ranks that are waited for. Before it sleeps it drives the MPI library: between nodes, what this rank has sent
    may still be on its way, and whoever is to make `done()` true may wait for it.
    """
    tries = 0
    began = 0.0
    while not done():
        tries += 1
        if tries <= _yields:
            os.sched_yield()
            continue
        began = began or time.monotonic()
        MPI.COMM_SELF.Iprobe()
        time.sleep(min(max(NAP, PART * (time.monotonic() - began)), LONGEST))


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
    content = pickle.dumps(value) if comm.rank == root else b""
    first = bytearray(ENVELOPE)  # how long the content is, and its beginning: mostly all of it
    first[: 8 + len(content)] = len(content).to_bytes(8) + content[: ENVELOPE - 8]
    wait([comm.Ibcast(first, root)])
    size = int.from_bytes(first[:8])
    rest = bytearray(content[ENVELOPE - 8 :] if comm.rank == root else max(size - (ENVELOPE - 8), 0))
    if rest:
        wait([comm.Ibcast(rest, root)])
    received: T = value if comm.rank == root else pickle.loads(first[8 : 8 + size] + rest)
    return received


def allgather(comm: MPI.Intracomm, value: T) -> list[T]:
    """The values of all ranks, on all ranks; collective. comm.allgather would poll without a pause."""
    content = pickle.dumps(value)
    sizes = np.empty(comm.size, np.int64)
    wait([comm.Iallgather(np.array([len(content)]), sizes)])
    ends = list(itertools.accumulate(sizes.tolist(), initial=0))
    everything = bytearray(ends[-1])
    wait([comm.Iallgatherv(content, [everything, sizes.tolist()])])
    return [pickle.loads(everything[start:stop]) for start, stop in itertools.pairwise(ends)]


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

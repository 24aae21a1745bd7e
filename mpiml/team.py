"""Ranks that act together, and waiting for other ranks without taking a core from those that have work."""

import itertools
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.clock import BLOCKED_ON_OTHERS, Clock
from mpiml.errors import ConfigError, OutputError, RunError

T = TypeVar("T")
Failure = tuple[type[RunError], str]  # a RunError, as it is sent to other ranks

YIELDS = 50
NAP = 50e-6  # seconds, the shortest
LONGEST = 2e-3
PART = 1 / 16  # a nap lasts at most this fraction of the time waited so far
# If every thread has a core, this many times as many yields, about a millisecond: a nap lasts longer than asked for.
PATIENCE = 40
MESSAGE = 1 << 26  # bytes that are sent at once: MPI libraries count them in 32 bits
ENVELOPE = 4096  # bytes of a broadcast's first message
_yields = YIELDS


def share_cores(threads: int, cores: int) -> None:
    """Set how soon waiting ranks sleep, from the threads of all ranks on this node and its cores."""
    global _yields  # noqa: PLW0603 (a property of the process, as the cores are)
    _yields = YIELDS * PATIENCE if threads <= cores else YIELDS


def until(done: Callable[[], bool]) -> None:
    """Return when `done()` is true: first yield the core between tries, then sleep.

    The longer the wait, the longer the sleep: with more ranks than cores, polling takes time from the very ranks that
    this one waits for. Before sleeping it drives the MPI library: a message of this rank to another node may still be
    on its way, and the rank that makes `done()` true may need it.
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


def launched_ranks(comm: MPI.Intracomm) -> list[int]:
    """The rank that the launcher gave each rank of `comm`; those in `comm` if it has ranks of another launch."""
    group, everyone = comm.Get_group(), MPI.COMM_WORLD.Get_group()
    ranks = MPI.Group.Translate_ranks(group, range(comm.size), everyone)
    group.Free()
    everyone.Free()
    return list(range(comm.size)) if MPI.UNDEFINED in ranks else ranks


def quiet_barrier(comm: MPI.Intracomm) -> None:
    """A barrier in which waiting ranks sleep, so that they do not slow down those that are measured."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.002)


def broadcast(comm: MPI.Intracomm, value: T, root: int = 0) -> T:
    """The `value` of rank `root`, on all ranks; collective. comm.bcast would poll without pauses."""
    content = pickle.dumps(value) if comm.rank == root else b""
    first = bytearray(ENVELOPE)  # the length of the content, and its beginning: mostly all of it
    first[: 8 + len(content)] = len(content).to_bytes(8) + content[: ENVELOPE - 8]
    wait([comm.Ibcast(first, root)])
    size = int.from_bytes(first[:8])
    rest = bytearray(content[ENVELOPE - 8 :] if comm.rank == root else max(size - (ENVELOPE - 8), 0))
    for begin in range(0, len(rest), MESSAGE):
        wait([comm.Ibcast(memoryview(rest)[begin : begin + MESSAGE], root)])
    received: T = value if comm.rank == root else pickle.loads(first[8 : 8 + size] + rest)
    return received


def allgather(comm: MPI.Intracomm, value: T) -> list[T]:
    """The values of all ranks, on all ranks; collective. comm.allgather would poll without pauses."""
    content = pickle.dumps(value)
    sizes = np.empty(comm.size, np.int64)
    wait([comm.Iallgather(np.array([len(content)]), sizes)])
    ends = list(itertools.accumulate(sizes.tolist(), initial=0))
    everything = bytearray(ends[-1])
    wait([comm.Iallgatherv(content, [everything, sizes.tolist()])])
    return [pickle.loads(everything[start:stop]) for start, stop in itertools.pairwise(ends)]


def reduced(comm: MPI.Intracomm, value: T, join: Callable[[T, T], T]) -> T:
    """What `join` makes of the values of all ranks, in their order, on rank 0; of some of them on other ranks.
    Collective. Runs of ranks are joined in pairs, all pairs at once: no rank has the values of all."""
    distance = 1
    while distance < comm.size:
        if comm.rank % (2 * distance):
            wait([comm.isend(value, comm.rank - distance)])
            break
        if (other := comm.rank + distance) < comm.size:
            until(lambda other=other: comm.iprobe(other))  # type: ignore[misc]
            value = join(value, comm.recv(source=other))
        distance *= 2
    return value


class Team:
    """Ranks that act together, and the clock of this rank.

    While a rank waits here for the others its activity is "joining"; while it acts it is another one. So the watch does
    not take a waiting rank for a stuck one, and names the one that is stuck. Messages name ranks as in `launched`: the
    rank that the launcher gave each rank of `comm`, whatever part of the job that is.
    """

    def __init__(self, comm: MPI.Intracomm, clock: Clock):
        self.comm, self.clock, self.launched = comm, clock, launched_ranks(comm)

    @property
    def rank(self) -> int:
        """This process' rank in the team."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.comm.size

    @property
    def name(self) -> int:
        """The rank that the launcher gave this process."""
        return self.launched[self.comm.rank]

    def wait(self, requests: Sequence[MPI.Request]) -> None:
        """Return when all requests, which need the other ranks, are complete."""
        with self.clock.doing("joining"):
            wait(requests)

    def broadcast(self, value: T, root: int = 0) -> T:
        """The `value` of rank `root`, on all ranks; collective."""
        with self.clock.doing("joining"):
            return broadcast(self.comm, value, root)

    def allgather(self, value: T) -> list[T]:
        """The values of all ranks, on all ranks; collective."""
        with self.clock.doing("joining"):
            return allgather(self.comm, value)

    def broadcast_array(self, array: NDArray[Any], root: int = 0) -> None:
        """Give all ranks what rank `root` has in an array, whose bytes are contiguous on each; collective."""
        content = array.reshape(-1).view(np.uint8)
        for first in range(0, content.size, MESSAGE):
            self.wait([self.comm.Ibcast(content[first : first + MESSAGE], root)])

    def together(self, action: Callable[[], T]) -> T:
        """Call `action` on every rank; it must not communicate. Collective.

        Raises, on all ranks alike, the RunError of the lowest rank that raised one.
        """
        result, failure = self._attempt(action)
        first = np.array([self.size if failure is None else self.rank])
        self.wait([self.comm.Iallreduce(MPI.IN_PLACE, first, MPI.MIN)])
        if first[0] < self.size:
            raise self._everywhere(self.broadcast(failure, int(first[0])), int(first[0]))
        return result  # type: ignore[return-value]

    def on_rank_0(self, action: Callable[[], T]) -> T:
        """Call `action` on rank 0 alone and return its result on all ranks. Collective.

        Raises, on all ranks alike, the RunError that rank 0 raised.
        """
        result, failure = self.broadcast(self._attempt(action) if self.rank == 0 else (None, None))
        if failure:
            raise self._everywhere(failure, 0)
        return result  # type: ignore[return-value]

    def check_alike(self, values: Mapping[str, str], hint: str = "") -> None:
        """Raise ConfigError, on all ranks alike, if any rank has other values than rank 0; collective. The message
        names the value as `values` does, and ends with the hint."""
        first = self.broadcast(dict(values))

        def compare() -> None:
            for name in {**first, **values}:
                own, other = values.get(name, "none"), first.get(name, "none")
                if own != other:
                    where = f"rank {self.name} on {os.uname().nodename}"
                    text = f"ranks differ in {name}: {own} ({where}), {other} (rank {self.launched[0]})"
                    raise ConfigError(f"{text}; {hint}" if hint else text)

        self.together(compare)

    def _attempt(self, action: Callable[[], T]) -> tuple[T | None, Failure | None]:
        """The result of an action, or the RunError that it raises; an OSError becomes an OutputError."""
        acting = "start" if self.clock.activity in BLOCKED_ON_OTHERS else self.clock.activity
        with self.clock.doing(acting):
            try:
                return action(), None
            except RunError as error:
                return None, (type(error), str(error))
            except OSError as error:
                return None, (OutputError, f"{error.filename or 'input or output'}: {error.strerror or error}")

    def _everywhere(self, failure: Failure | None, rank: int) -> RunError:
        assert failure, "the failing rank sent no error"
        kind, message = failure
        return kind(message).on_all_ranks(self.launched[rank])

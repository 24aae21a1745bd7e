"""Noticing a rank that makes no progress, and ending the job that would wait for it for ever."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.clock import BLOCKED_ON_OTHERS, Clock
from mpiml.errors import RunError
from mpiml.waiting import allgather, wait

# A sign of life carries the activity's number here.
ACTIVITIES = [
    *("start", "data", "compute", "waiting", "communication", "update", "evaluation", "checkpoint", "log", "joining")
]
GOODBYE = -1.0
# Seconds between looks at the neighbour's process, and how often it is not there before the job ends: mostly the
# launcher ends it sooner, or this rank's watch is nearly over too.
LOOK, LOOKS = 1.0, 5
PROBES = 100  # in vain before no message is there: a probe may fail just because it first moves messages along


class StallError(RunError):
    """A rank has made no progress for too long, or is gone."""


@dataclass
class Sign:
    """The last sign of life of a rank: when it came, and since when its moves stand still."""

    heard: float
    moved: float
    moves: float = 0.0
    step: int = 0
    activity: str = "start"
    gone: bool = False


class Neighbour:
    """The process of the next rank on this node, as the kernel tells of it; collective to make.

    Where that cannot be, on a node of one rank say, it never has `ended`.
    """

    def __init__(self, comm: MPI.Intracomm):
        self._poll, self._descriptor = select.poll(), -1
        try:
            kernel = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
        except OSError:
            kernel = f"unknown, of rank {comm.rank}"
        everyone = allgather(comm, (kernel, os.getpid()))
        here = [rank for rank, (other, _) in enumerate(everyone) if other == kernel]
        self.rank = here[(here.index(comm.rank) + 1) % len(here)]
        if self.rank != comm.rank:
            try:
                self._descriptor = os.pidfd_open(everyone[self.rank][1])
            except (OSError, AttributeError):  # an old kernel, or one that is not Linux
                return
            self._poll.register(self._descriptor, select.POLLIN)

    @property
    def ended(self) -> bool:
        """Whether its process has."""
        return self._descriptor >= 0 and bool(self._poll.poll(0))

    def close(self) -> None:
        """Look no more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Watch(threading.Thread):
    """A thread on every rank while they are in a block that all enter together.

    Every few seconds each rank looks at itself: has it moved, if it waits for nobody? And it sends a sign of life
    to rank 0 and to the next rank, who notice the silence of a stopped process; rank 0 also notices a job in which
    all wait. Every second it looks whether its neighbour's process is there: a launcher may overlook that one ends.

    Args:
        comm: a communicator of the watch's own.
        clock: of this rank.
        timeout: seconds; 0 watches nothing.
        fail: is called with a StallError that names rank, activity and step.
    """

    def __init__(self, comm: MPI.Intracomm, clock: Clock, timeout: float, fail: Callable[[RunError], None]):
        super().__init__(name="mpiml-watch", daemon=True)
        self.comm, self.clock, self.timeout, self.fail = comm, clock, timeout, fail
        self.interval = min(timeout / 5, 30.0)
        self._ending = threading.Event()
        self._sent: list[MPI.Request] = []
        now = time.monotonic()
        watched = range(1, comm.size) if comm.rank == 0 else [comm.rank - 1]
        self._listeners = sorted({0, (comm.rank + 1) % comm.size} - {comm.rank})
        self._signs = {rank: Sign(now, now) for rank in watched}
        self._own = Sign(now, now)
        self._neighbour, self._ended = Neighbour(comm), 0
        self._threads = MPI.Query_thread() == MPI.THREAD_MULTIPLE and comm.size > 1

    def __enter__(self) -> Watch:
        if self.timeout:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or getattr(error, "everywhere", False) or self.comm.size == 1:
            self._end()

    def _end(self) -> None:
        """Stop watching: all ranks do, for they all leave the block, by its end or by one error."""
        if self.timeout:
            self._ending.set()
            self.join()
        self._neighbour.close()
        if self.timeout and self._threads:
            self._send(GOODBYE)
            while not all(sign.gone for sign in self._signs.values()):
                now = time.monotonic()
                self._listen(now)
                self._look_at_others(now)
                time.sleep(0.001)
            wait(self._sent)
        self.comm.Free()

    def run(self) -> None:
        before = time.monotonic()
        while not self._ending.wait(min(LOOK, self.interval)):
            self._look_at_neighbour()
            now = time.monotonic()
            if now - before < self.interval:
                continue
            if now - before > 3 * self.interval:  # this process was itself stopped: what it remembers is too old
                for sign in [self._own, *self._signs.values()]:
                    sign.heard = sign.moved = now
            before = now
            self._look_at_own(now)
            if self._threads:
                self._send(float(self.clock.moves + _bytes_moved()))
                self._listen(now)
                self._look_at_others(now)

    def _look_at_neighbour(self) -> None:
        self._ended += self._neighbour.ended
        if self._ended > LOOKS:
            error = StallError(f"rank {self._neighbour.rank} has ended without a word: killed, or by os._exit")
            error.rank = self._neighbour.rank
            self.fail(error)

    def _look_at_own(self, now: float) -> None:
        progress = self.clock.moves + _bytes_moved()
        if progress != self._own.moves:
            self._own.moves, self._own.moved = progress, now
        elif now - self._own.moved > self.timeout and self.clock.activity not in BLOCKED_ON_OTHERS:
            self._stalled(self.comm.rank, "has made no progress", self.clock.activity, self.clock.step)

    def _send(self, moves: float) -> None:
        self._sent = [request for request in self._sent if not request.Test()]
        sign = np.array([moves, self.clock.step, ACTIVITIES.index(self.clock.activity)])
        self._sent += [self.comm.Isend(sign, rank) for rank in self._listeners]

    def _listen(self, now: float) -> None:
        status = MPI.Status()
        message: NDArray[np.float64] = np.empty(3)
        misses = 0
        while self._signs and misses < PROBES:
            if not self.comm.Iprobe(status=status):
                misses += 1
                continue
            self.comm.Recv(message, status.source)
            sign = self._signs[status.source]
            sign.heard = now
            sign.gone = message[0] == GOODBYE
            if message[0] != sign.moves:
                sign.moves, sign.moved = message[0], now
            sign.step, sign.activity = int(message[1]), ACTIVITIES[int(message[2])]

    def _look_at_others(self, now: float) -> None:
        for rank, sign in self._signs.items():
            if now - sign.heard > self.timeout and not sign.gone:
                self._stalled(rank, "has given no sign of life", sign.activity, sign.step)
        everyone = [self._own, *self._signs.values()]
        if self.comm.rank == 0 and all(now - sign.moved > 2 * self.timeout for sign in everyone):
            self._stalled(0, "waits, like all others,", self.clock.activity, self.clock.step, 2 * self.timeout)

    def _stalled(self, rank: int, what: str, activity: str, step: int, seconds: float | None = None) -> None:
        error = StallError(f"rank {rank} {what} for {seconds or self.timeout:g} s, in step {step} ({activity})")
        error.rank = rank
        self.fail(error)


def _bytes_moved() -> int:
    """What this process has read and written, in units of 64 KiB: a long write of a large file is progress too.

    Looking here reads a little itself, which the unit swallows.
    """
    try:
        fields = Path("/proc/self/io").read_text().split()
        return sum(int(fields[index]) for index in (1, 3, 9)) >> 16  # rchar, wchar, read_bytes
    except (OSError, IndexError, ValueError):
        return 0

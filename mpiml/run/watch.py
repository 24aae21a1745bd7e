"""Detecting a rank that makes no progress, and ending the job, which would wait for it for ever."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from mpi4py import MPI

from mpiml.clock import ACTIVITIES, BLOCKED_ON_OTHERS, Activity, Clock
from mpiml.errors import RunError, StallError, known_to_all
from mpiml.run import alarm
from mpiml.run.alarm import QUIET, bytes_moved
from mpiml.run.node import Process, kernel, own_launcher
from mpiml.team import allgather, launched_ranks, wait

GOODBYE = -1.0  # in place of moves, in a rank's last message
MESSAGE = np.dtype([("moves", "f8"), ("step", "i8"), ("activity", "i8"), ("call", "S24")])
# Seconds between looks at the processes of the neighbour and the launcher, and how many looks may miss one before the
# job is ended: mostly the launcher ends it sooner, or this rank's watch is about to end as well.
LOOK, LOOKS = 1.0, 5
QUIET_EACH = 1 << 10  # bytes between two looks that do not count as progress, per rank that this one watches
PLACES = 4  # places that a message lists
LEFT = 3  # intervals for which all others have to wait if a rank has left: signs that are on their way have come then
PROBES = 100  # failing in a row mean that no message is there: a probe may fail because it first moves messages along


@dataclass
class Sign:
    """A rank's last sign of life: when it was heard, and when its count of moves last changed; its step is
    None if none has come yet."""

    heard: float
    moved: float
    moves: float = 0.0
    step: int | None = 0
    activity: Activity = "start"
    gone: bool = False
    call: str = ""

    @property
    def place(self) -> str:
        """The rank's step, call and activity, for a message."""
        call = f", {self.call}" if self.call else ""
        return "at its beginning" if self.step is None else f"in step {self.step}{call} ({self.activity})"


def neighbour(comm: MPI.Intracomm) -> tuple[int, Process]:
    """The next rank on this node and its process; this rank, and Process(None), if it is alone there. Collective."""
    own = kernel() or f"unknown, of rank {comm.rank}"
    everyone = allgather(comm, (own, os.getpid()))
    node = [rank for rank, (other, _) in enumerate(everyone) if other == own]
    rank = node[(node.index(comm.rank) + 1) % len(node)]
    return rank, Process(everyone[rank][1] if rank != comm.rank else None)


class Watch(threading.Thread):
    """A thread on every rank while it is in a block that all ranks enter together.

    Every few seconds each rank checks itself: has it made progress, unless it waits for others? It sends a sign of life
    to rank 0 and to the next rank, which detect the silence of a stopped process; rank 0 also detects that all ranks
    wait. Every second it checks that two processes exist: its neighbour's, because a launcher may miss that one has
    ended, and the launcher's, without which nobody can stop the job. Meanwhile the alarm (mpiml.run.alarm) is off. Of
    watches within each other only the innermost judges the rank's progress.

    Args:
        comm: a communicator for the watch alone.
        clock: of this rank.
        timeout: seconds without progress; 0: no rank is judged by its progress, and processes that have ended and ranks
            that have left are still noticed.
        fail: called with a StallError that names rank, activity and step.
        hint: what to do if a rank makes no progress in work of a program's own.

    Attributes:
        notes: warnings about what it cannot detect.
    """

    def __init__(
        self, comm: MPI.Intracomm, clock: Clock, timeout: float, fail: Callable[[RunError], None], hint: str = ""
    ):
        super().__init__(name="mpiml-watch", daemon=True)
        self.comm, self.clock, self.timeout, self.fail, self.hint = comm, clock, timeout or math.inf, fail, hint
        self.interval = min(self.timeout / 5, 30.0)
        self._launched = launched_ranks(comm)
        self._ending = threading.Event()
        self._alarm_was_on = False
        self._sent: list[MPI.Request] = []
        now = time.monotonic()
        watched = range(1, comm.size) if comm.rank == 0 else [comm.rank - 1]
        self._listeners = sorted({0, (comm.rank + 1) % comm.size} - {comm.rank})
        self._signs = {rank: Sign(now, now, step=None) for rank in watched}
        self._own = Sign(now, now)
        self._moves, self._bytes, self._quiet = clock.moves, bytes_moved(), QUIET + QUIET_EACH * len(self._signs)
        rank, process = neighbour(comm)
        self._processes: dict[str, tuple[int | None, Process]] = {
            f"{self._text(rank)} has ended without a word: killed, or by os._exit": (rank, process),
            "the launcher is gone: nobody can stop this job any more": (None, own_launcher()),
        }
        self._ended = dict.fromkeys(self._processes, 0)
        self._threads = MPI.Query_thread() == MPI.THREAD_MULTIPLE and comm.size > 1
        self.notes: list[str] = []
        if timeout and comm.size > 1 and not self._threads:
            self.notes = ["warning: this MPI library has no MPI_THREAD_MULTIPLE: a rank that is stopped is not noticed"]

    def __enter__(self) -> Watch:
        self.start()
        _watches.append(self)
        self._alarm_was_on = alarm.off()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if known_to_all(error, self.comm.size):
            self._end()

    def _end(self) -> None:
        """Stop watching. All ranks do so together: they leave the block at its end or by the same error."""
        if self.ident:
            self._ending.set()
            self.join()
        self._own = Sign(0.0, time.monotonic(), step=self.clock.step, gone=True)
        for _, process in self._processes.values():
            process.close()
        if self._threads:
            self._send(GOODBYE)
            while not all(sign.gone for sign in self._signs.values()):
                now = time.monotonic()
                self._listen(now)
                self._look_at_others(now)
                time.sleep(0.001)
            wait(self._sent)
        self.comm.Free()
        if self in _watches:
            _watches.remove(self)
        if self._alarm_was_on:  # else another watch goes on
            alarm.during("ending")

    def run(self) -> None:
        before = time.monotonic()
        while not self._ending.wait(min(LOOK, self.interval)):
            self._look_at_processes()
            now = time.monotonic()
            if now - before < self.interval:
                continue
            if now - before > 3 * self.interval:  # this process was stopped for a while: its notes are too old
                for sign in [self._own, *self._signs.values()]:
                    sign.heard = sign.moved = now
            before = now
            self._look_at_own(now)
            if self._threads:
                self._send(self._own.moves)
                self._listen(now)
                self._look_at_others(now)

    def _look_at_processes(self) -> None:
        for what, (rank, process) in self._processes.items():
            self._ended[what] += process.ended
            if self._ended[what] > LOOKS:
                self._stalled(what, rank)

    def _look_at_own(self, now: float) -> None:
        own, clock, total = self._own, self.clock, bytes_moved()
        own.step, own.activity, own.call = clock.step, clock.activity, clock.call
        inner = _watches[-1:] not in ([], [self])
        if inner or clock.patient or clock.moves != self._moves or total - self._bytes > self._quiet:
            own.moves, own.moved = own.moves + 1, now
        elif now - own.moved > self.timeout and own.activity not in BLOCKED_ON_OTHERS:
            what = f"{self._text(self.comm.rank)} has made no progress for {self.timeout:g} s, {own.place}"
            gone = [rank for rank, sign in self._signs.items() if sign.gone]
            left = f"; {self._text(gone[0])}, which it may wait for, has left the block" if gone else ""
            hint = f"; {self.hint}" if self.hint and own.activity == "compute" else ""
            self._stalled(what + left + hint, self.comm.rank)
        self._moves, self._bytes = clock.moves, total

    def _send(self, moves: float) -> None:
        self._sent = [request for request in self._sent if not request.Test()]
        clock = self.clock
        sign = np.array([(moves, clock.step, ACTIVITIES.index(clock.activity), clock.call)], MESSAGE)
        self._sent += [self.comm.Isend(sign.view(np.uint8), rank) for rank in self._listeners]

    def _listen(self, now: float) -> None:
        status = MPI.Status()
        message = np.empty(1, MESSAGE)
        misses = 0
        while self._signs and misses < PROBES:
            if not self.comm.Iprobe(status=status):
                misses += 1
                continue
            self.comm.Recv(message.view(np.uint8), status.source)
            moves, step, activity, call = message[0].item()
            sign = self._signs[status.source]
            sign.heard, sign.gone = now, moves == GOODBYE
            if moves != sign.moves:
                sign.moves, sign.moved = moves, now
            sign.step, sign.activity, sign.call = step, ACTIVITIES[activity], call.decode()

    def _look_at_others(self, now: float) -> None:
        for rank, sign in self._signs.items():
            if now - sign.heard > self.timeout and not sign.gone:
                last = "" if sign.step is None else f"; the last one was {sign.place}"
                self._stalled(f"{self._text(rank)} has given no sign of life for {self.timeout:g} s{last}", rank)
        if self.comm.rank == 0:
            self._look_at_all(now)

    def _look_at_all(self, now: float) -> None:
        """Rank 0: end the job if no rank has moved for so long that all must be waiting for each other, or for one that
        has left the block."""
        everyone = {0: self._own} | self._signs
        still = min(now - sign.moved for sign in everyone.values())
        if still > 2 * self.timeout:
            self._stalled(f"all ranks wait for each other for {2 * self.timeout:g} s: {self._places(everyone)}", None)
        gone = [rank for rank, sign in everyone.items() if sign.gone]
        inside = {rank: sign for rank, sign in everyone.items() if not sign.gone}
        waiting = all(sign.activity in BLOCKED_ON_OTHERS for sign in inside.values())
        living = all(
            now - sign.heard < 2 * self.interval for rank, sign in inside.items() if rank
        )  # and are not stopped
        if gone and inside and waiting and living and still > LEFT * self.interval:
            left = f"{self._text(gone[0])} has left the block in step {everyone[gone[0]].step}"
            self._stalled(f"{left}, and the others wait for it: {self._places(inside)}", gone[0])

    def _text(self, rank: int) -> str:
        """A rank as the launcher numbers it, for a message."""
        return f"rank {self._launched[rank]}"

    def _places(self, signs: Mapping[int, Sign]) -> str:
        return _places({self._launched[rank]: sign for rank, sign in signs.items()})

    def _stalled(self, what: str, rank: int | None) -> None:
        error = StallError(what)
        error.rank = None if rank is None else self._launched[rank]
        self.fail(error)


_watches: list[Watch] = []  # that this process is in, the innermost last


def _places(signs: Mapping[int, Sign]) -> str:
    """How many ranks are at each place, for a message."""
    ranks: dict[str, list[int]] = {}
    for rank, sign in signs.items():
        ranks.setdefault(sign.place, []).append(rank)
    texts = [f"{len(members)} {place}, as rank {members[0]}" for place, members in ranks.items()]
    return "; ".join(texts[:PLACES])

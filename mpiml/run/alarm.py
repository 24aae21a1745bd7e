"""Ends this process when it gets stuck where nobody watches it: before the watch begins, and after it has ended.

A thread says what has happened. Where Python itself is stuck, in MPI_Init for one, a timer in C ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from mpiml.errors import RunError, StallError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., None])

FLAG = "--stall-timeout"
DEFAULT = 600.0  # seconds
LEAST = 8.0  # seconds: less is a slow start, and no stall
LOOKS = 5  # in that time, whether anything has been read or written
QUIET = 64 << 10  # bytes between two looks that are nothing
GRACE = 2.0  # seconds from the line to the end by the timer in C
STDERR = 2
TURN = 0.3  # seconds from rank to rank: who speaks first ends the job, and so the others
TURNS = 5
RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")  # where launchers say a process's rank


class Alarm:
    """Goes off `seconds` after the last sign of progress, a call of `during`, or much that is read or written. It is
    stopped by `off`.

    Attributes:
        fail: what is called with a StallError then; by default it is written to standard error, and the process ends.
        waits: whether this rank waits for others, as far as is known: then they may speak first.
    """

    def __init__(self, program: str, seconds: float):
        self.program, self.seconds = program, max(seconds, LEAST) if seconds else math.inf
        self.fail: Callable[[RunError], None] = self._end
        self.waits: Callable[[], bool] = lambda: False
        self._doing, self._due, self._moved = "", math.inf, 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def during(self, doing: str) -> None:
        """Say what comes next, for which there is the whole time again."""
        if math.isinf(self.seconds):
            return
        with self._changed:
            self._doing, self._moved = doing, bytes_moved()
            self._put_off()
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name="mpiml-alarm", daemon=True)
            self._thread.start()

    def _put_off(self) -> None:
        self._due = time.monotonic() + self.seconds
        end_in(self.seconds + TURN * TURNS + GRACE)

    def off(self) -> None:
        """Wait for nothing, until something comes next."""
        with self._changed:
            self._due = math.inf
            faulthandler.cancel_dump_traceback_later()
            self._changed.notify()

    def _wait(self) -> None:
        rank = rank_by_launcher()
        with self._changed:
            while self._due > time.monotonic():
                self._sleep_until_due()
                pause = TURN * min(rank, TURNS) + (self.seconds / LOOKS + TURN if self.waits() else 0.0)
                end_in(pause + GRACE)
                self._changed.wait(pause)
            doing = self._doing
        error = StallError(
            f"rank {rank} has been {doing} for {self.seconds:g} s: it hangs, or another rank that it waits for"
        )
        error.rank = rank
        self.fail(error)

    def _sleep_until_due(self) -> None:
        while (left := self._due - time.monotonic()) > 0:
            self._changed.wait(None if math.isinf(left) else min(left, self.seconds / LOOKS))
            before, self._moved = self._moved, bytes_moved()
            if self._moved - before > QUIET and not math.isinf(self._due):
                self._put_off()

    def _end(self, error: RunError) -> None:
        within(GRACE / 2, lambda: os.write(STDERR, f"{self.program}: {error}\n".encode()), 0)
        faulthandler.dump_traceback(STDERR)
        os._exit(error.exit_code)


_alarm: Alarm | None = None  # there is one timer in a process


def start(program: str, arguments: Sequence[str]) -> None:
    """Have an alarm in this process from now on; how long it waits is looked for on the command line."""
    global _alarm  # noqa: PLW0603
    _alarm = Alarm(program, length(arguments))


def during(doing: str) -> None:
    """Say, to the alarm of this process if it has one, what comes next."""
    if _alarm:
        _alarm.during(doing)


def off() -> None:
    """Put the alarm off, if this process has one: others watch over what comes next."""
    if _alarm:
        _alarm.off()


def tell(fail: Callable[[RunError], None] | None = None, waits: Callable[[], bool] = lambda: False) -> None:
    """Give the alarm of this process, if it has one, its `fail` and `waits`; without arguments, those by default."""
    if _alarm:
        _alarm.fail, _alarm.waits = fail or _alarm._end, waits


def end_for_certain(seconds: float) -> None:
    """Have the timer in C end this process, and let nothing put it off any more."""
    global _alarm  # noqa: PLW0603
    _alarm = None
    end_in(seconds)


def last() -> None:
    """For the very end, when Python's threads and the timer in C are gone: the kernel's SIGALRM ends the process."""
    if _alarm and not math.isinf(_alarm.seconds):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, _alarm.seconds)


def shown_as(text: str) -> Callable[[F], F]:
    """For a function in which Python may be stuck: all that the timer in C can show is where, so its name says why."""

    def renamed(function: F) -> F:
        function.__code__ = function.__code__.replace(co_name=text)
        return function

    return renamed


def length(arguments: Sequence[str]) -> float:
    """What --stall-timeout asks for, if that can be read; 0 is for ever."""
    seconds = DEFAULT
    for argument, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, rest = argument.partition("=")
        if name == FLAG:
            with contextlib.suppress(ValueError):
                seconds = float(rest if equals else value)
    return seconds if 0 <= seconds < threading.TIMEOUT_MAX else DEFAULT


def rank_by_launcher(environment: Mapping[str, str] = os.environ) -> int:
    """The rank of this process as the launcher counts: known before MPI is up, and without it."""
    for name in RANKS:
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return 0


def bytes_moved() -> int:
    """What this process has read and written: a long write of a large file, say, is progress too."""
    try:
        with open("/proc/self/io") as file:
            fields = file.read().split()
        return sum(int(fields[index]) for index in (1, 3, 9))  # rchar, wchar, read_bytes
    except (OSError, IndexError, ValueError):
        return 0


def end_in(seconds: float) -> None:
    """Have a timer in C end this process if it has not ended by itself by then."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)


def within(seconds: float, action: Callable[[], T], otherwise: T) -> T:
    """What `action` returns; or `otherwise`, if it raises, or takes longer and is left to a thread of its own."""
    results: list[T] = []

    def act() -> None:
        with contextlib.suppress(BaseException):
            results.append(action())

    thread = threading.Thread(target=act, daemon=True)
    try:
        thread.start()
        thread.join(seconds)
    except RuntimeError:  # there can be no more threads
        act()
    return results[0] if results else otherwise

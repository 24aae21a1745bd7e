"""Ends this process if it hangs while no watch (mpiml.run.watch) runs: before it starts and after it has ended.

A thread reports the reason. Where Python itself is stuck, as in MPI_Init, a timer in C ends the process.
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
from mpiml.run.streams import ERROR, original

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., None])

FLAG = "--stall-timeout"
DEFAULT = 600.0  # seconds
LEAST = 8.0  # seconds: a slow start may take as long
LOOKS = 5  # in the alarm's time: whether bytes have been read or written
QUIET = 64 << 10  # bytes between two looks that do not count as progress
ABORT_GRACE = 10.0  # seconds for a report and the end of the job, before a timer in C ends the process
GRACE = 2.0  # seconds from the thread's report to the end by the timer in C
TURN = 0.3  # seconds between ranks' reports: the first ends the job, and so the others
TURNS = 5
# Variables by which launchers give a process its rank.
RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


class Alarm:
    """Goes off `seconds` after the last sign of progress: a call of `during`, or many bytes read or written.

    Attributes:
        fail: called with a StallError when it goes off; by default it prints the error and ends the process.
        waits: whether this rank is known to wait for others: then it lets them report first.
    """

    def __init__(self, program: str, seconds: float):
        self.set(program, seconds)
        self.fail: Callable[[RunError], None] = self._end
        self.waits: Callable[[], bool] = lambda: False
        self._doing, self._due, self._moved = "", math.inf, 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def set(self, program: str, seconds: float) -> None:
        """Set the name for messages, and the seconds from the next call of `during` on; 0 means never."""
        self.program, self.seconds = program, max(seconds, LEAST) if seconds else math.inf

    def during(self, doing: str) -> None:
        """Say what this process does next; the time starts again."""
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

    def off(self) -> bool:
        """Stop the alarm until `during` is called. Returns whether it was on."""
        with self._changed:
            on, self._due = not math.isinf(self._due), math.inf
            faulthandler.cancel_dump_traceback_later()
            self._changed.notify()
        return on

    def _wait(self) -> None:
        rank = rank_by_launcher()
        with self._changed:
            while self._due > time.monotonic():
                self._sleep_until_due()
                if math.isinf(self._due):
                    self._thread = None
                    return
                waits = self.waits()
                pause = TURN * min(rank, TURNS) + (self.seconds / LOOKS + TURN if waits else 0.0)
                end_in(pause + GRACE)
                self._changed.wait(pause)
            doing = self._doing
        why = "another has not come" if waits else "it hangs, or another rank that it waits for"
        error = StallError(f"rank {rank} has been {doing} for {self.seconds:g} s: {why}")
        error.rank = rank
        self.fail(error)

    def _sleep_until_due(self) -> None:
        """Return when time is up, or the alarm is off."""
        while 0 < (left := self._due - time.monotonic()) < math.inf:
            self._changed.wait(min(left, self.seconds / LOOKS))
            before, self._moved = self._moved, bytes_moved()
            if self._moved - before > QUIET and not math.isinf(self._due):
                self._put_off()

    def _end(self, error: RunError) -> None:
        within(GRACE / 2, lambda: os.write(original(ERROR), f"{self.program}: {error}\n".encode()), 0)
        faulthandler.dump_traceback(original(ERROR))
        os._exit(error.exit_code)


_alarm: Alarm | None = None  # there is one timer in a process


def start(program: str, arguments: Sequence[str]) -> None:
    """Give this process an alarm, whose time is that of --stall-timeout on the command line. If it has one,
    that is set."""
    global _alarm  # noqa: PLW0603
    seconds = timeout_in(arguments)
    if _alarm:
        _alarm.off()
        _alarm.set(program, seconds)
    else:
        _alarm = Alarm(program, seconds)


def during(doing: str) -> None:
    """Alarm.during of this process' alarm, if it has one."""
    if _alarm:
        _alarm.during(doing)


def off() -> bool:
    """Alarm.off of this process' alarm, if it has one: a watch runs from here on, or long work is expected. Returns
    whether it was on."""
    return _alarm.off() if _alarm else False


def report_to(
    fail: Callable[[RunError], None] | None, waits: Callable[[], bool]
) -> tuple[Callable[[RunError], None] | None, Callable[[], bool]]:
    """Set `fail` and `waits` of this process' alarm, if it has one; None: its own. Returns what they were."""
    if not _alarm:
        return None, lambda: False
    before = _alarm.fail, _alarm.waits
    _alarm.fail, _alarm.waits = fail or _alarm._end, waits
    return before


def end_for_certain(seconds: float) -> None:
    """Let the timer in C end this process after some seconds, whatever is called afterwards."""
    global _alarm  # noqa: PLW0603
    _alarm = None
    end_in(seconds)


def guard_exit() -> None:
    """At the very end, when Python's threads and the timer in C are gone: let the kernel's SIGALRM end the process."""
    if _alarm and not math.isinf(_alarm.seconds):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, _alarm.seconds)


def shown_as(text: str) -> Callable[[F], F]:
    """Rename a function in which Python may be stuck: the timer in C shows only its name, which has to say why."""

    def renamed(function: F) -> F:
        function.__code__ = function.__code__.replace(co_name=text)
        return function

    return renamed


def timeout_in(arguments: Sequence[str]) -> float:
    """The seconds of --stall-timeout, or the default if they are missing or wrong; 0 means no alarm."""
    seconds = DEFAULT
    for argument, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, rest = argument.partition("=")
        if name == FLAG:
            with contextlib.suppress(ValueError):
                seconds = float(rest if equals else value)
    return seconds if 0 <= seconds < threading.TIMEOUT_MAX else DEFAULT


def rank_by_launcher(environment: Mapping[str, str] = os.environ) -> int:
    """The rank that the launcher gave this process: known before MPI is up; 0 without a launcher."""
    for name in RANKS:
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return 0


def bytes_moved() -> int:
    """How many bytes this process has read and written: a long write of a large file is progress, too."""
    try:
        with open("/proc/self/io") as file:
            fields = file.read().split()
        return sum(int(fields[index]) for index in (1, 3, 9))  # rchar, wchar, read_bytes
    except (OSError, IndexError, ValueError):
        return 0


def end_in(seconds: float) -> None:
    """Let a timer in C end this process if it still runs after some seconds."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=original(ERROR))


def within(seconds: float, action: Callable[[], T], otherwise: T) -> T:
    """The result of `action`, or `otherwise` if it raises or takes longer than `seconds` (its thread then goes on)."""
    results: list[T] = []

    def act() -> None:
        with contextlib.suppress(BaseException):
            results.append(action())

    thread = threading.Thread(target=act, daemon=True)
    try:
        thread.start()
        thread.join(seconds)
    except RuntimeError:  # the system allows no more threads
        act()
    return results[0] if results else otherwise

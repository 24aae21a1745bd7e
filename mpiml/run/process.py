"""Settings of this process: BLAS threads, memory allocation, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from mpiml.run.deadline import Deadline

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
SOON = 1.0  # seconds by which ranks' clocks may differ
DOUBLE = 1.0  # seconds within which two Ctrl-C count as one
ACTION = 256  # bytes, enough for a `struct sigaction`
KEEP = 1 << 30  # bytes up to which freed memory stays with the process
MMAP_MOST = 1 << 25  # bytes: the largest M_MMAP_THRESHOLD that glibc accepts up to version 2.34


def prepare_process(threads: int) -> None:
    """Give BLAS `threads` threads and the pages of its work area, and let new arrays reuse freed memory, without page
    faults."""
    thread_pools().limit(limits=threads)
    touch_work_area(threads)
    reuse_memory()


def reuse_memory() -> None:
    """Let new arrays reuse freed memory, without page faults."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc: only slower
    keep_freed_memory(mallopt)


def keep_freed_memory(mallopt: Callable[[int, int], int]) -> None:
    """Let malloc keep freed memory, as far as `mallopt` allows: it returns 0 for a value that it refuses.

    Both thresholds are set or none: setting one ends the C library's own adaptation of both.
    """
    if any(mallopt(M_MMAP_THRESHOLD, size) for size in (KEEP, MMAP_MOST)):
        mallopt(M_TRIM_THRESHOLD, KEEP)


def touch_work_area(threads: int) -> None:
    """Make BLAS write to its work area, which takes about a millisecond.

    OpenBLAS prefetches from that area. On some processors this is slow while pages are missing, and only a product of
    this size brings them in: before it, smaller ones ran at a third of their speed. Each thread has an area, with
    places for each precision.
    """
    import numpy as np

    rows = 64 * min(threads, os.cpu_count() or 1)
    for dtype in (np.float32, np.float64):
        np.ones((rows, 256), dtype) @ np.ones((256, 384), dtype)


@functools.cache
def thread_pools() -> ThreadpoolController:
    """The thread pools of the libraries that NumPy has loaded; finding them takes some milliseconds."""
    import numpy  # noqa: F401 (loads them)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def ignore_signals() -> None:
    """Ignore SIGNALS in a process that is ending: Python removes its handlers before it exits."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Whether SIGUSR1, SIGTERM or Ctrl-C, within a block, has asked this process to save and stop, or its time is up.

    A second signal changes nothing, except for Ctrl-C: it interrupts at once, but only after a while, because one
    keystroke may arrive twice, from the terminal and from the launcher. A block within another one starts with the
    outer one's request, and passes its own on as it ends. Afterwards signals do what they did before, C libraries'
    handlers included: MPICH has one for SIGUSR1, which Python does not know of.

    `grace`: seconds for which a round may go on once it is asked to stop.
    """

    def __init__(self, deadline: Deadline | None = None, grace: float = 0.0) -> None:
        self.deadline, self.grace = deadline or Deadline(), grace
        self.others: Callable[[], bool] = lambda: False  # whether another rank reports a stop request
        self.broken: Callable[[], bool] = lambda: False  # whether the run must end with an error, which nobody asks for
        self.asked = False  # by a signal
        self._asked_at = 0.0
        self._before: dict[int, tuple[Any, Any]] = {}  # of each signal that is taken: Python's and C's handlers
        self._outer: StopRequest | None = None

    def __enter__(self) -> StopRequest:
        self.take(SIGNALS)
        return self

    def take(self, numbers: Iterable[int]) -> None:
        """Let these signals, too, be requests until the block ends."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in numbers:
            action, handler = action_of(number), signal.signal(number, self._ask)
            outer = getattr(handler, "__self__", None)
            if outer is not self:
                self._before.setdefault(number, (handler, action))
                self._outer = outer if isinstance(outer, StopRequest) else self._outer
        if self._outer and self._outer.asked and not self.asked:
            self.asked, self._asked_at = True, self._outer._asked_at

    def now(self) -> bool:
        """Whether to stop after the current step. To be called once in each step."""
        late = self.deadline.near()
        return self._asked_anywhere() or late

    def at_once(self) -> bool:
        """Whether to break off even an evaluation, which can be repeated."""
        return self._asked_anywhere() or self.deadline.up()

    def _asked_anywhere(self) -> bool:
        if not self.asked and self.others():  # this rank's own Ctrl-C may be on its way
            self.asked, self._asked_at = True, time.monotonic()
        return self.asked or self.broken()

    def within(self, rest: float, step: float, copies: int) -> bool:
        """Whether to stop within a round, of which `rest` seconds are left, before another step of `step` seconds, and
        save `copies` of the model."""
        return (rest > self.grace and self._asked_anywhere()) or self.deadline.up(step, copies)

    def reason(self) -> str:
        """Why the ranks have agreed to stop, as far as this rank knows."""
        late = self.deadline.passed(SOON) or self.deadline.up(SOON)
        return "time is nearly up" if late and not self.asked else "asked to stop by a signal"

    def _ask(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.asked and time.monotonic() - self._asked_at > DOUBLE:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._asked_at = True, time.monotonic()

    def __exit__(self, *error: object) -> None:
        for number, (handler, action) in self._before.items():
            if signal.getsignal(number) == self._ask:  # else a program has one of its own by now
                signal.signal(number, handler)
                action_of(number, action)
        self._before.clear()
        if self._outer and self.asked:
            self._outer.asked, self._outer._asked_at = True, self._asked_at


def action_of(number: int, new: Any = None) -> Any:
    """What the C library does at a signal, a `struct sigaction`; set to `new` unless that is None."""
    action = ctypes.create_string_buffer(ACTION)
    with contextlib.suppress(OSError, AttributeError):  # no C library that has it
        if ctypes.CDLL(None).sigaction(number, new, action) == 0:
            return action
    return None

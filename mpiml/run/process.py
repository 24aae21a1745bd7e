"""Settings of this process: BLAS threads, memory allocation, and the signals that ask it to stop."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mpiml.run.deadline import Deadline

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
SOON = 1.0  # seconds by which ranks' clocks may differ
DOUBLE = 1.0  # seconds within which two Ctrl-C are one
KEEP = 1 << 30  # bytes up to which freed memory stays with the process
MMAP_MOST = 1 << 25  # bytes: the largest M_MMAP_THRESHOLD that glibc takes up to version 2.34


def prepare_process(threads: int) -> None:
    """Give BLAS `threads` threads and the pages of its work area, and make fresh arrays reuse freed memory instead of
    faulting in new pages."""
    thread_pools().limit(limits=threads)
    touch_work_area(threads)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc: a matter of speed only
    keep_freed_memory(mallopt)


def keep_freed_memory(mallopt: Callable[[int, int], int]) -> None:
    """Let malloc keep what is freed, as far as its `mallopt`, which returns 0 for a value that it refuses, lets it.

    One threshold alone would do harm: either ends the C library's own adaptation of both.
    """
    if any(mallopt(M_MMAP_THRESHOLD, size) for size in (KEEP, MMAP_MOST)):
        mallopt(M_TRIM_THRESHOLD, KEEP)


def touch_work_area(threads: int) -> None:
    """Make BLAS write to its work area, which takes about a millisecond.

    OpenBLAS reads ahead of what it copies there. On some processors that is slow while pages are missing, and only a
    product of this size brings them in: until then smaller ones ran at a third of their speed. Each thread has an
    area, and numbers of each precision have their places in it.
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
    """Let none of the signals end a process that has nothing left to stop: Python gives up its handlers before it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Whether SIGUSR1, SIGTERM or Ctrl-C has asked this process, in a block, to save and stop, or its time is up.

    Twice is as good as once, but for Ctrl-C: a second one, after a while, interrupts at once. After a while because
    one keystroke may come twice, from the terminal and from the launcher. A block inside another's takes over what
    that one was asked.
    """

    def __init__(self, deadline: Deadline | None = None) -> None:
        self.deadline = deadline or Deadline()
        self.others: Callable[[], bool] = lambda: False  # whether another rank passes on a stop request
        self.asked = False  # by a signal
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
            outer = getattr(self._before[signal.SIGTERM], "__self__", None)
            self.asked = self.asked or (isinstance(outer, StopRequest) and outer.asked)
        return self

    def now(self) -> bool:
        """Whether to stop after the step that is under way. Is asked once in each step."""
        late = self.deadline.near()
        return self._asked_here_or_there() or late

    def at_once(self) -> bool:
        """Whether to leave even an evaluation that is under way, for it can be made again."""
        return self._asked_here_or_there() or self.deadline.up()

    def _asked_here_or_there(self) -> bool:
        self.asked = self.asked or self.others()
        return self.asked

    def reason(self) -> str:
        """Why the ranks have agreed to stop, as far as this one knows."""
        late = self.deadline.passed(SOON) or self.deadline.up(SOON)
        return "time is nearly up" if late and not self.asked else "asked to stop by a signal"

    def _ask(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.asked and time.monotonic() - self._asked_at > DOUBLE:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._asked_at = True, time.monotonic()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""Settings of this process: BLAS threads, memory allocation, and the signals that ask it to stop."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
DOUBLE = 1.0  # seconds within which two Ctrl-C are one
KEEP = 1 << 30  # bytes up to which freed memory stays with the process


def prepare_process(threads: int) -> None:
    """Give BLAS `threads` threads, and make fresh arrays reuse freed memory instead of faulting in new pages."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc: a matter of speed only
    mallopt(M_MMAP_THRESHOLD, KEEP)
    mallopt(M_TRIM_THRESHOLD, KEEP)


class StopRequest:
    """Whether SIGUSR1, SIGTERM or Ctrl-C has asked this process, in a block, to save and stop.

    Twice is as good as once, but for Ctrl-C: a second one, after a while, interrupts at once. After a while because
    one keystroke may come twice, from the terminal and from the launcher.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def _ask(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.asked and time.monotonic() - self._asked_at > DOUBLE:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._asked_at = True, time.monotonic()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

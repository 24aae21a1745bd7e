"""Settings of this process: BLAS threads, memory allocation, and the signals that ask it to stop."""

import ctypes
import signal
import threading

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
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
    """Whether SIGUSR1 or SIGTERM has asked this process to save and stop; asking twice is asking once."""

    def __init__(self) -> None:
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGUSR1, signal.SIGTERM)}

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True

    def close(self) -> None:
        """Treat the signals as before."""
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)

"""Work in a thread, which makes no MPI calls, while this process goes on."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

from mpiml.clock import Clock
from mpiml.errors import OutputError, RunError
from mpiml.run.verified import Progress

NICE = 19  # the most: a thread gets one or two per cent of a core that another keeps busy
NAP = 1e-3  # seconds


class Work(threading.Thread):
    """Does `action(progress)`, which calls `progress` after each part.

    Args:
        yields: whether it leaves cores to others that need them, as work does that nobody waits for.

    Attributes:
        error: that ended it, if any: a RunError; an OSError becomes an OutputError that begins with `what`.
    """

    def __init__(self, action: Callable[[Progress], object], what: str, yields: bool):
        super().__init__(name="mpiml-save", daemon=True)  # a disk that does not answer must not keep a process
        self.error: RunError | None = None
        self._began, self._ended = time.monotonic(), 0.0
        self._action, self._what, self._yields, self._moves = action, what, yields, 0
        self.start()

    def run(self) -> None:
        if self._yields:
            with contextlib.suppress(OSError, AttributeError):  # of a thread, in Linux
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            self._action(self._moved)
        except RunError as error:
            self.error = error
        except BaseException as error:  # whatever ended it, its work is not done
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            self.error = OutputError(f"{self._what}: {reason}")
        self._ended = time.monotonic()

    def _moved(self) -> None:
        self._moves += 1

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return not self.is_alive()

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return (self._ended or time.monotonic()) - self._began

    def finish(self, clock: Clock) -> None:
        """Return when it has ended; meanwhile its progress is that of `clock`."""
        while self.is_alive():
            before = self._moves
            time.sleep(NAP)
            if self._moves != before:
                clock.progress()

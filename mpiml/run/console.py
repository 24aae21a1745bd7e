"""The terminal: a progress bar or lines, and whether there is one. Under a launcher a rank's output is a pipe, so the
launcher's own output is examined.
"""

import contextlib
import os
import sys
import time
from typing import TextIO

from mpiml.run.node import launchers

CONSOLE_PAUSE = 5.0  # seconds between lines where there is no terminal


def width() -> int | None:
    """Columns of the terminal that standard error ends at, or None if it ends in a file or a pipe."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: it is closed, and therefore None
        return os.get_terminal_size(sys.stderr.fileno()).columns
    for launcher in launchers():
        with contextlib.suppress(OSError):
            output = os.open(f"/proc/{launcher}/fd/2", os.O_WRONLY | os.O_NOCTTY)  # which does not truncate a file
            try:
                return os.get_terminal_size(output).columns
            finally:
                os.close(output)
    return None


def say(text: str, stream: TextIO | None) -> None:
    """Print a line. A stream that cannot be written to does not end a run."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # full, without a reader; closed; None
        stream.write(f"{text}\n")  # type: ignore[union-attr]
        stream.flush()  # type: ignore[union-attr]


class Console:
    """A progress bar of steps `first` to `last` on a terminal; elsewhere a line every few seconds."""

    def __init__(self, first: int, last: int):
        self._last_line = time.monotonic()
        self._bar = None
        columns = width()
        if columns and last >= first:
            from tqdm import tqdm  # it stops drawing when its terminal is closed

            self._bar = tqdm(
                initial=first - 1, total=last, ncols=columns - 1, unit="step", ascii=True, leave=False, mininterval=0.2
            )

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.clear()
            say(text, sys.stderr)  # as the bar: lines on two streams may arrive out of order
            self._bar.refresh()
        else:
            say(text, sys.stdout)
        self._last_line = time.monotonic()

    def now_and_then(self, text: str) -> None:
        """Print a line if there is no bar, and the last line was some seconds ago."""
        if self._bar is None and time.monotonic() - self._last_line > CONSOLE_PAUSE:
            self.line(text)

    def progress(self, step: int, text: str | None = None) -> None:
        """Move the bar to a step, unless it is further, and show a text beside it."""
        if self._bar is not None:
            if text is not None:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(max(step - self._bar.n, 0))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

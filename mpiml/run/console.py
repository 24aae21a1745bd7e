"""Whether somebody watches, and what is said there.

Under a launcher a rank's output is a pipe, so the launcher's own is looked at.
"""

import contextlib
import os
import sys
import time
from typing import TextIO

from mpiml.run.processes import launchers

CONSOLE_PAUSE = 5.0  # seconds between lines where nobody sits at a terminal


def width() -> int | None:
    """Columns of the terminal that standard error ends at, or None if it ends in a file or a pipe."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: it is closed, and therefore None
        return os.get_terminal_size(sys.stderr.fileno()).columns
    for launcher in launchers():
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{launcher}/fd/2", "wb", buffering=0, opener=_no_terminal_of_ours) as terminal,
        ):
            return os.get_terminal_size(terminal.fileno()).columns
    return None


def _no_terminal_of_ours(path: str, flags: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_NOCTTY)  # and not cut short, if it is a file


def say(text: str, stream: TextIO | None) -> None:
    """A line on standard output or error, where somebody reads it: that nobody can is no reason to end a run."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # full, without a reader; closed; None
        stream.write(f"{text}\n")  # type: ignore[union-attr]
        stream.flush()  # type: ignore[union-attr]


class Console:
    """A progress bar where somebody watches, a line now and then where nobody does."""

    def __init__(self, first: int, last: int):
        self._last_line = time.monotonic()
        self._bar = None
        columns = width()
        if columns and last >= first:
            from tqdm import tqdm  # whose bar draws no more when its terminal is closed

            self._bar = tqdm(
                initial=first - 1, total=last, ncols=columns - 1, unit="step", ascii=True, leave=False, mininterval=0.2
            )

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
            say(text, sys.stderr)  # where the bar is: two streams would arrive out of order
            self._bar.refresh()
        else:
            say(text, sys.stdout)
        self._last_line = time.monotonic()

    def now_and_then(self, text: str) -> None:
        if self._bar is None and time.monotonic() - self._last_line > CONSOLE_PAUSE:
            self.line(text)

    def progress(self, step: int, loss: float, speed: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} samples/s", refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

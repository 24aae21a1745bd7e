"""The terminal: a progress bar or lines, and whether there is one. Under a launcher a rank's output is a pipe, so the
launcher's own output is examined.
"""

import contextlib
import os
import sys
import time
from datetime import timedelta
from typing import Any, NamedTuple, TextIO

from mpiml.run.node import launchers
from mpiml.run.streams import diverted, original

CONSOLE_PAUSE = 5.0  # seconds between lines where there is no terminal
LEFT = len(" 10:00:00 left")  # columns for the time that is left, at most
BAR = len(" [###]")  # for the bar, at least


class Shown(NamedTuple):
    """What is shown beside the bar. The score is the last that was measured, None before; `speed` is in samples/s."""

    epoch: int
    loss: float
    metric: str
    score: float | None
    speed: float

    def texts(self) -> list[str]:
        """It as text, from the longest, which says all, to the shortest."""
        from mpiml.command import count  # on one rank

        loss, speed = f" epoch {self.epoch} loss {self.loss:.4g}", f" {count(self.speed).replace(' ', '')}"
        score = "" if self.score is None else f" {self.metric} {self.score:.3f}"
        ways = (score + speed + " samples/s", score + speed + "/s", score, "")
        return [loss + way for way in ways]


def width() -> int | None:
    """Columns of the terminal that standard error ends at, or None if it ends in a file or a pipe."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: it is closed, and therefore None
        return os.get_terminal_size(original(sys.stderr.fileno())).columns
    for launcher in launchers():
        with contextlib.suppress(OSError):
            output = os.open(f"/proc/{launcher}/fd/2", os.O_WRONLY | os.O_NOCTTY)  # which does not truncate a file
            try:
                return os.get_terminal_size(output).columns
            finally:
                os.close(output)
    return None


def say(text: str, stream: TextIO | None) -> None:
    """Print a line, also where the stream led before it was diverted. A stream that cannot be written to does not end a
    run."""
    if (before := diverted(stream)) is not None:
        with contextlib.suppress(OSError):
            os.write(before, f"{text}\n".encode(errors="backslashreplace"))
    with contextlib.suppress(OSError, ValueError, AttributeError):  # full, without a reader; closed; None
        stream.write(f"{text}\n")  # type: ignore[union-attr]
        stream.flush()  # type: ignore[union-attr]


def _undiverted() -> TextIO:
    """Standard error, as it was before it was diverted."""
    before = diverted(sys.stderr)
    return sys.stderr if before is None else open(before, "w", closefd=False)


class Console:
    """A progress bar of steps `first` to `last` on a terminal; elsewhere a line every few seconds."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last
        self._began = self._last_line = time.monotonic()
        self._bar: Any = None
        columns = width()
        if columns and last >= first:
            from tqdm import tqdm  # it stops drawing when its terminal is closed

            self._bar = tqdm(
                file=_undiverted(),
                initial=first - 1,
                total=last,
                ncols=columns - 1,
                ascii=" #",
                leave=False,
                mininterval=0.2,
                smoothing=0.1,
            )
            self._draw("")

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.clear()
            say(text, sys.stderr)  # as the bar: lines on two streams may arrive out of order
            self._bar.refresh()
        else:
            say(text, sys.stdout)
        self._last_line = time.monotonic()

    def now_and_then(self, step: int, text: str) -> None:
        """Print a line of a step, and how much time is left, if there is no bar and the last line was some seconds
        ago."""
        now = time.monotonic()
        if self._bar is None and now - self._last_line > CONSOLE_PAUSE:
            each = (now - self._began) / max(step - self.first + 1, 1)
            self.line(f"{text}  {timedelta(seconds=round(each * (self.last - step)))} left")

    def progress(self, step: int, shown: Shown | None = None) -> None:
        """Move the bar to a step, unless it is further, and show how it went beside it."""
        if self._bar is not None:
            if shown is not None:
                room = self._bar.ncols - len(f"step {self.last}/{self.last}") - LEFT
                self._draw(next((text for text in shown.texts() if len(text) <= room), ""), room)
            self._bar.update(max(step - self._bar.n, 0))

    def _draw(self, text: str, room: int = 1 << 30) -> None:
        """Let the bar be drawn with a text, if `room` columns are enough for both."""
        bar = " [{bar}]" if len(text) + BAR <= room else ""
        said = text.replace("{", "{{").replace("}", "}}")
        self._bar.bar_format = f"step {{n_fmt}}/{{total_fmt}}{bar}{said} {{remaining}} left"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

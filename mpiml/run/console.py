"""Whether somebody watches, and what is said there.

Under a launcher a rank's output is a pipe, so the launcher's own is looked at.
"""

import contextlib
import os
import sys
from typing import TextIO

from mpiml.run.processes import launchers


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

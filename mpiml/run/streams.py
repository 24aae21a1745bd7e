"""Standard output and error of this process, and where they led before they were diverted into a file."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Iterator

OUTPUT, ERROR = 1, 2  # file descriptors, of Python's streams and of C's
_original: dict[int, int] = {}  # copies of these, while they are diverted


def original(descriptor: int) -> int:
    """What standard output or error (OUTPUT, ERROR) is, or was before it was diverted: it leads to the launcher."""
    return _original.get(descriptor, descriptor)


def diverted(stream: object) -> int | None:
    """What a stream was before it was diverted; None unless it is standard output or error, and is diverted."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file; closed; None
        return _original.get(stream.fileno())  # type: ignore[attr-defined]
    return None


class Diverted:
    """From its making until `close`, what this process prints goes to a file: Python, C, and programs that
    this process starts. Each line of Python's and of C's is there as soon as it ends, should the job be killed.

    `file`: a descriptor of the file, which now belongs to this object.
    """

    def __init__(self, file: int):
        self._lines = [stream for stream in _streams() if not stream.line_buffering]
        for stream in self._lines:
            stream.reconfigure(line_buffering=True)
        with contextlib.suppress(OSError, AttributeError, ValueError):  # no C library that has it
            library = ctypes.CDLL(None)
            library.setlinebuf(ctypes.c_void_p.in_dll(library, "stdout"))
        _flush()  # after which glibc heeds it
        for descriptor in (OUTPUT, ERROR):
            _original[descriptor] = os.dup(descriptor)
            os.dup2(file, descriptor)
        os.close(file)

    def close(self) -> None:
        """Let output go where it went before."""
        _flush()
        for descriptor in (OUTPUT, ERROR):
            before = _original.pop(descriptor)
            os.dup2(before, descriptor)
            os.close(before)
        for stream in self._lines:
            stream.reconfigure(line_buffering=False)


def _streams() -> Iterator[io.TextIOWrapper]:
    """Python's own standard streams, where they are such that C's output goes to the same place."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a program's own; closed; None
            if isinstance(stream, io.TextIOWrapper) and stream.fileno() in (OUTPUT, ERROR):
                yield stream


def _flush() -> None:
    """Write what Python's streams and C's still hold."""
    for stream in _streams():
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    with contextlib.suppress(OSError, AttributeError):  # no C library that has it
        ctypes.CDLL(None).fflush(None)

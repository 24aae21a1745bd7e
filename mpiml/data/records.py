"""The records of a CSV file, each a line or several: how many there are, and where in the file they are."""

from __future__ import annotations

import itertools
import re
from bisect import bisect
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from mpiml.data.sources import Indices, runs
from mpiml.errors import DataError

DECIMAL_COMMA = re.compile(rb'[;"\n] *[+-]?\d*,\d+(?:[eE][+-]?\d+)? *["\r\n;]')  # a number between semicolons
CHUNK = 1 << 20  # bytes that are counted at once
NEAR = 4096  # records that are rather read than skipped
Record = tuple[int, bytes]  # the number of its first line, and its bytes


class Mark(NamedTuple):
    """Where a record begins: its number, from 0, its line, from 1, and its byte in the file."""

    record: int
    line: int
    byte: int


class Records:
    """The records of a file, of which the first is the header; reads it once.

    Attributes:
        count: how many there are.
        multiline: whether some go over several lines.
        decimal: the decimal mark of numbers: "," only where semicolons separate them.

    Raises DataError if a quotation mark is not closed.
    """

    def __init__(self, path: Path, separator: str):
        self.path, self.decimal, self.multiline = path, ".", False
        self._marks = [Mark(0, 1, 0)]  # of a record in each chunk of the file
        self.count = self._counted(separator)

    def _counted(self, separator: str) -> int:
        records = lines = quotes = read = 0
        begins, tail = 1, b""  # the line in which the last record begins, and the end of what has been read
        with open(self.path, "rb") as file:
            while chunk := file.read(CHUNK):
                tail = (tail + chunk[-4096:])[-4096:]
                if separator == ";" and self.decimal == "." and b"," in chunk and DECIMAL_COMMA.search(chunk):
                    self.decimal = ","
                if not quotes % 2 and b'"' not in chunk:
                    ends, last = chunk.count(b"\n"), chunk.rfind(b"\n")
                    lines, records, begins = lines + ends, records + ends, lines + ends + 1
                else:
                    raw = np.frombuffer(chunk, np.uint8)
                    marks, breaks = np.flatnonzero(raw == ord('"')), np.flatnonzero(raw == ord("\n"))
                    outside = np.flatnonzero((np.searchsorted(marks, breaks) + quotes) % 2 == 0)
                    self.multiline |= len(outside) < len(breaks)
                    last = -1
                    if len(outside):
                        begins, last = lines + int(outside[-1]) + 2, int(breaks[outside[-1]])
                    lines, records, quotes = lines + len(breaks), records + len(outside), quotes + len(marks)
                if last >= 0:
                    self._marks.append(Mark(records, begins, read + last + 1))
                read += len(chunk)
        if quotes % 2:
            raise DataError(f"{self.path}, line {begins}: a quotation mark is not closed")
        ended = tail[len(tail.rstrip(b"\r\n")) :].count(b"\n")
        return records + 1 - ended  # without empty lines at the end

    def all(self, file: IO[bytes], line: int = 1) -> Iterator[Record]:
        """All records of the open file from where it stands: the beginning of a record, which is line `line`."""
        return _joined(file, line) if self.multiline else enumerate(file, line)

    def of(self, rows: Indices) -> Iterator[Record]:
        """The records of these rows, in rising order; row 0 is the record after the header."""
        with open(self.path, "rb") as file:
            records, at = self.all(file), 0
            for first, last in runs(rows):
                start, stop = int(rows[first]) + 1, int(rows[last - 1]) + 2
                if start - at > NEAR:
                    mark = self._marks[bisect(self._marks, start, key=lambda mark: mark.record) - 1]
                    if mark.record > at:
                        file.seek(mark.byte)
                        records, at = self.all(file, mark.line), mark.record
                deque(itertools.islice(records, start - at), maxlen=0)
                yield from itertools.islice(records, stop - start)
                at = stop


def _joined(file: IO[bytes], first: int) -> Iterator[Record]:
    """Like enumerate(file, first), with lines put together that a field in quotes joins."""
    lines: list[bytes] = []
    quotes = 0
    for number, line in enumerate(file, first):
        lines.append(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0:
            yield number - len(lines) + 1, b"".join(lines)
            lines.clear()

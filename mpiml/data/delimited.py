"""CSV files: numbers under a header, separated by commas, semicolons, tabs or |, which the first lines show."""

from __future__ import annotations

import csv
import itertools
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpiml.data.records import Records
from mpiml.data.sources import Indices, Rows, file_size
from mpiml.data.tables import GAPS, Table, dropping
from mpiml.errors import DataError

if TYPE_CHECKING:
    from mpiml.data.formats import Options

SEPARATORS = (",", ";", "\t", "|")
INTEGER = re.compile(r"[+-]*[0-9]+")
SHOWN = 10  # columns in a message
LINES = 4096  # lines that are parsed at once
SAMPLE = 1 << 18  # bytes at a file's beginning that show how it is written
Line = tuple[int, str]  # the number of a record's first line, and its text


class CSV(Table):
    """A file of numbers, whose first line names the columns.

    The first label says what all are: an integer, classes; another number, values; else words. A field in quotes may
    hold separators and line ends. Where semicolons separate, numbers may have decimal commas.
    """

    def __init__(self, path: Path, options: Options):
        self.path = path
        if not file_size(path):
            raise DataError(f"{path} is empty")
        sample = self._sample()
        self.separator = max(SEPARATORS, key=lambda separator: _fit(sample, separator))
        self.records = Records(path, self.separator)
        self.decimal = self.records.decimal
        with open(path, "rb") as file:
            header, first = [*itertools.islice(self._texts(self.records.all(file)), 2), (2, "")][:2]
        if "\r" in header[1].strip():
            raise DataError(f"{path}: its lines end in a carriage return alone; save it with line feeds")
        names = [" ".join(name.strip().splitlines()) for name in self._fields(header)]
        super().__init__(path, names, options)
        self.length = self.records.count - 1
        rows = [row for row in _rows(sample, self.separator)[1:] if len(row) == len(self.names)]
        seen = "".join(row[position] for row in rows for position in self.inputs)
        if "." in seen and "," not in seen:  # the number with a comma is in a column that is left out
            self.decimal = "."
        self.x_dtype, self.y_dtype = np.dtype(np.float64), self._kind_of_labels(first, options.tests_only)
        self._check_inputs(rows)
        self._fast = self.decimal == "."

    def number(self, words: Sequence[str]) -> None:
        super().number(words)
        self.y_dtype = np.dtype(np.int64)

    def fractions(self) -> bool:
        numbers = self.label is not None and not self.worded
        return numbers and not all(map(INTEGER.fullmatch, self.distinct()))

    def distinct(self) -> set[str]:
        position = self.label or 0
        with open(self.path, "rb") as file:
            rows = csv.reader(
                (text for _, text in self._texts(self.records.all(file))),
                delimiter=self.separator,
                skipinitialspace=True,
            )
            try:
                next(rows)
                fields = {row[position] for row in rows if len(row) > position}
            except csv.Error as error:
                raise DataError(f"{self.path}, row {rows.line_num - 2}: {error}") from None
        return {word for word in map(str.strip, fields) if word.casefold() not in GAPS}

    def read(self, rows: Indices) -> tuple[Rows, Rows]:
        x, y = np.empty((len(rows), len(self.inputs))), np.zeros(len(rows), self.y_dtype)
        lines, done = self._texts(self.records.of(rows)), 0
        while batch := list(itertools.islice(lines, LINES)):
            last = done + len(batch)
            x[done:last], labels = self._parse(batch)
            if self.y_dtype.kind == "i":
                self._check_whole(labels, batch)
            y[done:last] = labels
            done = last
        if done < len(rows):
            raise DataError(f"{self.path}: ends too early, before row {rows[done]}")
        return x, y

    def _sample(self) -> list[str]:
        """The first lines, at least two if there are as many."""
        lines: list[str] = []
        with open(self.path, "rb") as file:
            for line in file:
                lines.append(line.decode(errors="replace").removeprefix("\ufeff"))
                if len(lines) > 2 and file.tell() > SAMPLE:
                    break
        return lines

    def _texts(self, records: Iterable[tuple[int, bytes]]) -> Iterator[Line]:
        return ((number, self._text(record, number)) for number, record in records)

    def _parse(self, batch: Sequence[Line]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Inputs and labels of these records. Where NumPy cannot read them at once, goes field by field, to put NaN
        for gaps, or to say what is wrong in which line."""
        if self._fast:
            try:
                values = self._numbers([line for _, line in batch])
                if values.shape == (len(batch), len(self.names)):
                    x, y = values[:, self.inputs], np.zeros(len(batch)) if self.label is None else values[:, self.label]
                    if not np.isnan(y).any() and (self.gaps or not np.isnan(x).any()):
                        return x, y
            except (ValueError, KeyError):
                self._fast = False  # there will be more gaps
        values = np.array([self._values(line) for line in batch])
        return values[:, :-1], values[:, -1]

    def _numbers(self, lines: Sequence[str]) -> NDArray[np.float64]:
        if not all(line.strip() for line in lines):  # loadtxt would skip empty lines
            raise ValueError("a line is empty")
        unused = set(range(len(self.names))) - {*self.inputs, self.label}
        converters: dict[int | str, Callable[[str], float]] = dict.fromkeys(unused, lambda text: 0.0)
        if self.label is not None and self.number_of:
            converters[self.label] = lambda text: float(self.number_of[text.strip()])
        how: Any = {"comments": None, "delimiter": self.separator, "quotechar": '"', "encoding": "utf-8"}
        return np.asarray(np.loadtxt(lines, np.float64, converters=converters or None, ndmin=2, **how))

    def _values(self, line: Line) -> list[float]:
        """The inputs in a record, then its label, 0 if the table has none."""
        fields = self._fields(line)
        if len(fields) != len(self.names):
            lines = line[1].strip().count("\n")
            more = f" (with quoted line ends it goes on to line {line[0] + lines})" if lines else ""
            problem = f"has {len(fields)} values, but there are {len(self.names)} columns{more}"
            raise DataError(f"{self._where(line)}: {problem}")
        x = [self._value(line, position, fields[position]) for position in self.inputs]
        return [*x, 0.0 if self.label is None else self._label(line, fields[self.label])]

    def _value(self, line: Line, position: int, text: str) -> float:
        number = self._number(text)
        if number is None:
            held = f"column {self.names[position]} holds {reprlib.repr(text)}, which is not a number"
            comma = " (numbers in this file have decimal commas)" if self.decimal == "," else ""
            raise DataError(
                f"{self._where(line)}: {held}{comma}; {dropping([self.names[position]])}, or correct the line"
            )
        if number != number and not self.gaps:
            raise self.no_value(self._where(line), position, text.strip())
        return number

    def _label(self, line: Line, text: str) -> float:
        assert self.label is not None, "only a table that has labels is asked for them"
        if text.strip().casefold() in GAPS:
            raise self.no_value(self._where(line), self.label, text.strip())
        if self.number_of:
            return self.numbered(text.strip(), self._where(line))
        number = self._number(text)
        if number is None:
            raise DataError(
                f"{self._where(line)}: the label {reprlib.repr(text)} is not a number, but the first is; if labels are "
                "words, begin with a row whose label is one"
            )
        return number

    def _number(self, text: str) -> float | None:
        """The number that is written in a field, NaN for a gap; None for anything else."""
        text = text.strip()
        if text.casefold() in GAPS:
            return float("nan")
        if self.decimal == ",":
            if "." in text:
                return None
            text = text.replace(",", ".")
        try:
            return None if "_" in text else float(text)
        except ValueError:
            return None

    def _kind_of_labels(self, first: Line, tests_only: bool) -> np.dtype:
        """The dtype of the labels; finds out from the first whether they are words."""
        fields = self._fields(first)
        text = fields[self.label].strip() if self.label is not None and len(fields) > self.label else ""
        self.worded, self.begins_with_label = self._number(text) is None, text.casefold() not in GAPS
        if self.label is not None and len(fields) == len(self.names) and not (self.begins_with_label or tests_only):
            raise self.no_value(self._where(first), self.label, text)
        return np.dtype(np.int64 if self.worded or INTEGER.fullmatch(text) else np.float64)

    def _check_inputs(self, rows: Sequence[Sequence[str]]) -> None:
        """Raise DataError that names all inputs which hold words in more than a tenth of the first rows."""
        words = {}
        for position in self.inputs:
            wrong = [row[position] for row in rows if self._number(row[position]) is None]
            if 10 * len(wrong) > sum(row[position].strip().casefold() not in GAPS for row in rows):
                words[self.names[position]] = reprlib.repr(wrong[0])
        if words:
            held = ", ".join(f"column {name} holds {word}" for name, word in [*words.items()][:SHOWN])
            held += f", and so do {len(words) - SHOWN} others" if len(words) > SHOWN else ""
            raise DataError(f"{self.path}: {held}; inputs must be numbers: {dropping(list(words))}, or convert them")

    def _check_whole(self, labels: NDArray[np.float64], batch: Sequence[Line]) -> None:
        wrong = np.flatnonzero(labels != np.floor(labels))
        if len(wrong):
            where, label = f"{self.path}, line {batch[wrong[0]][0]}", f"{labels[wrong[0]]:g}"
            number = f"the label {label} is not an integer, but the label in line 2 is"
            raise DataError(f"{where}: {number}; for a regression, give --loss mse")

    def _fields(self, line: Line) -> list[str]:
        if not line[1].strip():
            return []
        try:
            return next(csv.reader([line[1].strip("\r\n")], delimiter=self.separator, skipinitialspace=True), [])
        except csv.Error as error:
            raise DataError(f"{self._where(line)}: {error}") from None

    def _text(self, line: bytes, number: int) -> str:
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            code = "utf16" if line.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
            how = f"convert it, as with iconv -f {code} -t utf8"
            raise DataError(f"{self._where((number, ''))}: not in UTF-8: {error.reason}; {how}") from None
        return text.removeprefix("\ufeff") if number == 1 else text

    def _where(self, line: Line) -> str:
        return f"{self.path}, line {line[0]}"


def _rows(lines: Sequence[str], separator: str) -> list[list[str]]:
    """The fields of lines at a file's beginning; nothing if they are not of such a file."""
    try:
        return list(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    except csv.Error:
        return []


def _fit(lines: Sequence[str], separator: str) -> tuple[bool, int, int]:
    """How well a separator fits the first lines: whether it divides the header, how many lines agree, into how many."""
    rows = _rows(lines[:20], separator) or [[]]
    columns = len(rows[0])
    return columns > 1, sum(len(row) == columns for row in rows), columns

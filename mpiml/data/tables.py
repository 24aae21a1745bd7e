"""Tables, CSV or Parquet: one column holds the labels, all others the inputs. A rank keeps its own rows in memory."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.data.sources import HeldSource, Indices, Rows, extra, file_size, runs
from mpiml.errors import DataError

LINES = 4096  # lines of a CSV file that are parsed at once


class Table(ABC):
    """A table of `length` rows with `inputs` input columns of dtype `x_dtype`, and labels of dtype `y_dtype`."""

    names: list[str]
    length: int
    inputs: int
    x_dtype: np.dtype
    y_dtype: np.dtype

    def __init__(self, path: Path):
        self.path, self._rows, self._left = path, np.empty(0, np.int64), dict[int, Rows]()

    @abstractmethod
    def read(self, rows: Indices) -> tuple[Rows, Rows]:
        """Inputs (rows, inputs) and labels (rows,) of these rows, whose numbers are in rising order."""

    def sources(self) -> tuple[HeldSource, HeldSource]:
        """The inputs and the labels as two sources. Rows that both hold are read once."""
        x = TableSource(self, 0, f"{self.path}: inputs", (self.length, self.inputs), self.x_dtype)
        return x, TableSource(self, 1, f"{self.path}: labels", (self.length,), self.y_dtype)

    def take(self, half: int, rows: Indices) -> Rows:
        """Inputs (half 0) or labels (half 1) of these rows. Keeps the other half until it is taken too."""
        if half not in self._left or not np.array_equal(rows, self._rows):
            self._rows, self._left = np.array(rows), dict(enumerate(self.read(rows)))
        return self._left.pop(half)


class TableSource(HeldSource):
    """One half of a table: its inputs, or its labels."""

    def __init__(self, table: Table, half: int, name: str, shape: tuple[int, ...], dtype: np.dtype):
        super().__init__(name, shape, dtype)
        self.table, self.half = table, half

    def read(self, rows: Indices) -> Rows:
        return self.table.take(self.half, rows)


def label_column(names: Sequence[str], label: str | None, path: Path) -> int:
    """The position of the column of labels. Raises DataError if `label` is None or does not name exactly one column."""
    if label is None:
        raise DataError(f"{path}: name the column of labels with --label; there are {', '.join(names)}")
    if names.count(label) != 1:
        what = f"has {names.count(label)} columns" if label in names else "has no column"
        raise DataError(f"{path} {what} {label}; there are {', '.join(names)}")
    if len(names) < 2:
        raise DataError(f"{path} has labels and nothing else")
    return names.index(label)


class CSV(Table):
    """A file of comma-separated numbers, whose first line names the columns.

    If the first label is written as an integer, labels are classes, and all must be integers.
    """

    def __init__(self, path: Path, label: str | None):
        import csv

        super().__init__(path)
        if not file_size(path):
            raise DataError(f"{path} is empty")
        with open(path, "rb") as file:
            names = next(csv.reader([self._text(file.readline(), 1).removeprefix("\ufeff").strip()]), [])
            first, ended = file.readline(), True
            self.length = 1 if first else 0
            while chunk := file.read(1 << 20):
                self.length += chunk.count(b"\n")
                ended = chunk.endswith(b"\n")
        self.length += not ended
        self.names = [name.strip() for name in names]
        self.label = label_column(self.names, label, path)
        self.inputs = len(self.names) - 1
        self.x_dtype = np.dtype(np.float64)
        self.y_dtype = np.dtype(np.int64 if self._whole(first) else np.float64)

    def read(self, rows: Indices) -> tuple[Rows, Rows]:
        x, y = np.empty((len(rows), self.inputs)), np.empty(len(rows), self.y_dtype)
        lines, done = self._lines(rows), 0
        while batch := list(itertools.islice(lines, LINES)):
            values = self._parse(batch)
            last = done + len(values)
            labels = values[:, self.label]
            if self.y_dtype.kind == "i":
                self._check_whole(labels, batch)
            y[done:last] = labels
            x[done:last] = np.delete(values, self.label, axis=1)
            done = last
        if done < len(rows):
            raise DataError(f"{self.path}: ends too early, before row {rows[done]}")
        return x, y

    def _lines(self, rows: Indices) -> Iterator[tuple[int, str]]:
        """(number of the line, the line) of these rows; row 0 is in line 2."""
        with open(self.path, "rb") as file:
            file.readline()
            at = 0
            for first, last in runs(rows):
                start, stop = int(rows[first]), int(rows[last - 1]) + 1
                deque(itertools.islice(file, start - at), maxlen=0)
                for row, line in enumerate(itertools.islice(file, stop - start), start):
                    yield row + 2, self._text(line, row + 2)
                at = stop

    def _parse(self, batch: Sequence[tuple[int, str]]) -> NDArray[np.float64]:
        """The numbers in these lines. If that fails, parses line by line to name the line in the error."""
        try:
            values = self._numbers([line for _, line in batch])
            if values.shape == (len(batch), len(self.names)):
                return values
        except ValueError:
            pass
        for number, line in batch:
            fields = len(line.split(",")) if line.strip() else 0
            if fields != len(self.names):
                problem = f"has {fields} values, but there are {len(self.names)} columns"
                raise DataError(f"{self.path}, line {number}: {problem}")
            try:
                self._numbers([line])
            except ValueError as error:
                raise DataError(f"{self.path}, line {number}: {str(error).partition(' at row')[0]}") from None
        raise DataError(f"{self.path}: lines {batch[0][0]} to {batch[-1][0]} are not a table of numbers")

    def _numbers(self, lines: Sequence[str]) -> NDArray[np.float64]:
        if not all(line.strip() for line in lines):  # loadtxt would skip empty lines
            raise ValueError("a line is empty")
        return np.loadtxt(lines, np.float64, comments=None, delimiter=",", quotechar='"', ndmin=2)

    def _check_whole(self, labels: NDArray[np.float64], batch: Sequence[tuple[int, str]]) -> None:
        wrong = np.flatnonzero(labels != np.floor(labels))  # also true for nan
        if len(wrong):
            raise DataError(
                f"{self.path}, line {batch[wrong[0]][0]}: the label {labels[wrong[0]]:g} is not an integer, but the "
                "label in line 2 is; for a regression, write the label in line 2 with a decimal point"
            )

    def _whole(self, line: bytes) -> bool:
        """Whether the label in this line is written as an integer."""
        import csv

        fields = next(csv.reader([self._text(line, 2)]), [])
        text = fields[self.label].strip() if len(fields) > self.label else ""
        return text.lstrip("+-").isdigit()

    def _text(self, line: bytes, number: int) -> str:
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}, line {number}: not in UTF-8: {error.reason}") from None


class Parquet(Table):
    """A Parquet file of numbers; reads only the row groups that contain wanted rows."""

    def __init__(self, path: Path, label: str | None):
        parquet = extra("pyarrow.parquet", "parquet", f"--data {path}")
        super().__init__(path)
        file_size(path)
        try:
            self.file: Any = parquet.ParquetFile(path, memory_map=True)
            schema = self.file.schema_arrow
        except Exception as error:  # pyarrow's are of many classes
            raise DataError(f"cannot read {path}: {error}") from None
        self.length, self.names = self.file.metadata.num_rows, list(schema.names)
        dtypes = [self._dtype(*column) for column in zip(schema, schema.empty_table().columns, strict=True)]
        self.label = label_column(self.names, label, path)
        self.inputs = len(self.names) - 1
        self.y_dtype = dtypes.pop(self.label)
        self.x_dtype = np.result_type(*dtypes)

    def read(self, rows: Indices) -> tuple[Rows, Rows]:
        x, y = np.empty((len(rows), self.inputs), self.x_dtype), np.empty(len(rows), self.y_dtype)
        start = 0
        for group in range(self.file.num_row_groups):
            stop = start + self.file.metadata.row_group(group).num_rows
            first, last = np.searchsorted(rows, [start, stop])
            if first < last:
                columns = self._columns(group, start)
                wanted = rows[first:last] - start
                y[first:last] = columns.pop(self.label)[wanted]
                for position, column in enumerate(columns):
                    x[first:last, position] = column[wanted]
            start = stop
        return x, y

    def _columns(self, group: int, start: int) -> list[Rows]:
        try:
            table = self.file.read_row_group(group)
        except Exception as error:
            raise DataError(f"{self.path}: damaged in row group {group}, from row {start}: {error}") from None
        for name, column in zip(self.names, table.columns, strict=True):
            if column.null_count:
                row = start + int(np.argmax(column.is_null().to_numpy()))
                raise DataError(f"{self.path}: {name} has {column.null_count} rows without a value, first row {row}")
        return [column.to_numpy() for column in table.columns]

    def _dtype(self, field: Any, empty: Any) -> np.dtype:
        try:
            dtype: np.dtype = empty.to_numpy().dtype  # field.type.to_pandas_dtype() may need pandas
        except (NotImplementedError, TypeError):
            dtype = np.dtype(object)
        if dtype.kind not in "biuf":
            raise DataError(f"{self.path}: column {field.name} is {field.type}; real numbers are needed")
        return dtype

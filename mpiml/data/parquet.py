"""Parquet files. Every rank opens the file on its own and reads only the row groups that contain its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpiml.data.sources import Indices, Rows, extra, file_size
from mpiml.data.tables import GAPS, Table, dropping
from mpiml.errors import DataError

WORDS = ("string", "large_string", "string_view", "bool", "null")  # types of labels that are words


class Parquet(Table):
    """A Parquet file of numbers. The column of labels may hold words, as text, categories or true and false."""

    def __init__(self, path: Path, options: Any):
        parquet = extra("pyarrow.parquet", "parquet", f"--data {path}")
        file_size(path)
        try:
            self.file: Any = parquet.ParquetFile(path, memory_map=True)
            schema = self.file.schema_arrow
        except Exception as error:  # pyarrow's are of many classes
            raise DataError(f"cannot read {path}: {error}") from None
        super().__init__(path, schema.names, options)
        self.length = self.file.metadata.num_rows
        dtypes = [_dtype(column) for column in schema.empty_table().columns]
        types = [str(field.type) for field in schema]
        self._check_inputs(dtypes, types)
        self.x_dtype = np.result_type(*(dtypes[position] for position in self.inputs))
        if self.gaps and self.x_dtype.kind != "f":
            self.x_dtype = np.dtype(np.float64)
        self.y_dtype = np.dtype(np.int64)
        if self.label is not None:
            self.worded = str(_plain(schema.field(self.label).type)) in WORDS
            # True and false stand for 1 and 0 in any case.
            self.y_dtype = np.dtype(np.int64) if dtypes[self.label].kind == "O" else dtypes[self.label]
            if dtypes[self.label].kind not in "biuf" and not self.worded:
                raise DataError(
                    f"{path}: labels in column {self.names[self.label]} are {types[self.label]}; "
                    "numbers or words are needed"
                )

    def number(self, words: Sequence[str]) -> None:
        super().number(words)
        if self.y_dtype.kind != "b":
            self.y_dtype = np.dtype(np.int64)

    def distinct(self) -> set[str]:
        groups = range(self.file.num_row_groups)
        words = {word for group in groups for word in _encoded(self._columns(group, [self.label or 0])[0])[0]}
        return {word for word in words if word is not None and word.strip().casefold() not in GAPS}

    def read(self, rows: Indices) -> tuple[Rows, Rows]:
        x, y = np.empty((len(rows), len(self.inputs)), self.x_dtype), np.zeros(len(rows), self.y_dtype)
        labels = [] if self.label is None else [self.label]
        start = 0
        for group in range(self.file.num_row_groups):
            stop = start + self.file.metadata.row_group(group).num_rows
            first, last = np.searchsorted(rows, [start, stop])
            if first < last:
                wanted = rows[first:last] - start
                columns = self._columns(group, [*self.inputs, *labels], start)
                for at, (position, column) in enumerate(zip(self.inputs, columns, strict=False)):
                    x[first:last, at] = self._values(column, position, start)[wanted]
                if labels:
                    y[first:last] = self._labels(columns[-1], start)[wanted]
            start = stop
        return x, y

    def _columns(self, group: int, positions: Sequence[int], start: int = 0) -> list[Any]:
        """These columns of a row group; the others are not read, if names tell them apart."""
        names = [self.names[position] for position in positions]
        apart = len(names) < len(self.names) and len({name.partition(".")[0] for name in self.names}) == len(self.names)
        try:
            table = self.file.read_row_group(group, columns=names if apart else None)
        except Exception as error:
            raise DataError(f"{self.path}: damaged in row group {group}, from row {start}: {error}") from None
        return [table[name] for name in names] if apart else [table.columns[position] for position in positions]

    def _values(self, column: Any, position: int, start: int) -> Rows:
        """The numbers in a column, NaN where there is none."""
        if column.null_count:
            self._check_gaps(column.is_null().to_numpy(), position, start)
            column = (column.cast("uint8") if str(column.type) == "bool" else column).cast("float64", safe=False)
        values = np.asarray(column.to_numpy())
        if values.dtype.kind == "f":
            self._check_gaps(np.isnan(values), position, start)
        return values

    def _labels(self, column: Any, start: int) -> Rows:
        assert self.label is not None, "only a table that has labels is asked for them"
        if not self.number_of:
            return self._values(column, self.label, start)
        words, indices = _encoded(column)
        missing = np.array([word is None or word.strip().casefold() in GAPS for word in words], bool)
        self._check_gaps(missing[indices], self.label, start)
        rows = start + np.unique(indices, return_index=True)[1]
        known = zip(map(str, words), rows.tolist(), strict=True)
        numbers = np.array([self.numbered(word, f"{self.path}, row {row}") for word, row in known], np.int64)
        return np.asarray(numbers[indices])

    def _check_gaps(self, missing: Rows, position: int, start: int) -> None:
        if missing.any() and not (self.gaps and position != self.label):
            raise self.no_value(f"{self.path}, row {start + int(np.argmax(missing))}", position)

    def _check_inputs(self, dtypes: Sequence[np.dtype], types: Sequence[str]) -> None:
        wrong = [position for position in self.inputs if dtypes[position].kind not in "biuf"]
        if wrong:
            names = [self.names[position] for position in wrong]
            held = ", ".join(f"column {self.names[position]} is {types[position]}" for position in wrong)
            raise DataError(f"{self.path}: {held}; inputs must be numbers: {dropping(names)}, or convert them")


def _plain(kind: Any) -> Any:
    """A column's type, or that of its categories."""
    return kind.value_type if str(kind).startswith("dictionary") else kind


def _encoded(column: Any) -> tuple[list[str | None], Rows]:
    """The distinct words in a column, None for no word, and for each row the position of its own."""
    coded = column.cast(_plain(column.type)).cast("string").dictionary_encode("encode").combine_chunks()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy()


def _dtype(empty: Any) -> np.dtype:
    """The dtype of the values in a column, object if they are not numbers."""
    try:
        dtype: np.dtype = empty.to_numpy().dtype  # field.type.to_pandas_dtype() may need pandas
    except (NotImplementedError, TypeError):
        return np.dtype(object)
    return dtype

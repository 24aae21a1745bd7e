"""Tables, CSV or Parquet: one column holds the labels, all others the inputs. A rank keeps its own rows in memory."""

from __future__ import annotations

import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpiml.data.sources import HeldSource, Indices, Rows
from mpiml.errors import DataError
from mpiml.flags import quoted

if TYPE_CHECKING:
    from mpiml.data.formats import Options

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
GAPS = frozenset(("", "na", "n/a", "nan", "null", "?"))  # in small letters, what stands where there is no value


class Table(ABC):
    """A table of `length` rows, with inputs of dtype `x_dtype` and labels of dtype `y_dtype`.

    Attributes:
        names: of all columns.
        inputs: the positions of the columns of inputs, in the order in which they are wanted.
        label: the position of the column of labels; None if a table that is only to be predicted has none.
        worded: whether labels are words: classes, numbered by `words` once these are known.
        begins_with_label: whether the first row is known to have a label.
    """

    length: int
    x_dtype: np.dtype
    y_dtype: np.dtype
    worded: bool = False
    begins_with_label: bool = False

    def __init__(self, path: Path, names: Sequence[str], options: Options):
        self.path, self._rows, self._left = path, np.empty(0, np.int64), dict[int, Rows]()
        self.names = [name or f"column {position}" for position, name in enumerate(names, 1)]
        self.gaps, self.tests_only = options.gaps, options.tests_only
        self.label = self._label_column(options)
        self.inputs = self._input_columns(options)
        self.number_of: dict[str, int] = {}

    @abstractmethod
    def read(self, rows: Indices) -> tuple[Rows, Rows]:
        """Inputs (rows, inputs) and labels (rows,) of these rows, whose numbers are in rising order."""

    @abstractmethod
    def distinct(self) -> set[str]:
        """The words in the column of labels. Reads it from start to end."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return tuple(self.names[position] for position in self.inputs)

    def number(self, words: Sequence[str]) -> None:
        """Let each of these words stand for its position: labels are classes, and no other word may occur."""
        self.number_of = {word: position for position, word in enumerate(words)}

    def fractions(self) -> bool:
        """Whether labels are numbers of which some are not integers."""
        return self.label is not None and not self.worded and self.y_dtype.kind == "f"

    def without_labels(self) -> None:
        """Leave out the column of labels if no row has one, as in a table whose rows are only to be predicted."""
        if self.label is not None and not self.begins_with_label and not self.distinct():
            self.label, self.worded = None, False

    def sources(self) -> tuple[HeldSource, HeldSource]:
        """The inputs and the labels as two sources. Rows that both hold are read once."""
        x = TableSource(self, 0, f"{self.path}: inputs", (self.length, len(self.inputs)), self.x_dtype)
        return x, TableSource(self, 1, f"{self.path}: labels", (self.length,), self.y_dtype)

    def take(self, half: int, rows: Indices) -> Rows:
        """Inputs (half 0) or labels (half 1) of these rows. Keeps the other half until it is taken too."""
        if half not in self._left or not np.array_equal(rows, self._rows):
            self._rows, self._left = np.array(rows), dict(enumerate(self.read(rows)))
        return self._left.pop(half)

    def _label_column(self, options: Options) -> int | None:
        label, there = options.label, f"there are {', '.join(self.names)}"
        numbers = sum(bool(NUMBER.fullmatch(name)) for name in self.names)
        if 2 * numbers > len(self.names) or "".join(self.names[:1]).startswith(("#", "sep=")):
            there += " (the first line must name the columns)"
        if label is None:
            raise DataError(f"{self.path}: name the column of labels with --label; {there}")
        if self.names.count(label) == 1:
            return self.names.index(label)
        if label in self.names:
            raise DataError(f"{self.path} has {self.names.count(label)} columns {label}; {there}")
        if options.columns:  # it may have inputs alone
            return None
        hint = "" if len(self.names) > 1 else " (columns are separated by one of: comma, semicolon, tab, |)"
        raise DataError(f"{self.path} has no column {label}; {there}{hint}")

    def _input_columns(self, options: Options) -> list[int]:
        """The inputs: those named `options.columns` if that is known, else all that are not dropped."""
        left = [
            position
            for position, name in enumerate(self.names)
            if position != self.label and name not in options.drop_columns
        ]
        wanted = options.columns
        if wanted and [self.names[position] for position in left] != list(wanted):
            if missing := [name for name in wanted if name not in self.names]:
                raise DataError(f"{self.path} has no column {', '.join(missing)}; there are {', '.join(self.names)}")
            if several := [name for name in wanted if self.names.count(name) > 1]:
                raise DataError(f"{self.path} has {self.names.count(several[0])} columns {several[0]}")
            return [self.names.index(name) for name in wanted]
        if not wanted:
            self._check_dropped(options)
        if not left:
            raise DataError(f"{self.path} has labels and nothing else")
        return left

    def _check_dropped(self, options: Options) -> None:
        if unknown := [name for name in options.drop_columns if name not in self.names]:
            there = ", ".join(self.names)
            raise DataError(f"{self.path}: --drop-columns {unknown[0]}: there is no such column; there are {there}")
        if options.label in options.drop_columns:
            raise DataError(f"{self.path}: --drop-columns {options.label}: that is the column of labels")

    def numbered(self, word: str, where: str) -> int:
        """The class that a word stands for. Raises DataError, which says `where`, for a word that is not known."""
        if word not in self.number_of:
            some = ", ".join(list(self.number_of)[:10])
            more = f" and {len(self.number_of) - 10} more" if len(self.number_of) > 10 else ""
            raise DataError(f"{where}: the label {word!r} is none of the words that are known: {some}{more}")
        return self.number_of[word]

    def no_value(self, where: str, position: int, text: str = "") -> DataError:
        """The error for a cell without a value."""
        held = f" ({text})" if text else ""
        if position == self.label:
            return DataError(f"{where}: there is no label in column {self.names[position]}{held}: leave such rows out")
        missing = f"{where}: there is no value in column {self.names[position]}{held}"
        if self.tests_only:
            return DataError(
                f"{missing}: the run was trained without --fill; fill the gap in the file, or leave the row out"
            )
        return DataError(
            f"{missing}: --fill mean puts the column's mean there, --fill 0 a number; or "
            f"{dropping([self.names[position]])}"
        )


class TableSource(HeldSource):
    """One half of a table: its inputs, or its labels."""

    def __init__(self, table: Table, half: int, name: str, shape: tuple[int, ...], dtype: np.dtype):
        super().__init__(name, shape, dtype)
        self.table, self.half = table, half

    def read(self, rows: Indices) -> Rows:
        return self.table.take(self.half, rows)


def dropping(names: Sequence[str]) -> str:
    """What leaves columns out, as the end of a message."""
    return (
        f"--drop-columns {shlex.quote(','.join(map(quoted, names)))} leaves {'it' if len(names) == 1 else 'them'} out"
    )


def check_same(tables: Sequence[Table], label: str | None) -> None:
    """Raise DataError if a table has no labels, or the one to test on columns that the other has not."""
    for table in tables:
        there = f"there are {', '.join(table.names)}"
        if table.label is None:
            hint = "" if table is tables[0] else "; without this file, --held-out takes rows to test on from the other"
            raise DataError(f"{table.path} has no column {label}; {there}{hint}")
        if more := [name for name in table.names if name not in tables[0].names]:
            raise DataError(f"{table.path} has columns that {tables[0].path} has not: {', '.join(more)}; {there}")


def as_values(tables: Sequence[Table]) -> None:
    """Let labels be floating-point numbers in all tables if they have to be in one."""
    if any(table.fractions() for table in tables):
        for table in tables:
            table.y_dtype = np.dtype(np.float64)


def number_words(tables: Sequence[Table], known: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Number the words in the labels of all tables alike: in sorted order, or as they are `known` already.

    Returns them, none if labels are numbers, and a note on those in the table to test on alone. Raises DataError if
    only some tables have words as labels.
    """
    tables = [table for table in tables if table.label is not None]
    worded = [table.path for table in tables if table.worded]
    if not (known or worded):
        return (), []
    if not known and len(worded) < len(tables):
        other = next(table.path for table in tables if not table.worded)
        raise DataError(f"labels are words in {worded[0]}, but numbers in {other}")
    distinct = [] if known else [table.distinct() for table in tables]
    words = tuple(known or sorted(set().union(*distinct)))
    if not words:
        raise DataError(f"{worded[0]}: there is no label in any row")
    for table in tables:
        table.number(words)
    if more := sorted(set().union(*distinct[1:]).difference(*distinct[:1])):
        return words, [f"{tables[1].path}: warning: {tables[0].path} has no such labels: {', '.join(more[:10])}"]
    return words, []

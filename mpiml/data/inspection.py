"""A look at every value of a rank's rows, before a run begins or when they are used, to find those that would spoil
it, with their rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpiml.clock import unwatched
from mpiml.data.dataset import Dataset
from mpiml.data.inputs import Inputs, inputs_of, spans
from mpiml.data.sources import Indices, Rows, Source, WrappedSource
from mpiml.data.subsets import origins
from mpiml.errors import DataError

SCAN = 1 << 24  # bytes of a source that are looked at at once


@dataclass
class Findings:
    """What a look at rows has shown."""

    lowest: tuple[float, int] = (math.inf, 0)  # (value, its first row), of integers that are not to be ignored
    highest: tuple[float, int] = (-math.inf, 0)
    bad_rows: int = 0  # rows that hold values that are not finite
    first_bad: int | None = None
    masked: int = 0  # integers that are to be ignored
    bounds: tuple[int, ...] = ()  # of each of several inputs the lowest and the highest integer, 0 included

    def __or__(self, other: Findings) -> Findings:
        first = [row for row in (self.first_bad, other.first_bad) if row is not None]
        return Findings(
            min(self.lowest, other.lowest),
            max(self.highest, other.highest, key=lambda extreme: (extreme[0], -extreme[1])),
            self.bad_rows + other.bad_rows,
            min(first, default=None),
            self.masked + other.masked,
            tuple(
                (max if position % 2 else min)(pair)
                for position, pair in enumerate(itertools.zip_longest(self.bounds, other.bounds, fillvalue=0))
            ),
        )


def inspect(
    source: Source,
    rows: Indices,
    ignore: int | None = None,
    progress: Callable[[], object] = unwatched,
    gaps: bool = False,
) -> Findings:
    """Look at the given rows of a source, in rising order, a few megabytes at a time.

    `ignore` is the label that means "no label"; `progress` is called after every few megabytes; with `gaps` NaN is a
    gap that will be filled.
    """
    findings, inputs = Findings(), inputs_of(source) or ()
    row_bytes = max(math.prod(source.shape) * source.dtype.itemsize, 1)
    chunk = max(SCAN // row_bytes, 1)
    for first in range(0, len(rows), chunk):
        numbers = rows[first : first + chunk]
        values = source.rows(numbers)
        findings |= _findings(source, values, numbers, ignore, gaps) | Findings(bounds=_bounds(values, inputs))
        progress()
    return findings


def _findings(source: Source, values: Rows, numbers: Indices, ignore: int | None, gaps: bool) -> Findings:
    """What these values show, of the rows with these numbers in a source."""
    if not values.size:
        return Findings()
    _, numbers = next(origins(source, numbers))  # those in the file, which a message is to name
    flat = values.reshape(len(numbers), -1)
    if values.dtype.kind == "f":
        bad = np.flatnonzero(np.isinf(flat).any(axis=1) if gaps else ~np.isfinite(flat).all(axis=1))
        return Findings(bad_rows=len(bad), first_bad=int(numbers[bad[0]])) if len(bad) else Findings()
    return _extremes(flat, numbers, ignore)


def _bounds(values: Rows, inputs: Inputs) -> tuple[int, ...]:
    columns = zip(spans(inputs), inputs, strict=True)
    parts = [values[:, span] if kind in "iu" else values[:, :0] for span, (_, _, kind) in columns]
    return tuple(int(bound) for part in parts for bound in (part.min(initial=0), part.max(initial=0)))


def _extremes(flat: Rows, numbers: Indices, ignore: int | None) -> Findings:
    counting = flat if ignore is None else flat[flat != ignore]
    masked = flat.size - counting.size
    if not counting.size:
        return Findings(masked=masked)
    lowest, highest = (
        (int(value), int(numbers[np.argmax(flat == value) // flat.shape[1]]))
        for value in (counting.min(), counting.max())
    )
    return Findings(lowest, highest, masked=masked)


def problem(data: Dataset, column: str, findings: Findings, classes: int | None = None) -> tuple[str, int] | None:
    """What is wrong with the values of column "x" or "y", and in which row; None if they can be used.

    `classes` is the number of classes, if the data set or a setting says it.
    """
    if findings.first_bad is not None:
        hint = " (--fill mean or --fill 0 replaces NaN, but not infinity)" if column == "x" else ""
        return f"{findings.bad_rows} rows hold values that are not finite{hint}, the first is row", findings.first_bad
    if not (data.language_model or (column == "y" and data.classification)):
        return None
    (lowest, low_row), (highest, high_row) = findings.lowest, findings.highest
    what = "label" if column == "y" else "token"
    if lowest < 0:
        hint = f": number the classes from 0, or if it means no label, train with --ignore {lowest:.0f}"
        return f"{what} {lowest:.0f} is below 0{hint if column == 'y' else ''}, in row", low_row
    if findings.masked and highest < 0:
        return "all labels are to be ignored, so nothing can be learned, from row", low_row
    if classes and highest >= classes:
        return f"{what} {highest:.0f} is not one of the {classes} classes 0 to {classes - 1}, in row", high_row
    if not classes and not data.language_model and highest >= len(data.train):
        return (
            f"label {highest:.0f} makes more classes than there are rows to train on, {len(data.train)} (for a "
            "regression, save the labels as floating-point numbers); it is in row",
            high_row,
        )
    return None


class CheckedSource(WrappedSource):
    """Column "x" or "y" of a data set, checked as it is read: `rows` raises DataError for values that `problem` names.

    `classes` is as `problem` has it, `ignore` and `gaps` as `inspect` does.
    """

    def __init__(
        self,
        source: Source,
        data: Dataset,
        column: str,
        classes: int | None,
        ignore: int | None = None,
        gaps: bool = False,
    ):
        super().__init__(source, source.dtype)
        self.data, self.column, self.classes, self.ignore, self.gaps = data, column, classes, ignore, gaps

    def rows(self, indices: Indices) -> Rows:
        values = self.source.rows(indices)
        if values.dtype.kind != "f" and self.column == "x" and not self.data.language_model:
            return values  # any integer will do
        findings = _findings(self.source, values, indices, self.ignore, self.gaps)
        findings.masked = 0  # a few rows may well have no label at all
        if wrong := problem(self.data, self.column, findings, self.classes):
            raise DataError(f"{self.name}: {wrong[0]} {wrong[1]}")
        return values

"""A look at every value of some rows before a run begins: what would spoil it is found, and named by its row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpiml.clock import unwatched
from mpiml.data.dataset import Dataset
from mpiml.data.sources import Indices, Rows, Source

SCAN = 1 << 24  # bytes of a source that are looked at together


@dataclass
class Findings:
    """What a look at some rows found: of integers the extremes, each with its first row, without those that are to be
    ignored, and how many these are; and rows that are not finite."""

    lowest: tuple[float, int] = (math.inf, 0)
    highest: tuple[float, int] = (-math.inf, 0)
    bad_rows: int = 0
    first_bad: int | None = None
    masked: int = 0

    def __or__(self, other: Findings) -> Findings:
        first = [row for row in (self.first_bad, other.first_bad) if row is not None]
        return Findings(
            min(self.lowest, other.lowest),
            max(self.highest, other.highest, key=lambda found: (found[0], -found[1])),
            self.bad_rows + other.bad_rows,
            min(first, default=None),
            self.masked + other.masked,
        )


def inspect(
    source: Source, rows: Indices, ignore: int | None = None, moved: Callable[[], object] = unwatched
) -> Findings:
    """Look at some rows of a source, numbers rising, a few megabytes at a time.

    `ignore` is a label that is none; `moved` is called after every few megabytes.
    """
    found = Findings()
    row_bytes = max(math.prod(source.shape) * source.dtype.itemsize, 1)
    chunk = max(SCAN // row_bytes, 1)
    for first in range(0, len(rows), chunk):
        numbers = rows[first : first + chunk]
        flat = source.rows(numbers).reshape(len(numbers), -1)
        if source.dtype.kind == "f":
            bad = np.flatnonzero(~np.isfinite(flat).all(axis=1))
            if len(bad):
                found |= Findings(bad_rows=len(bad), first_bad=int(numbers[bad[0]]))
        elif flat.size:
            found |= _extremes(flat, numbers, ignore)
        moved()
    return found


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


def problem(data: Dataset, column: str, found: Findings, classes: int | None = None) -> tuple[str, int] | None:
    """What is wrong with the values of column "x" or "y", and the row where; None if nothing is.

    `classes` is how many there are, if that has been said.
    """
    if found.first_bad is not None:
        return f"{found.bad_rows} rows hold values that are not finite, the first is row", found.first_bad
    if not (data.language_model or (column == "y" and data.classification)):
        return None
    (lowest, low_row), (highest, high_row) = found.lowest, found.highest
    what = "label" if column == "y" else "token"
    if lowest < 0:
        hint = f": number the classes from 0, or if it means no label, train with --ignore {lowest:.0f}"
        return f"{what} {lowest:.0f} is below 0{hint if column == 'y' else ''}, in row", low_row
    if found.masked and highest < 0:
        return "all labels are to be ignored, so none counts, from row", low_row
    if classes and highest >= classes:
        return f"{what} {highest:.0f} is not one of the {classes} classes 0 to {classes - 1}, in row", high_row
    if not classes and not data.language_model and highest >= len(data.train):
        return (
            f"label {highest:.0f} makes more classes than there are rows to train on, {len(data.train)} (for a "
            "regression, save the labels as floating-point numbers); it is in row",
            high_row,
        )
    return None

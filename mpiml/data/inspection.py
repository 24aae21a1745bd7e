"""A look at every value of a rank's rows, before a run begins or when they are used, to find those that would spoil
it, with their rows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mpiml.clock import unwatched
from mpiml.data.dataset import Dataset
from mpiml.data.inputs import Inputs, inputs_of, spans
from mpiml.data.sources import Indices, Rows, Source, WrappedSource
from mpiml.data.subsets import origins
from mpiml.errors import DataError

SCAN = 1 << 24  # bytes of a source that are looked at at once
VOID = 255  # the number that images of labels mostly have where there is no label
FEW = 100  # classes that floating-point labels may well be
GAP = 100  # numbers without a label below VOID, from which on it is taken for that


@dataclass
class Findings:
    """What a look at rows has shown; the extremes are of integers that are not to be ignored, and of single numbers."""

    lowest: tuple[float, int] = (math.inf, 0)  # (value, its first row)
    highest: tuple[float, int] = (-math.inf, 0)
    bad_rows: int = 0  # rows that hold values that are not finite
    first_bad: int | None = None
    masked: int = 0  # integers that are to be ignored
    below_void: float = field(default=-math.inf, compare=False)  # the highest but VOID
    binary: bool = field(default=True, compare=False)  # whether no floating-point number is other than 0 and 1
    whole: bool = field(default=True, compare=False)  # whether all single floating-point numbers are whole
    bounds: tuple[int, ...] = ()  # of each of several inputs the lowest and the highest integer, 0 included

    def __or__(self, other: Findings) -> Findings:
        first = [row for row in (self.first_bad, other.first_bad) if row is not None]
        return Findings(
            min(self.lowest, other.lowest),
            max(self.highest, other.highest, key=lambda extreme: (extreme[0], -extreme[1])),
            self.bad_rows + other.bad_rows,
            min(first, default=None),
            self.masked + other.masked,
            max(self.below_void, other.below_void),
            self.binary and other.binary,
            self.whole and other.whole,
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
        if len(bad):
            return Findings(bad_rows=len(bad), first_bad=int(numbers[bad[0]]))
        binary = all(bool(((part == 0) | (part == 1)).all()) for part in (flat[:1], flat))  # the first row mostly tells
        extremes = _extremes(flat, numbers, None) if values.ndim == 1 else Findings()
        return dataclasses.replace(extremes, binary=binary, whole=values.ndim == 1 and bool((flat % 1 == 0).all()))
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
        (value.item(), int(numbers[np.argmax(flat == value) // flat.shape[1]]))
        for value in (counting.min(), counting.max())
    )
    below = counting.max(where=counting != VOID, initial=0) if highest[0] == VOID else highest[0]
    return Findings(lowest, highest, masked=masked, below_void=float(below))


def problem(
    data: Dataset,
    column: str,
    findings: Findings,
    classes: int | None = None,
    doubt: bool = False,
    trained_on: bool = True,
) -> tuple[str, int] | None:
    """What is wrong with the values of column "x", "y" or "w", and in which row; None if they can be used.

    Args:
        classes: the number of classes, if the data set or a setting says it.
        doubt: whether these are labels to train on of which nobody has said whether one means no label.
        trained_on: whether these are data of a training, not others that a trained model is to score.
    """
    if findings.first_bad is not None:
        hint = " (training with --fill mean or --fill 0 replaces NaN, but not infinity)" if column == "x" else ""
        return f"{findings.bad_rows} rows hold values that are not finite{hint}, the first is row", findings.first_bad
    (lowest, low_row), (highest, high_row) = findings.lowest, findings.highest
    if column == "w":
        return ("all weights are 0, so that no row counts, from row", high_row) if highest == 0 else None
    if not (data.language_model or (column == "y" and data.classification)):
        return None
    what = "label" if column == "y" else "token"
    if lowest < 0:
        none = f"if it means no label, train with --ignore {lowest:.0f}"
        hint = f": number the classes from 0; if labels are values, train with --loss mse; {none}"
        if not trained_on:
            hint = ": if it means no label, leave the labels out, and --predictions predicts the rows"
        return f"{what} {lowest:.0f} is below 0{hint if column == 'y' else ''}, in row", low_row
    if findings.masked and highest < 0:
        return "all labels are to be ignored, so nothing can be learned, from row", low_row
    if classes and highest >= classes:
        return f"{what} {highest:.0f} is not one of the {classes} classes 0 to {classes - 1}, in row", high_row
    if column == "x" or classes:
        return None
    return _doubtful(data, findings) if doubt else _too_many(data, findings)


def taken_for_values(findings: Findings) -> str | None:
    """A note on floating-point labels that may well be classes; None if they do not look like it."""
    if findings.binary:
        several = "" if findings.whole else "; one-hot labels: store y.argmax(1)"
        return f"all labels are 0 or 1, but are taken for values; see --loss bce, or store integers as classes{several}"
    (lowest, _), (highest, _) = findings.lowest, findings.highest
    if not (findings.whole and lowest >= -1 and highest < FEW):
        return None
    return (
        f"all labels are whole numbers, {lowest:.0f} to {highest:.0f}, but are taken for values; integers are classes"
    )


def _too_many(data: Dataset, findings: Findings) -> tuple[str, int] | None:
    highest, row = findings.highest
    if data.language_model or highest < (labels := len(data.train) * data.row_labels):
        return None
    of = "rows" if labels == len(data.train) else "labels"
    return (
        f"label {highest:.0f} makes more classes than there are {of} to train on, {labels} (for a regression, give "
        "--loss mse); it is in row",
        row,
    )


def _doubtful(data: Dataset, findings: Findings) -> tuple[str, int] | None:
    """What is wrong with labels to train on, of which one may mean no label."""
    (lowest, row), (highest, high_row) = findings.lowest, findings.highest
    if findings.masked and lowest == highest:
        return (
            f"all labels are -1 or {highest:.0f}: if both are classes, number them 0 and 1; if -1 means no label, "
            f"train with --ignore -1; the first {highest:.0f} is in row",
            row,
        )
    if highest == VOID and findings.below_void < VOID - GAP and not data.language_model:
        classes = "number the classes from 0, or say how many there are with --classes"
        if findings.below_void <= 0:
            classes = f"if 0 and {VOID} are two classes, store y // {VOID}"
        return (
            f"label {VOID} is far above all others, up to {max(findings.below_void, 0):.0f}: if {VOID} means no label, "
            f"train with --ignore {VOID}; else {classes}; the first is in row",
            high_row,
        )
    return _too_many(data, findings)


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

"""Data sets: training and test rows, each with inputs x and labels y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from mpiml.data.sources import ArraySource, Source, npz_member
from mpiml.errors import DataError

DIGITS = Path(__file__).with_name("digits.npz")
SCAN = 1 << 24  # bytes of a source that are looked at together


@dataclass
class Split:
    """The rows that a run trains on, or those that it is tested on."""

    x: Source
    y: Source

    def __len__(self) -> int:
        return len(self.x)


@dataclass
class Dataset:
    """What a run learns from. Integer labels make it a classification, floating-point labels a regression.

    A label is one number, or a row of them; a class of -1 is no label and does not count.

    Raises DataError if the four sources do not fit together.
    """

    train: Split
    test: Split
    name: str = "arrays"

    def __post_init__(self) -> None:
        for which, split in (("train", self.train), ("test", self.test)):
            if len(split.x) != len(split.y):
                raise DataError(f"{self.name}: x_{which} has {len(split.x)} rows, but y_{which} has {len(split.y)}")
            if not len(split):
                raise DataError(f"{self.name}: x_{which} has no rows")
        for column, train, test in (("x", self.train.x, self.test.x), ("y", self.train.y, self.test.y)):
            if train.shape != test.shape:
                raise DataError(f"{self.name}: rows of {column}_train are {train.shape}, of {column}_test {test.shape}")
        if (self.train.y.dtype.kind == "f") != (self.test.y.dtype.kind == "f"):
            raise DataError(f"{self.name}: y_train is {self.train.y.dtype}, but y_test is {self.test.y.dtype}")
        if len(self.train.y.shape) > 1:
            raise DataError(f"{self.name}: labels are at most one axis a row, but y_train has {self.train.y.shape}")

    @classmethod
    def from_arrays(cls, x_train: ArrayLike, y_train: ArrayLike, x_test: ArrayLike, y_test: ArrayLike) -> Dataset:
        """A data set from arrays in memory, first axis rows."""
        x, y = ArraySource(x_train, "x_train"), ArraySource(y_train, "y_train")
        return cls(Split(x, y), Split(ArraySource(x_test, "x_test"), ArraySource(y_test, "y_test")))

    @property
    def classification(self) -> bool:
        """Whether labels are classes."""
        return self.train.y.dtype.kind != "f"


def open_dataset(spec: str) -> Dataset:
    """The data set named by `--data`: "digits", or a .npz file with x_train, y_train, x_test and y_test."""
    path = DIGITS if spec == "digits" else Path(spec)
    if path.suffix != ".npz":
        raise DataError(f"--data {spec}: choose digits or a .npz file with x_train, y_train, x_test, y_test")
    x_train, y_train, x_test, y_test = (npz_member(path, key) for key in ("x_train", "y_train", "x_test", "y_test"))
    return Dataset(Split(x_train, y_train), Split(x_test, y_test), path.stem)


@dataclass
class Findings:
    """What a look at every value of some rows found: the range of integers, how many are -1, and which rows are not
    finite."""

    lowest: float = np.inf
    highest: float = -np.inf
    bad_rows: int = 0
    first_bad: int | None = None
    masked: int = 0

    def __or__(self, other: Findings) -> Findings:
        first = [row for row in (self.first_bad, other.first_bad) if row is not None]
        return Findings(
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            self.bad_rows + other.bad_rows,
            min(first, default=None),
            self.masked + other.masked,
        )


def inspect(source: Source, start: int, stop: int) -> Findings:
    """Look at rows start..stop-1 of a source, a few megabytes at a time."""
    found = Findings()
    row_bytes = max(int(np.prod(source.shape)) * source.dtype.itemsize, 1)
    chunk = max(SCAN // row_bytes, 1)
    for first in range(start, stop, chunk):
        rows = source.rows(np.arange(first, min(first + chunk, stop)))
        flat = rows.reshape(len(rows), -1)
        if source.dtype.kind == "f":
            bad = np.flatnonzero(~np.isfinite(flat).all(axis=1))
            if len(bad):
                found |= Findings(bad_rows=len(bad), first_bad=first + int(bad[0]))
        elif flat.size:
            found |= Findings(int(flat.min()), int(flat.max()), masked=int(np.count_nonzero(flat == -1)))
    return found


@dataclass
class Batch:
    """The rows that a stage passes at once: a micro-batch, or a chunk of an evaluation.

    `index` is its number in the whole step or evaluation, `rows` how many rows it has. Nothing is read before
    x() or y() is called, for only the first stage needs inputs and only the last needs labels.
    """

    index: int
    rows: int
    split: Split
    select: Callable[[], NDArray[np.integer]]
    dtype: DTypeLike

    def x(self) -> NDArray[np.floating]:
        """The inputs, in the run's dtype."""
        return self.split.x.rows(self.select()).astype(self.dtype, copy=False)

    def y(self) -> NDArray[np.generic]:
        """The labels: integers as they index, numbers in the run's dtype."""
        y = self.split.y
        return y.rows(self.select()).astype(self.dtype if y.dtype.kind == "f" else np.intp, copy=False)

"""Gaps in the inputs, which are NaN, filled with a number or with the mean of the training rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml.clock import unwatched
from mpiml.data.preparation import Floats, Preparation
from mpiml.data.sources import Indices, Rows, Source, WrappedSource
from mpiml.errors import DataError

MEAN = "mean"
SCAN = 1 << 22  # bytes of a source, in float64, that are summed at once


@dataclass
class Present:
    """For each input how many rows have a value, and the sum of these."""

    rows: NDArray[np.int64]
    total: Floats

    def __add__(self, other: Present) -> Present:
        return Present(self.rows + other.rows, self.total + other.total)


def present(source: Source, rows: Indices, progress: Callable[[], object] = unwatched) -> Present:
    """Sum up these rows of a source, in chunks whose size depends on a row's shape alone; calls `progress` after
    each."""
    sums = Present(np.zeros(source.shape, np.int64), np.zeros(source.shape))
    chunk = max(SCAN // (8 * math.prod(source.shape)), 1)
    for first in range(0, len(rows), chunk):
        x = source.rows(rows[first : first + chunk]).astype(np.float64)
        missing = np.isnan(x)
        x[missing] = 0
        sums += Present(len(x) - np.count_nonzero(missing, axis=0), np.add.reduce(x, axis=0))
        progress()
    return sums


@dataclass
class Filling(Preparation):
    """For each input the value that takes the place of NaN; float64, of the shape of a row."""

    values: Floats

    NAMES: ClassVar = ("data.fill",)

    @classmethod
    def of_means(cls, sums: Present, names: Sequence[str]) -> Filling:
        """The means over all rows.

        Raises DataError for an input that has no value in any row, by its name if inputs have names.
        """
        if (empty := np.flatnonzero(sums.rows == 0)).size:
            what = f"column {names[empty[0]]}" if names else f"input {empty[0]} of a row"
            more = f" (likewise {empty.size - 1} more)" if empty.size > 1 else ""
            raise DataError(f"--fill mean: {what} has no value in any training row{more}: leave it out, or --fill 0")
        return cls(sums.total / sums.rows)

    def applied(self, source: Source, dtype: DTypeLike) -> Source:
        return FilledSource(source, self) if source.dtype.kind == "f" else source


class FilledSource(WrappedSource):
    """A source with values in place of NaN."""

    def __init__(self, source: Source, by: Filling):
        super().__init__(source, source.dtype)
        self.by = by

    def rows(self, indices: Indices) -> Rows:
        x = self.source.rows(indices)
        np.copyto(x, self.by.values, casting="same_kind", where=np.isnan(x))
        return x

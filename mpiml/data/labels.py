"""Labels that are values although the data hold integers, labels from 0 to 1, and weights of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.data.sources import Indices, Rows, Source, WrappedSource
from mpiml.errors import DataError


class ValueSource(WrappedSource):
    """A source of labels as floating-point numbers, of a type that holds the source's integers exactly."""

    def __init__(self, source: Source):
        super().__init__(source, np.result_type(source.dtype, np.float16))

    def rows(self, indices: Indices) -> Rows:
        return self.source.rows(indices).astype(self.dtype)


class ProbabilitySource(ValueSource):
    """A source of labels from 0 to 1. `rows` raises DataError for others."""

    def rows(self, indices: Indices) -> Rows:
        labels: NDArray[Any] = super().rows(indices)
        check_each(labels, (labels >= 0) & (labels <= 1), indices, f"{self.name}: label", "is not from 0 to 1")
        return labels


class WeightSource(WrappedSource):
    """A source of one weight a row, finite and not negative. `rows` raises DataError for others."""

    def __init__(self, source: Source):
        super().__init__(source, np.result_type(source.dtype, np.float16))
        if source.shape not in ((), (1,)):
            raise DataError(f"{self.name}: rows of weights are {source.shape}; a row has one weight")
        self.shape = ()

    def rows(self, indices: Indices) -> Rows:
        weights: NDArray[Any] = self.source.rows(indices).astype(self.dtype).reshape(-1)
        usable = (weights >= 0) & (weights < np.inf)
        check_each(weights, usable, indices, f"{self.name}: weight", "is not a finite number of at least 0")
        return weights


def stored(source: Source) -> Source:
    """The labels or weights as they are stored."""
    return stored(source.source) if isinstance(source, (ValueSource, WeightSource)) else source


def check_each(values: Rows, usable: NDArray[np.bool_], indices: Indices, what: str, wrong: str) -> None:
    """Raise DataError for the first of the values, of the rows with these numbers, that is not usable."""
    if not usable.all():
        first = np.argwhere(~usable)[0]
        raise DataError(f"{what} {values[tuple(first)]:g} {wrong}, in row {indices[first[0]]}")

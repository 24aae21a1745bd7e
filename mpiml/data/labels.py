"""Labels that are values although the data hold integers, labels from 0 to 1, and weights of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.data.sources import Indices, Rows, Source, WrappedSource
from mpiml.data.subsets import origins
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
        _check_each(self, labels, (labels >= 0) & (labels <= 1), indices, "label", "is not from 0 to 1")
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
        _check_each(self, weights, usable, indices, "weight", "is not a finite number of at least 0")
        return weights


def stored(source: Source) -> Source:
    """The labels or weights as they are stored."""
    return stored(source.source) if isinstance(source, (ValueSource, WeightSource)) else source


def _check_each(
    source: Source, values: Rows, usable: NDArray[np.bool_], indices: Indices, what: str, wrong: str
) -> None:
    """Raise DataError for the first of the values, of a source's rows with these numbers, that is not usable."""
    if not usable.all():
        first = np.argwhere(~usable)[0]
        _, numbers = next(origins(source, indices[first[:1]]))  # in the file, where some rows may be held out
        raise DataError(f"{source.name}: {what} {values[tuple(first)]:g} {wrong}, in row {numbers[0]}")

"""Normalisation: each input minus its mean over the training rows, divided by its standard deviation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import DTypeLike

from mpiml.clock import unwatched
from mpiml.data.preparation import Floats, Preparation
from mpiml.data.sources import Indices, Rows, Source, WrappedSource

SCAN = 1 << 22  # bytes of a source, in float64, that are summed at once
CONSTANT = 1e-10  # an input whose standard deviation is at most this times its mean is only centred


@dataclass
class Moments:
    """The number of rows, and for each input the mean over them and the sum of squared deviations from it."""

    rows: int
    mean: Floats
    squares: Floats

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of rows: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
        computing sample variances", 1979."""
        if not (self.rows and other.rows):
            return self if self.rows else other
        rows = self.rows + other.rows
        shift, share = other.mean - self.mean, other.rows / rows
        squares = self.squares + other.squares + shift * shift * (self.rows * share)
        return Moments(rows, self.mean + shift * share, squares)


def moments(source: Source, rows: Indices, progress: Callable[[], object] = unwatched) -> Moments:
    """The moments of these rows of a source, in chunks whose size depends on a row's shape alone; calls `progress`
    after each."""
    total = Moments(0, np.zeros(source.shape), np.zeros(source.shape))
    chunk = max(SCAN // (8 * math.prod(source.shape)), 1)
    for first in range(0, len(rows), chunk):
        x = source.rows(rows[first : first + chunk]).astype(np.float64)
        mean = np.add.reduce(x, axis=0) / len(x)
        x -= mean
        total += Moments(len(x), mean, np.add.reduce(np.square(x, out=x), axis=0))
        progress()
    return total


@dataclass
class Normalization(Preparation):
    """(x - mean) * scale; both float64, of the shape of a row."""

    mean: Floats
    scale: Floats

    NAMES: ClassVar = ("data.mean", "data.scale")

    @classmethod
    def of(cls, total: Moments) -> Normalization:
        """From the moments of all rows."""
        deviation = np.sqrt(total.squares / total.rows)
        constant = deviation <= CONSTANT * np.abs(total.mean)
        return cls(total.mean, np.where(constant, 1.0, 1 / np.where(constant, 1.0, deviation)))

    def applied(self, source: Source, dtype: DTypeLike) -> Source:
        return NormalizedSource(source, self, dtype)

    def leave(self, parts: Iterable[slice]) -> None:
        """Leave some parts of flat rows as they are."""
        for part in parts:
            self.mean[part], self.scale[part] = 0, 1


class NormalizedSource(WrappedSource):
    """A source of normalised rows in the run's dtype."""

    def __init__(self, source: Source, by: Normalization, dtype: DTypeLike):
        super().__init__(source, dtype)
        self.by = by

    def rows(self, indices: Indices) -> Rows:
        x = self.source.rows(indices).astype(np.float64)  # x - mean loses digits in float32 if x is far from 0
        x -= self.by.mean
        x *= self.by.scale
        normalized: Rows = x.astype(self.dtype, copy=False)
        return normalized

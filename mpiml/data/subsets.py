"""Rows of another source: those that are held out to test on, and those that are left to train on."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mpiml.data.inputs import Packed
from mpiml.data.sources import Indices, Rows, Source, WrappedSource
from mpiml.errors import ConfigError
from mpiml.random import generator

NO_ROWS = np.arange(0)


class Subset(WrappedSource):
    """The rows of a source with the numbers `chosen`, in this order."""

    def __init__(self, source: Source, chosen: Indices):
        super().__init__(source, source.dtype)
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def hold(self, rows: Indices) -> None:
        self.source.hold(self.chosen[rows])

    def rows(self, indices: Indices) -> Rows:
        return self.source.rows(self.chosen[indices])


def copied(source: Source) -> Source:
    """A source of the same rows that holds rows of its own."""
    other = copy.copy(source)
    if isinstance(other, WrappedSource):
        other.source = copied(other.source)
    elif isinstance(other, Packed):
        other.parts = [copied(part) for part in other.parts]
    return other


def origins(source: Source, rows: Indices) -> Iterator[tuple[Source, Indices]]:
    """The sources from which a source makes its rows, each with the numbers that these rows have there."""
    if isinstance(source, WrappedSource):
        yield from origins(source.source, source.chosen[rows] if isinstance(source, Subset) else rows)
    elif isinstance(source, Packed):
        for part in source.parts:
            yield from origins(part, rows)
    else:
        yield source, rows


def draw(
    rows: int, fraction: float, seed: int, purpose: str = "held out"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers, in rising order, of the rows to train on and of those that are taken for a purpose, "held out" or
    "validation", a function of these arguments alone. Raises ConfigError if there would be none of either kind."""
    count = round(fraction * rows)
    if not 0 < count < rows:
        what = "none would be left to train on" if count else "none would be taken"
        works = f"a fraction from {1 / rows:.2g} to {(rows - 1) / rows:.3g} works" if rows > 1 else "it takes two rows"
        raise ConfigError(f"--{purpose.replace(' ', '-')} {fraction:g}: of {rows} rows {what}; {works}")
    taken = np.zeros(rows, bool)
    taken[generator(seed, purpose).choice(rows, count, replace=False, shuffle=False)] = True
    return np.flatnonzero(~taken), np.flatnonzero(taken)

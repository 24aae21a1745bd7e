"""Normalisation: mean 0 and deviation 1 over the training rows, with bits that no layout changes."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest

from mpiml.data import normalize
from mpiml.data.normalize import Normalization, NormalizedSource, moments
from mpiml.data.sources import ArraySource

X = np.random.default_rng(2).normal(1e6, 3, (500, 3, 2)).astype(np.float32)  # far from 0: squares would cancel
X[:, 1, 0] = 0.1  # constant


def over(shards: list[np.ndarray], x: np.ndarray = X) -> Normalization:
    return Normalization.of(functools.reduce(operator.add, (moments(ArraySource(x), shard) for shard in shards)))


@pytest.mark.parametrize("parts", [1, 2, 7, 500])
@pytest.mark.parametrize("scan", [1, 1000, 1 << 22])
def test_mean_0_and_deviation_1(parts: int, scan: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalize, "SCAN", scan)
    normalization = over(np.array_split(np.arange(500), parts))
    exact = X.astype(np.float64)
    np.testing.assert_allclose(normalization.mean, exact.mean(axis=0), rtol=1e-13)
    deviation = exact.std(axis=0)
    deviation[1, 0] = 1
    np.testing.assert_allclose(normalization.scale, 1 / deviation, rtol=1e-9)
    rows = NormalizedSource(ArraySource(X), normalization, "float32").rows(np.arange(500))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(rows.std(axis=0), np.where(deviation == 1, 0, 1), atol=1e-4)
    rows = NormalizedSource(ArraySource(X), normalization, "float64").rows(np.arange(500))
    np.testing.assert_array_equal(rows, (exact - normalization.mean) * normalization.scale)


def test_each_chunk_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalize, "SCAN", 100 * 8 * 6)
    moves: list[int] = []
    moments(ArraySource(X), np.arange(500), lambda: moves.append(1))
    assert len(moves) == 5


def test_empty_shards_add_nothing() -> None:
    empty = np.arange(0)
    one, other = over([np.arange(500)]), over([empty, empty, np.arange(500), empty])
    assert np.array_equal(one.mean, other.mean)
    assert np.array_equal(one.scale, other.scale)


def test_large_constants_are_centred() -> None:
    """Though their squares are beyond float64."""
    normalization = over([np.arange(2), np.arange(0), np.arange(2, 4)], np.full((4, 1), 1e200))
    assert (normalization.mean, normalization.scale) == (1e200, 1)


def test_integers_are_normalized_too() -> None:
    source = ArraySource(np.array([[0, 255], [10, 255]], np.uint8))
    rows = NormalizedSource(source, over([np.arange(2)], source.array), "float64").rows(np.array([1, 0]))
    np.testing.assert_array_equal(rows, [[1, 0], [-1, 0]])


def test_parts_of_flat_rows_may_stay_as_they_are() -> None:
    x = X.reshape(500, 6)
    normalization = over([np.arange(500)], x)
    normalization.leave([slice(0, 2), slice(5, 6)])
    rows = NormalizedSource(ArraySource(x), normalization, "float32").rows(np.arange(500))
    assert [(rows[:, column] == x[:, column]).all() for column in range(6)] == [True, True, False, False, False, True]

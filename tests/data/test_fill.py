"""Gaps in inputs: filled with a number or with the mean of the training rows, whoever reads which shards."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest

from mpiml.data import fill
from mpiml.data.fill import Filling, Present, present
from mpiml.data.inspection import inspect
from mpiml.data.sources import ArraySource
from mpiml.errors import DataError

X = np.random.default_rng(0).standard_normal((200, 3, 2)).astype(np.float32)
X[::7, 1, 0] = np.nan
X[5:, 2, 1] = np.nan
SHARDS = np.array_split(np.arange(200), 5)


def over(shards: list[np.ndarray], x: np.ndarray) -> Present:
    return functools.reduce(operator.add, (present(ArraySource(x), rows) for rows in shards))


def test_means_are_over_the_rows_that_have_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "SCAN", 8 * 6 * 7)  # seven rows at once
    filling = Filling.of_means(over(SHARDS, X), ())
    np.testing.assert_allclose(filling.values, np.nanmean(X.astype(np.float64), axis=0), rtol=1e-13)


def test_gaps_alone_are_filled() -> None:
    values = np.arange(6.0).reshape(3, 2)
    rows = Filling(values).applied(ArraySource(X), "float64").rows(np.array([7, 3]))
    assert rows.dtype == X.dtype
    np.testing.assert_array_equal(rows, np.where(np.isnan(X[[7, 3]]), values, X[[7, 3]]))
    assert np.isnan(X[7]).any()  # the data are as they were


def test_an_input_without_any_value_has_no_mean() -> None:
    empty = X.copy().reshape(200, 6)
    empty[:, 4:] = np.nan
    sums = over(SHARDS, empty)
    for names, what in (
        ("abcdef", "column e has no value in any training row \\(likewise 1 more\\)"),
        ((), "input 4 "),
    ):
        with pytest.raises(DataError, match=f"--fill mean: {what}"):
            Filling.of_means(sums, names)


def test_infinity_is_no_gap() -> None:
    x = np.array([[1.0], [np.nan], [np.inf], [np.nan]])
    assert inspect(ArraySource(x), np.arange(4), gaps=True).first_bad == 2
    assert inspect(ArraySource(x), np.arange(4)).bad_rows == 3

"""Exact sums, against math.fsum and fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from mpiml.parallel import exact

RNG = np.random.default_rng(0)
WIDE = RNG.standard_normal((3000, 2)) * 10.0 ** RNG.uniform(-300, 300, (3000, 2))
CASES = {
    "one": [1.0],
    "nothing": [],
    "zeros": [0.0, -0.0],
    "cancelled": [1e300, 1.0, -1e300],
    "smallest": [5e-324, -1.5e-323, 1e-310],
    "smallest and largest": [5e-324, 1.7e308],
    "negative": [-1e-5, -3e10, 1.0],
    "beyond in between": [1.7e308, 1.7e308, -1.7e308],
}


@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_fractions(case: str) -> None:
    rows = np.array(CASES[case]).reshape(-1, 1)
    expected = float(sum(map(Fraction, CASES[case]), Fraction(0)))
    assert exact.rounded(exact.digits(rows)) == [expected]
    assert exact.sums(rows) == [expected]


@pytest.mark.parametrize("count", [1, 2, 99, 101, 3000])
def test_sums_of_columns_are_those_of_fsum(count: int) -> None:
    expected = [math.fsum(column) for column in WIDE[:count].T]
    assert exact.rounded(exact.digits(WIDE[:count])) == expected
    assert exact.sums(WIDE[:count]) == expected


def test_neither_order_nor_grouping_matters() -> None:
    shuffled = np.random.default_rng(2).permutation(WIDE)
    whole = exact.digits(WIDE)
    parts = exact.digits(shuffled[:7]) + exact.digits(shuffled[7:2000]) + exact.digits(shuffled[2000:])
    assert exact.rounded(parts) == exact.rounded(whole)


def test_many_large_numbers() -> None:
    rows = np.vstack([WIDE, [[1e300, -1e305]]])
    assert exact.sums(rows) == [math.fsum(column) for column in rows.T]


@pytest.mark.parametrize("decades", [0, 1, 20, 300])
@pytest.mark.parametrize("sign", [0, 1])
def test_sums_of_many(decades: float, sign: int) -> None:
    """Also of numbers of one sign, whose sum is large, and of the smallest that there are."""
    rows = RNG.standard_normal((70_000, 3)) * 10.0 ** RNG.uniform(-decades, 0, (70_000, 3))
    rows = np.abs(rows) if sign else rows
    rows[:, 2] = 5e-324 * RNG.integers(0, 1000, 70_000)
    assert exact.sums(rows) == [math.fsum(column) for column in rows.T]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, math.nan], math.nan),
        ([math.inf, -math.inf, 1.0], math.nan),
        ([math.inf, 1.0, 1.0], math.inf),
        ([-math.inf, 1.7e308], -math.inf),
        ([1.7e308, 1.7e308], math.inf),
        ([-1.7e308, -1.7e308], -math.inf),
    ],
)
@pytest.mark.parametrize("copies", [1, 50])
def test_sums_that_are_not_finite(values: list[float], expected: float, copies: int) -> None:
    rows = np.array(values * copies).reshape(-1, 1)
    np.testing.assert_equal(exact.sums(rows), [expected])
    np.testing.assert_equal(exact.rounded(exact.digits(rows)), [expected])


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (300, 0), (0, 2)])
def test_sums_of_no_numbers(shape: tuple[int, int]) -> None:
    digits = exact.digits(np.ones(shape))
    assert digits.shape == (shape[1], exact.DIGITS)
    assert exact.rounded(digits) == exact.sums(np.ones(shape)) == [0.0] * shape[1]

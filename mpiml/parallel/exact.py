"""Exact sums of float64 numbers: neither their order nor who adds up which of them changes the result.

A finite float64 is an integer times 2^-1074. Such integers, as digits in base 2^32 that need not be carried, are added
up in any order, also by the MPI library; the result is rounded once. Neal, "Fast exact summation using small and large
superaccumulators", arXiv 1505.05571, 2015.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

BITS = 32  # of a digit
LOWEST = 1074  # the last bit of the smallest float64 counts 2^-1074
MANTISSA = 53  # bits
FINITE = 66  # digits, for float64's 2,098 bits and two more places for what is shifted into them
DIGITS = FINITE + 3  # behind them: how many are not a number, infinite, and minus infinite
FEW = 100  # rows that are added up as they are
LARGE = 2.0**900  # sums of larger numbers may be beyond float64

Digits = NDArray[np.int64]


def digits(rows: ArrayLike) -> Digits:
    """The sums of the columns of (rows, columns) as digits (columns, DIGITS), of which sums are those of all rows.

    The sum of 2^29 rows still fits.
    """
    rows = np.asarray(rows, np.float64)
    total = np.zeros((rows.shape[1], DIGITS), np.int64)
    add(total, rows)
    return total


def add(total: Digits, rows: NDArray[np.float64]) -> None:
    """Add the sums of the columns of (rows, columns) to `total`, as of `digits`."""
    finite = np.isfinite(rows)
    if not finite.all():
        for kind, those in enumerate((np.isnan(rows), rows == np.inf, rows == -np.inf)):
            total[:, FINITE + kind] += those.sum(axis=0)
        rows = np.where(finite, rows, 0.0)
    if len(rows) > FEW and np.abs(rows).max(initial=0) < LARGE:
        rows = _fewer(rows)
    if rows.size:
        _add(total.reshape(-1), rows)


def _fewer(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """A few rows that have the same sums as many, none of them large.

    In turns, the leading bits of all numbers are taken away, so few that their sum is exact: Rump, Ogita and Oishi,
    "Accurate floating-point summation, part I", SIAM Journal on Scientific Computing 31, 2008.
    """
    few, room = list[NDArray[np.float64]](), 1 + len(rows).bit_length()
    left = np.array(rows.T, order="C")
    leading = np.empty_like(left)
    while (largest := np.abs(left, out=leading).max(axis=1)).any():
        above = np.ldexp(1.0, np.frexp(largest)[1] + room)[:, None]  # 2^room times what no number reaches
        np.add(left, above, out=leading)
        np.subtract(leading, above, out=leading)
        few.append(leading.sum(axis=1))
        np.subtract(left, leading, out=left)
    return np.array(few).reshape(len(few), rows.shape[1])


def _add(total: NDArray[np.int64], rows: NDArray[np.float64]) -> None:
    fraction, exponent = np.frexp(rows)
    whole = np.ldexp(fraction, MANTISSA).astype(np.int64)
    shift = exponent.astype(np.int64) + (LOWEST - MANTISSA)
    if shift.min() < 0:  # subnormal numbers, which have zeros there
        whole >>= np.maximum(-shift, 0)
        shift = np.maximum(shift, 0)
    digit, shift = shift // BITS, shift % BITS
    low, high = (whole & (2**BITS - 1)) << shift, (whole >> BITS) << shift
    place = (digit + DIGITS * np.arange(rows.shape[1])).ravel()
    for values in (low & (2**BITS - 1), (low >> BITS) + (high & (2**BITS - 1)), high >> BITS):
        np.add.at(total, place, values.ravel())
        place += 1


def rounded(total: Digits) -> list[float]:
    """The sums that digits (columns, DIGITS) stand for, rounded to float64; infinite where they are beyond it."""
    return [_rounded(column) for column in total.tolist()]


def _rounded(column: Sequence[int]) -> float:
    *places, not_numbers, infinite, minus_infinite = column
    if not_numbers or infinite or minus_infinite:
        return math.nan if not_numbers or (infinite and minus_infinite) else math.inf if infinite else -math.inf
    whole = 0
    for place in reversed(places):
        whole = (whole << BITS) + place
    try:
        return whole / (1 << LOWEST)
    except OverflowError:
        return math.inf if whole > 0 else -math.inf


def sums(rows: NDArray[np.float64]) -> list[float]:
    """The sums of the columns of (rows, columns), rounded to float64; infinite where they are beyond it."""
    if len(rows) <= FEW:
        try:
            return [math.fsum(column) for column in rows.T.tolist()]
        except (OverflowError, ValueError):  # partial sums beyond float64, or inf - inf
            pass
    return rounded(digits(rows))

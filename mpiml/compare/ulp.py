"""Distances between numbers in units in the last place (ULP): how many steps from one number of their type to the next
lead from the one to the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NO_DISTANCE = np.uint64(2**64 - 1)  # from NaN to anything else; more than from one infinity to the other
PART = 1 << 16  # elements that are looked at at once: they stay in a cache meanwhile


class Differing(NamedTuple):
    """How the elements of two arrays differ.

    Attributes:
        elements: how many have other bits.
        first: the index of the first of them in the flattened arrays; None if there is none.
        farthest: that of the first with the largest distance.
    """

    elements: int
    first: int | None
    farthest: int | None


def differing(a: Array, b: Array) -> Differing:
    """How two arrays of one shape and dtype differ. Of both zeros, and of NaN with other bits, the bits differ too."""
    elements, first, farthest, most = 0, None, None, -1
    for start, one, other in _parts(a, b):
        where = np.flatnonzero(_bits(one) != _bits(other))
        if not where.size:
            continue
        elements += where.size
        first = start + int(where[0]) if first is None else first
        far = distances(one[where], other[where])
        at = int(far.argmax())
        if int(far[at]) > most:
            most, farthest = int(far[at]), start + int(where[at])
    return Differing(elements, first, farthest)


def distance(a: Any, b: Any) -> int | None:
    """The distance between two numbers of one NumPy dtype; None if there is none, because one is NaN."""
    one, other = np.atleast_1d(a), np.atleast_1d(b)
    far = distances(one, other)[0]
    return None if one.dtype.kind == "f" and far == NO_DISTANCE else int(far)


def distances(a: Array, b: Array) -> NDArray[np.uint64]:
    """For each element of two arrays of one dtype the distance, NO_DISTANCE for NaN, unless the bits are equal. From -0
    to 0 it is 0, from the largest number to infinity 1. Of whole numbers and truth values it is the difference."""
    if a.dtype.kind not in "fiub" or a.dtype != b.dtype:
        raise ValueError(f"numbers of {a.dtype} and {b.dtype} have no distance")
    here, there = _places(a), _places(b)
    far = np.maximum(here, there).view(np.uint64) - np.minimum(here, there).view(np.uint64)  # exact modulo 2^64
    if a.dtype.kind == "f":
        far[(np.isnan(a) | np.isnan(b)) & (_bits(a) != _bits(b))] = NO_DISTANCE
    return far


def _places(numbers: Array) -> Array:
    """Integers of 64 bits that are in the order of the numbers and leave none out.

    The bits of a float that is not negative, read as an integer, are its place among these: IEEE 754 has made it so.
    Those of a negative one are its place from zero downwards, with the sign bit set.
    """
    if numbers.dtype.kind in "ub":
        return numbers.astype(np.uint64)
    if numbers.dtype.kind == "i":
        return numbers.astype(np.int64)
    signed = np.dtype(f"i{numbers.itemsize}")
    bits = numbers.view(signed).astype(np.int64)
    return np.where(bits < 0, np.int64(np.iinfo(signed).min) - bits, bits)


def _bits(numbers: Array) -> Array:
    return numbers.view(f"u{numbers.itemsize}")


def _parts(a: Array, b: Array) -> Iterator[tuple[int, Array, Array]]:
    """Parts of two arrays in flat order, each with the index of its first element."""
    flat, other = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
    for start in range(0, flat.size, PART):
        yield start, flat[start : start + PART], other[start : start + PART]

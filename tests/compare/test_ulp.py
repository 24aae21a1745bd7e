"""Distances in ULP: counted with NumPy's nextafter, and by hand where numbers end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpiml.compare import ulp
from mpiml.compare.ulp import Differing, differing, distance

FLOATS = (np.float16, np.float32, np.float64)
each_type = pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.__name__)


@each_type
def test_one_step_of_nextafter_is_one_ulp(kind: Any) -> None:
    rng = np.random.default_rng(5)
    numbers = np.concatenate([rng.standard_normal(500) * 10.0 ** rng.integers(-5, 4, 500), [0.0, -0.0, 1.0, -1.0, 0.5]])
    a = numbers.astype(kind)
    for toward in (np.inf, -np.inf):
        b = a
        for steps in range(1, 4):
            b = np.nextafter(b, kind(toward))
            assert (ulp.distances(a, b) == steps).all()
            assert (ulp.distances(b, a) == steps).all()


@each_type
def test_distances_at_the_ends_and_across_zero(kind: Any) -> None:
    about = np.finfo(kind)
    tiny, largest, infinite = about.smallest_subnormal, about.max, kind(np.inf)
    assert distance(kind(0.0), kind(-0.0)) == 0
    assert distance(kind(-0.0), tiny) == 1
    assert distance(-tiny, tiny) == 2
    assert distance(tiny * 3, -tiny * 4) == 7
    assert distance(about.smallest_normal, np.nextafter(about.smallest_normal, kind(0))) == 1  # the largest subnormal
    assert distance(largest, infinite) == 1
    assert distance(-infinite, -largest) == 1
    assert distance(kind(1), kind(2)) == 2**about.nmant  # as many numbers as a binade has
    # All exponents but that of NaN, times the numbers of a binade, on both sides of zero.
    assert distance(-infinite, infinite) == 2 * (2**about.nexp - 1) * 2**about.nmant


@each_type
def test_nan_has_no_distance_but_to_itself(kind: Any) -> None:
    nan = kind(np.nan)
    assert distance(nan, nan) == 0
    assert distance(nan, kind(1)) is None
    assert distance(-np.inf * kind(1), nan) is None
    assert distance(nan, -nan) is None  # another sign bit


@pytest.mark.parametrize(
    ("a", "b", "far"),
    [
        (np.int64(-(2**63)), np.int64(2**63 - 1), 2**64 - 1),
        (np.int8(-128), np.int8(127), 255),
        (np.uint64(2**64 - 1), np.uint64(0), 2**64 - 1),
        (np.uint8(3), np.uint8(250), 247),
        (np.int32(-1), np.int32(1), 2),
        (np.bool_(True), np.bool_(False), 1),
    ],
)
def test_the_distance_of_whole_numbers_is_their_difference(a: Any, b: Any, far: int) -> None:
    assert distance(a, b) == distance(b, a) == far


def test_numbers_of_two_types_have_no_distance() -> None:
    with pytest.raises(ValueError, match="float32 and float64 have no distance"):
        distance(np.float32(1), np.float64(1))


def test_the_first_element_and_the_farthest_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ulp, "PART", 5)
    a = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
    assert differing(a, a.copy()) == Differing(0, None, None)
    b = a.copy()
    b[1, 1] = np.nextafter(b[1, 1], np.float32(9))
    b[2, 3] += 1
    b[3, 5] = np.nextafter(b[3, 5], np.float32(9))
    assert differing(a, b) == Differing(3, 7, 15)
    b[3, 0] = np.nan  # is farther than any number
    assert differing(a, b) == Differing(4, 7, 18)


def test_zeros_and_nans_with_other_bits_differ() -> None:
    zeros = np.zeros(3)
    assert differing(zeros, -zeros) == Differing(3, 0, 0)
    nans = np.full(2, np.nan)
    assert differing(nans, nans.copy()) == Differing(0, None, None)
    assert differing(nans, np.array([np.nan, -np.nan])) == Differing(1, 1, 1)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_arrays_of_any_shape(shape: tuple[int, ...]) -> None:
    a = np.ones(shape, np.float32)
    assert differing(a, a + 1) == (Differing(1, 0, 0) if a.size else Differing(0, None, None))

"""Arithmetic on a device has the bits of NumPy's on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from mpiml import vectors
from mpiml.devices import arithmetic
from mpiml.devices.arithmetic import LEAF, OnDevice
from mpiml.devices.fake import Fake
from mpiml.vectors import BLOCK

TYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
# Around all lengths at which NumPy adds up another way, odd ones between them, and the length of a block.
LENGTHS = [*range(40), *range(LEAF - 9, LEAF + 18), *range(2 * LEAF - 9, 2 * LEAF + 18), 300, 511, 512, 513, 777]
LENGTHS += [1000, 1024, 1031, 2047, 4096, 5000, 9999, BLOCK - 1, BLOCK]


def numbers(size: int, dtype: str, seed: int = 0) -> Any:
    """Of very different sizes, so that the order of a sum shows in its bits."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(size) * 2.0 ** rng.integers(-12, 12, size)).astype(dtype)


def extremes(dtype: str) -> Any:
    """Numbers at the ends of the type, with each other's: zeros, denormals, the largest, infinite ones and NaN."""
    of = np.finfo(dtype)
    tiny, small, large = (float(x) for x in (of.smallest_subnormal, of.tiny, of.max))
    ends = np.array([0, tiny, 3 * tiny, small, small * 1.5, 1 / 3, 1, large / 3, large, math.inf, math.nan], dtype)
    return np.concatenate([ends, -ends, numbers(1000, dtype), numbers(1000, dtype, 1) * small])


def same(one: Any, other: Any) -> None:
    """Equal bits, but for those of a NaN, which IEEE leaves open."""
    assert one.dtype == other.dtype
    nans = np.isnan(other)
    assert (np.isnan(one) == nans).all()
    assert one[~nans].tobytes() == other[~nans].tobytes()


@TYPES
def test_sums_of_squares_of_any_length(device: Fake, dtype: str) -> None:
    vector = numbers(BLOCK + 7, dtype)
    there = device.tensor(vector)
    blocks = [(5, 5 + length) for length in LENGTHS]
    sums = zip(device.vectors.square_sums(there, blocks), vectors.square_sums(vector, blocks), strict=True)
    assert [length for length, (one, other) in zip(LENGTHS, sums, strict=True) if one != other] == []


@TYPES
@pytest.mark.parametrize(
    "blocks",
    [
        [],
        [(0, 0)],
        [(0, 64), (64, 128), (128, 192)],  # a run of equally long ones
        [(0, 64), (64, 128), (128, 150), (150, 172), (200, 222), (222, 230)],  # several runs, and a gap
        [(300, 400), (0, 100), (100, 200)],  # in no order
        [(0, 64), (0, 64), (32, 96)],  # which overlap
        [(0, 0), (0, 0), (0, 8)],
        [(number * 777, number * 777 + 777) for number in range(20)],
        [(number * 777, number * 777 + 770) for number in range(20)],  # each with padding behind it
    ],
)
@pytest.mark.parametrize("piece", [1, 2000, arithmetic.PIECE])
def test_sums_of_squares_of_blocks_in_their_order(
    device: Fake, monkeypatch: pytest.MonkeyPatch, dtype: str, blocks: list[tuple[int, int]], piece: int
) -> None:
    monkeypatch.setattr(arithmetic, "PIECE", piece)  # so many at once
    vector = numbers(20 * 777, dtype)
    assert device.vectors.square_sums(device.tensor(vector), blocks) == vectors.square_sums(vector, blocks)


@TYPES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(device: Fake, dtype: str, bad: float) -> None:
    vector = numbers(1000, dtype)
    assert device.vectors.is_finite(device.tensor(vector))
    assert device.vectors.is_finite(device.tensor(np.full(9, np.finfo(dtype).max, dtype)))  # whose squares are not
    assert device.vectors.is_finite(device.tensor(vector[:0]))
    for place in (0, 500, 999):
        vector[place], was = bad, vector[place]
        assert not device.vectors.is_finite(device.tensor(vector))
        one, other = (xp.square_sums(v, [(0, 1000)]) for xp, v in both(device, vector))
        np.testing.assert_array_equal(one, other)
        vector[place] = was


def both(device: Fake, vector: Any) -> list[tuple[Any, Any]]:
    return [(device.vectors, device.tensor(vector)), (vectors, vector)]


@TYPES
@pytest.mark.parametrize("name", ["multiply", "add", "subtract", "divide"])
def test_operations_of_two_vectors(device: Fake, dtype: str, name: str) -> None:
    """On vectors with each other, of all pairs of extremes, and with the result in the place of either."""
    ends = extremes(dtype)
    first, second = (np.ascontiguousarray(one.ravel()) for one in np.meshgrid(ends[:100], ends))
    with np.errstate(all="ignore"):
        expected = getattr(vectors, name)(first, second, out=np.empty_like(first))
    for place in (None, 0, 1):
        there = [device.tensor(first), device.tensor(second)]
        out = device.vectors.empty(len(first), dtype) if place is None else there[place]
        assert getattr(device.vectors, name)(*there, out=out) is out
        same(device.array(out), expected)


@TYPES
@pytest.mark.parametrize("name", ["multiply", "add", "subtract", "divide"])
@pytest.mark.parametrize("number", [3, 0.1, 1 / 3, 7.0, 1e-3, 1e30, 1e-30])
def test_operations_of_a_vector_and_a_number(device: Fake, dtype: str, name: str, number: float) -> None:
    vector = extremes(dtype)
    with np.errstate(all="ignore"):
        expected = getattr(vectors, name)(vector, number, out=np.empty_like(vector))
    out = getattr(device.vectors, name)(device.tensor(vector), number, out=device.vectors.empty(len(vector), dtype))
    same(device.array(out), expected)


@TYPES
def test_roots(device: Fake, dtype: str) -> None:
    """Of so many numbers that PyTorch's own, where it is not the nearest, shows."""
    vector = np.concatenate([extremes(dtype), abs(numbers(100_000, dtype))])
    with np.errstate(all="ignore"):
        expected = vectors.sqrt(vector, out=np.empty_like(vector))
        out = device.vectors.sqrt(device.tensor(vector), out=device.vectors.empty(len(vector), dtype))
    same(device.array(out), expected)


@TYPES
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_averages(device: Fake, dtype: str, momentum: float) -> None:
    def average(xp: Any, lay: Callable[[Any], Any]) -> Any:
        value, total, scratch = (lay(numbers(500, dtype, seed)) for seed in range(3))
        vectors.average(vectors.Operands(value, [], (scratch, scratch), total, False, xp=xp), 7, momentum)
        return value

    same(device.array(average(device.vectors, device.tensor)), average(np, np.copy))


def test_all_that_updates_compute_with_is_there() -> None:
    names = ("multiply", "add", "subtract", "divide", "sqrt", "piece", "empty", "zeros", "square_sums", "is_finite")
    assert all(hasattr(vectors, name) and hasattr(OnDevice, name) for name in names)

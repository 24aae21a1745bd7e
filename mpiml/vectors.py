"""Flat vectors: aligned memory, sums, norms, and running averages. Optimizers compute on them in nn/optimizers.py."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Vector = NDArray[np.floating]

ALIGNMENT = 64  # bytes: a cache line, and an AVX-512 register
BOUNDARY = 256  # bytes: where parameters start on a GPU, whose products choose algorithms by it
BLOCK = 1 << 14  # elements: the unit of norms and of ownership
PIECE = 1 << 16  # elements: a piece's values, gradient, states and scratch fit a core's cache together

# With the functions below, all that updates compute with; vectors on a device have the same (mpiml.devices.arithmetic).
multiply, add, subtract, divide, sqrt, piece = np.multiply, np.add, np.subtract, np.divide, np.sqrt, PIECE


@dataclass(frozen=True)
class Block:
    """vector[start:stop], at most BLOCK elements of one parameter; the unit of norms and of ownership.

    `decay` says whether weight decay applies; `momentum` is that of a running average, None where an optimizer makes
    the changes, with `rate` times the learning rate. `matrix` numbers the parameters that have norms of their own.
    `array` names one that stands in several layers; if it is not `counted`, sums over all stages leave the block out,
    because an earlier stage has it, too.
    """

    start: int
    stop: int
    decay: bool
    momentum: float | None = None
    rate: float = 1.0
    matrix: int | None = None
    array: str | None = None
    counted: bool = True


def empty(size: int, dtype: DTypeLike) -> Vector:
    """A vector of `size` elements, not initialised, that starts on a 64-byte boundary."""
    dtype = np.dtype(dtype)
    raw = np.empty(size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size * dtype.itemsize].view(dtype)


def zeros(size: int, dtype: DTypeLike) -> Vector:
    """A vector of `size` zeros that starts on a 64-byte boundary."""
    vector = empty(size, dtype)
    vector.fill(0)
    return vector


def bytes_of(size: int, dtype: DTypeLike) -> int:
    """The bytes of a vector of `size` elements, rounded up so that the next one starts on a 64-byte boundary."""
    return -(-size * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT


def padded(size: int, dtype: DTypeLike, boundary: int = ALIGNMENT) -> int:
    """The elements that an array of `size` takes in a vector where the next one starts on a `boundary`, in bytes."""
    itemsize = np.dtype(dtype).itemsize
    return -(-size * itemsize // boundary) * boundary // itemsize


def blocks(
    start: int,
    stop: int,
    decay: bool = False,
    momentum: float | None = None,
    rate: float = 1.0,
    matrix: int | None = None,
    array: str | None = None,
    counted: bool = True,
) -> list[Block]:
    """vector[start:stop], of one parameter, in blocks."""
    kind = decay, momentum, rate, matrix, array, counted
    return [Block(a, min(a + BLOCK, stop), *kind) for a in range(start, stop, BLOCK)]


def square_sums(vector: Vector, blocks: Iterable[tuple[int, int]]) -> list[float]:
    """The sum of squares of vector[start:stop], in float64, for each block (start, stop).

    Uses np.add.reduce because the bits of np.dot change with the number of BLAS threads.
    """
    return [float(np.add.reduce(np.square(vector[a:b], dtype=np.float64))) for a, b in blocks]


def is_finite(vector: Vector) -> bool:
    """Whether every element is finite.

    The dot product of the vector with itself is the cheapest pass, and is finite only if every element is. It may
    overflow although they are, so then the elements are checked one by one.
    """
    return math.isfinite(vector.dot(vector)) or bool(np.isfinite(vector).all())


@dataclass(slots=True)
class Operands:
    """The vectors, all of equal length, that the update of one piece reads and writes."""

    value: Vector  # changed in place
    states: Sequence[Vector]  # of the optimizer; changed in place
    scratch: tuple[Vector, Vector]  # to be overwritten; the first may be `total`
    total: Vector  # the gradient, summed over the batch
    decays: bool  # whether weight decay applies
    average: Vector | None = None  # of the values over the steps so far, if one is kept; changed in place
    xp: Any = np  # the namespace of what computes with them: NumPy's, or a device's with the same names
    trust: float = 1.0  # the trust ratio of a matrix, where the optimizer has one


def average(on: Operands, rows: int, momentum: float) -> None:
    """value += momentum * (mean - value), where mean = total / rows. If momentum is 1 the old value, which may be
    infinite, does not matter."""
    value, (mean, _) = on.value, on.scratch
    if momentum == 1:
        on.xp.divide(on.total, rows, out=value)
        return
    on.xp.multiply(on.total, 1.0 / rows, out=mean)
    approach(value, mean, momentum, mean, on.xp)


def approach(average: Vector, value: Vector, part: float, scratch: Vector, xp: Any = np) -> None:
    """average += part * (value - average). Overwrites `scratch`, which may be `value`."""
    xp.subtract(value, average, out=scratch)
    xp.multiply(scratch, part, out=scratch)
    xp.add(average, scratch, out=average)

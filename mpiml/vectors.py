"""Flat vectors and everything that is computed on them: the one file that a GPU array library would replace."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

Vector = NDArray[np.floating]

ALIGNMENT = 64  # bytes: a cache line, and an AVX-512 register
BLOCK = 1 << 14  # elements: the unit of norms and of ownership
PIECE = 1 << 16  # elements: values, gradient, state and scratch of a piece fit a core's cache together


@dataclass(frozen=True)
class Block:
    """vector[start:stop], at most BLOCK elements of one parameter; the unit of norms and of ownership.

    `decay` says whether weight decay applies; `momentum` is that of a running average, None where an optimizer makes
    the changes.
    """

    start: int
    stop: int
    decay: bool
    momentum: float | None = None


def empty(size: int, dtype: DTypeLike) -> Vector:
    """A vector of `size` elements that starts on a 64-byte boundary; what it holds is undefined."""
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
    """What a vector takes, with what keeps the next one on a cache line."""
    return -(-size * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT


def add(left: Vector, right: Vector, out: Vector) -> None:
    """out = left + right, all of one length; `out` may be `left`."""
    np.add(left, right, out=out)


def copy(source: Vector, out: Vector) -> None:
    """out = source, of one length; they may be one and the same."""
    np.copyto(out, source)


def square_sums(vector: Vector, blocks: Iterable[tuple[int, int]]) -> list[float]:
    """The sum of squares of vector[start:stop], in float64, for each block.

    np.add.reduce and not np.dot: the bits of np.dot change with the number of BLAS threads.
    """
    return [float(np.add.reduce(np.square(vector[a:b], dtype=np.float64))) for a, b in blocks]


def norm(square_sums: Iterable[float]) -> float:
    """The Euclidean norm from sums of squares, whatever their order: math.fsum is exact."""
    try:
        return math.sqrt(math.fsum(square_sums))
    except (OverflowError, ValueError):  # partial sums beyond float64, or inf - inf
        return math.inf


def is_finite(vector: Vector) -> bool:
    """Whether no element is infinite or not a number.

    The dot product is the cheapest pass there is, and no finite one hides such an element; where it overflows,
    the elements themselves are looked at. Its bits do not matter here.
    """
    return math.isfinite(np.dot(vector, vector)) or bool(np.isfinite(vector).all())


@dataclass(slots=True)
class Operands:
    """What the update of a piece works on: vectors of one length.

    Attributes:
        value, states: are changed in place.
        scratch: two vectors to write into, of which the first may be `total`.
        total: the summed gradient; a scale makes the mean of it.
        decays: whether weight decay applies.
    """

    value: Vector
    states: Sequence[Vector]
    scratch: tuple[Vector, Vector]
    total: Vector
    decays: bool


def average(on: Operands, scale: float, momentum: float) -> None:
    """value += momentum * (mean - value), where total times `scale` is the mean."""
    value, (mean, _) = on.value, on.scratch
    np.multiply(on.total, scale, out=mean)
    np.subtract(mean, value, out=mean)
    np.multiply(mean, momentum, out=mean)
    np.add(value, mean, out=value)


def sgd(on: Operands, scale: float, rate: float, decay: float) -> None:
    """value -= rate * (grad + decay * value), with the learning rate and the weight decay."""
    value, total, (grad, spare) = on.value, on.total, on.scratch
    if decay:
        np.multiply(total, scale, out=grad)
        np.multiply(value, decay, out=spare)
        np.add(grad, spare, out=grad)
        np.multiply(grad, rate, out=grad)
    else:
        np.multiply(total, scale * rate, out=grad)
    np.subtract(value, grad, out=value)


def momentum_sgd(on: Operands, scale: float, rate: float, decay: float, momentum: float, nesterov: bool) -> None:
    """velocity = momentum * velocity + grad; value -= rate * velocity (Nesterov: grad + momentum * velocity).

    Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
    """
    value, total, (velocity,), (grad, spare) = on.value, on.total, on.states, on.scratch
    np.multiply(total, scale, out=grad)
    if decay:
        np.multiply(value, decay, out=spare)
        np.add(grad, spare, out=grad)
    np.multiply(velocity, momentum, out=velocity)
    np.add(velocity, grad, out=velocity)
    if nesterov:
        np.multiply(velocity, momentum, out=spare)
        np.add(grad, spare, out=grad)
        np.multiply(grad, rate, out=grad)
    else:
        np.multiply(velocity, rate, out=grad)
    np.subtract(value, grad, out=value)


def adam(
    on: Operands,
    scale: float,
    rate: float,
    decay: float,
    decoupled: bool,
    betas: tuple[float, float],
    epsilon: float,
    step: int,
) -> None:
    """One step of Adam; with `decoupled` the decay shrinks the value instead of joining the gradient (AdamW).

    Kingma and Ba, "Adam", ICLR 2015; Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """
    value, total, (mean, variance), (grad, spare) = on.value, on.total, on.states, on.scratch
    first, second = betas
    np.multiply(total, scale, out=grad)
    if decay and decoupled:
        np.multiply(value, 1.0 - rate * decay, out=value)
    elif decay:
        np.multiply(value, decay, out=spare)
        np.add(grad, spare, out=grad)
    np.multiply(mean, first, out=mean)
    np.multiply(grad, 1.0 - first, out=spare)
    np.add(mean, spare, out=mean)
    np.multiply(grad, grad, out=grad)
    np.multiply(grad, 1.0 - second, out=grad)
    np.multiply(variance, second, out=variance)
    np.add(variance, grad, out=variance)
    np.sqrt(variance, out=spare)
    np.multiply(spare, 1.0 / math.sqrt(1.0 - second**step), out=spare)
    np.add(spare, epsilon, out=spare)
    np.divide(mean, spare, out=spare)
    np.multiply(spare, rate / (1.0 - first**step), out=spare)
    np.subtract(value, spare, out=value)

"""Activations: functions of each element. x and y have the same shape, any (rows, ...)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mpiml.nn.base import Array, At, Backward, Layer
from mpiml.nn.parameters import Shape
from mpiml.nn.tiling import tiles


class ReLU(Layer):
    """y = max(x, 0): Nair and Hinton, "Rectified linear units improve restricted Boltzmann machines", ICML 2010."""

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        y = np.maximum(x, 0)
        return y, lambda dy, grads: dy * (y > 0)


class Tanh(Layer):
    """y = tanh(x)."""

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        y = np.tanh(x)
        return y, lambda dy, grads: dy * (1 - y * y)


class GELU(Layer):
    """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): Hendrycks and Gimpel, "Gaussian error linear units", 2016."""

    SCALE = math.sqrt(2.0 / math.pi)
    CUBIC = 0.044715 * SCALE

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        return _with_slope(self._tile, x, at)

    def _tile(self, x: Array, y: Array, slope: Array | None) -> None:
        square = x * x
        half = square * self.CUBIC  # becomes h = (1 + tanh) / 2, so that y = x h and dh/du = 2 h (1 - h)
        half += self.SCALE
        half *= x
        np.tanh(half, out=half)
        half *= 0.5
        half += 0.5
        np.multiply(x, half, out=y)
        if slope is not None:
            np.multiply(square, 6 * self.CUBIC, out=slope)
            slope += 2 * self.SCALE
            slope *= y
            slope *= np.subtract(1, half, out=square)
            slope += half

    def flops(self, shape: Shape) -> int:
        return 10 * math.prod(shape)


class SiLU(Layer):
    """y = x / (1 + exp(-x)): Elfwing et al., "Sigmoid-weighted linear units", Neural Networks 107, 2018."""

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        return _with_slope(self._tile, x, at)

    @staticmethod
    def _tile(x: Array, y: Array, slope: Array | None) -> None:
        sigmoid = x * 0.5  # 1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2, which cannot overflow
        np.tanh(sigmoid, out=sigmoid)
        sigmoid *= 0.5
        sigmoid += 0.5
        np.multiply(x, sigmoid, out=y)
        if slope is not None:
            np.subtract(1, sigmoid, out=slope)
            slope *= y
            slope += sigmoid

    def flops(self, shape: Shape) -> int:
        return 5 * math.prod(shape)


def _with_slope(write: Callable[[Array, Array, Array | None], None], x: Array, at: At) -> tuple[Array, Backward]:
    """y and backward of an activation. In training the forward pass computes the slope dy/dx too, while x is in cache.

    Args:
        write: write(x, y, slope) fills y, and slope unless it is None, from x: one tile, flat.
    """
    y = np.empty(x.shape, x.dtype)
    slope = np.empty(x.shape, x.dtype) if at.training else None
    flat_x, flat_y, flat_slope = x.reshape(x.size), y.reshape(x.size), None if slope is None else slope.reshape(x.size)
    for tile in tiles(x.size, x.itemsize):
        write(flat_x[tile], flat_y[tile], None if flat_slope is None else flat_slope[tile])
    return y, lambda dy, grads: dy * slope

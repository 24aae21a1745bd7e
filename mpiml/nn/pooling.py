"""Pooling of images. A row is (height, width, channels)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mpiml.nn.base import Array, At, Backward, Layer
from mpiml.nn.parameters import Gradients, Shape
from mpiml.nn.tiling import blocks

CACHE = 1 << 19  # bytes of images whose gradient is computed at once


class _Pool(Layer):
    """A window of size x size that moves by its own size; what remains at the lower and right edge is left out."""

    def __init__(self, size: int = 2):
        if size < 1:
            raise ValueError(f"{type(self).__name__}({size}): a window has at least one place")
        self.size = size

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3 or min(shape[:2]) < self.size:
            raise ValueError(
                f"{type(self).__name__}({self.size}) takes rows of shape (H, W, channels) with H and W at least "
                f"{self.size}, got {shape}"
            )
        return shape[0] // self.size, shape[1] // self.size, shape[2]

    def _places(self, x: Array) -> Iterator[Array]:
        """For each place in the window the view of x that holds it in all windows."""
        size = self.size
        height, width = (side // size * size for side in x.shape[1:3])
        return (x[:, i:height:size, j:width:size] for i in range(size) for j in range(size))

    def _lines(self, x: Array) -> Array:
        """The view (rows, windows down, size, a line of all windows) of x: long runs, which are passed fastest."""
        size, (rows, *image, channels) = self.size, x.shape
        height, width = (side // size * size for side in image)
        return x[:, :height, :width].reshape(rows, height // size, size, width * channels)

    def _spread(self, y: Array) -> Array:
        """One value a window, given once for every place of a line of it: an array that goes with `_lines`."""
        rows, down, right, channels = y.shape
        return np.repeat(y, self.size, axis=2).reshape(rows, down, 1, right * self.size * channels)

    def _room_for_dx(self, x: Array) -> Array:
        """An array like x, undefined in the windows and zero outside them."""
        dx = np.empty(x.shape, x.dtype)
        height, width = (side // self.size * self.size for side in x.shape[1:3])
        dx[:, height:] = dx[:, :, width:] = 0
        return dx


class MaxPool2d(_Pool):
    """y = the largest x in each window of size x size. Of equal ones the first gets the gradient."""

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        first, *others = self._places(x)
        y = first.copy()
        for other in others:
            np.maximum(y, other, out=y)

        def backward(dy: Array, grads: Gradients) -> Array:
            dx = self._room_for_dx(x)
            for some in blocks(len(x), math.prod(x.shape[1:]) * x.itemsize, CACHE):
                hit = self._lines(x[some]) == self._spread(y[some])
                if np.count_nonzero(hit) != y[some].size:
                    self._keep_first(hit.reshape(*y[some].shape[:2], self.size, y.shape[2], self.size, y.shape[3]))
                np.multiply(self._spread(dy[some]), hit, out=self._lines(dx[some]))
            return dx

        return y, backward

    @staticmethod
    def _keep_first(hit: NDArray[np.bool_]) -> None:
        """Leave the first of each window's hits; hit (rows, windows down, size, windows right, size, channels)."""
        free = np.ones(hit[:, :, 0, :, 0].shape, bool)
        for i, j in np.ndindex(hit.shape[2], hit.shape[4]):
            place = hit[:, :, i, :, j]
            place &= free
            free ^= place


class AvgPool2d(_Pool):
    """y = the mean of x in each window of size x size."""

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        first, *others = self._places(x)
        y = first.copy()
        for other in others:
            y += other
        y *= 1 / self.size**2

        def backward(dy: Array, grads: Gradients) -> Array:
            dx = self._room_for_dx(x)
            self._lines(dx)[...] = self._spread(dy * (1 / self.size**2))
            return dx

        return y, backward


class GlobalAvgPool(Layer):
    """y = the mean over all places of an image; y (rows, channels)."""

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        y = x.mean(axis=(1, 2))

        def backward(dy: Array, grads: Gradients) -> Array:
            share = dy * (1 / math.prod(x.shape[1:3]))
            return np.broadcast_to(share[:, None, None], x.shape)

        return y, backward

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3 or 0 in shape:
            raise ValueError(f"GlobalAvgPool takes rows of shape (H, W, channels), got {shape}")
        return shape[2:]

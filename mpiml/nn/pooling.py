"""Pooling of images. A row is (height, width, channels)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mpiml.nn.base import Array, At, Backward, Layer
from mpiml.nn.parameters import Gradients, Shape
from mpiml.nn.tiling import tiles

CACHE = 1 << 19  # bytes of the images in a tile of the backward pass


class _Pool(Layer):
    """Windows of size x size pixels, side by side; pixels left over at the lower and right edge are ignored."""

    def __init__(self, size: int = 2):
        if size < 1:
            raise ValueError(f"{type(self).__name__}({size}): the window's size must be at least 1")
        self.size = size

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3 or min(shape[:2]) < self.size:
            raise ValueError(
                f"{type(self).__name__}({self.size}) takes rows of shape (H, W, channels) with H and W at least "
                f"{self.size}, got {shape}"
            )
        return shape[0] // self.size, shape[1] // self.size, shape[2]

    def _pixels(self, x: Array) -> Iterator[Array]:
        """For each pixel of a window, the view of x that holds this pixel of all windows."""
        size = self.size
        height, width = (side // size * size for side in x.shape[1:3])
        return (x[:, i:height:size, j:width:size] for i in range(size) for j in range(size))

    def _lines(self, x: Array) -> Array:
        """The view (rows, windows down, size, a line through all windows across) of x: long runs are fastest."""
        size, (rows, *image, channels) = self.size, x.shape
        height, width = (side // size * size for side in image)
        return x[:, :height, :width].reshape(rows, height // size, size, width * channels)

    def _spread(self, y: Array) -> Array:
        """The value of each window, repeated along a line of it: broadcasts with `_lines(x)`."""
        rows, down, right, channels = y.shape
        return y.repeat(self.size, axis=2).reshape(rows, down, 1, right * self.size * channels)

    def _room_for_dx(self, x: Array) -> Array:
        """An array like x, not initialised inside the windows and zero outside them."""
        dx = np.empty(x.shape, x.dtype)
        height, width = (side // self.size * self.size for side in x.shape[1:3])
        dx[:, height:] = dx[:, :, width:] = 0
        return dx


class MaxPool2d(_Pool):
    """y = the largest x in each window of size x size; of equal ones, the first gets the gradient. x (rows, H, W,
    channels), y (rows, H // size, W // size, channels)."""

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        first, *others = self._pixels(x)
        y = first.copy()
        for other in others:
            np.maximum(y, other, out=y)

        def backward(dy: Array, grads: Gradients) -> Array:
            dx = self._room_for_dx(x)
            lines, dlines = self._lines(x), self._lines(dx)
            for tile in tiles(len(x), math.prod(x.shape[1:]) * x.itemsize, CACHE):
                largest = lines[tile] == self._spread(y[tile])
                if np.count_nonzero(largest) != y[tile].size:
                    self._keep_first(largest.reshape(*y[tile].shape[:2], self.size, y.shape[2], self.size, y.shape[3]))
                np.multiply(self._spread(dy[tile]), largest, out=dlines[tile])
            return dx

        return y, backward

    @staticmethod
    def _keep_first(largest: NDArray[np.bool_]) -> None:
        """Clear all but the first True of each window; (rows, windows down, size, windows across, size, channels)."""
        none_yet = np.ones(largest[:, :, 0, :, 0].shape, bool)
        for i, j in np.ndindex(largest.shape[2], largest.shape[4]):
            pixel = largest[:, :, i, :, j]
            pixel &= none_yet
            none_yet ^= pixel


class AvgPool2d(_Pool):
    """y = the mean of x in each window of size x size; shapes as of MaxPool2d."""

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        first, *others = self._pixels(x)
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
    """y = the mean over all pixels; x (rows, H, W, channels), y (rows, channels): Lin et al., "Network in network",
    ICLR 2014."""

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

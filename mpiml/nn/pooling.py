"""Pooling of images. A row is (height, width, channels)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mpiml.nn.layer import Array, At, Backward, Layer
from mpiml.nn.parameters import Gradients, Shape


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
            free = np.ones(y.shape, bool)
            for place, dplace in zip(self._places(x), self._places(dx), strict=True):
                hit = place == y
                hit &= free
                free ^= hit
                np.multiply(dy, hit, out=dplace)
            return dx

        return y, backward


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
            share = dy * (1 / self.size**2)
            for dplace in self._places(dx):
                dplace[...] = share
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

"""Convolution of images. A row is (height, width, channels)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mpiml.nn.base import Array, At, Backward, Layer
from mpiml.nn.parameters import Gradients, Parameter, Shape, constant, uniform
from mpiml.nn.tiling import tiles

CACHE = 1 << 20  # bytes of the patches in a tile: about a second-level cache
FEW = 4  # below so many channels, patches are copied along image lines: longer runs than along the rows of a patch


class Conv2d(Layer):
    """y[i, j] = sum over a, b of x[s i + a - p, s j + b - p] W[a, b] + bias, where x is zero outside the image.

    x (rows, H, W, inputs), y (rows, H', W', outputs), W (kernel, kernel, inputs, outputs), H' = (H + 2p - kernel) // s
    + 1 for stride s and padding p. Padding is kernel // 2 by default: an odd kernel and stride 1 then keep H and W.

    Computed as a matrix product, the images' patches times W, for a few images at a time: Chellapilla et al., "High
    performance convolutional neural networks for document processing", 2006. First values are drawn as in Linear.
    """

    splits = True

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int | None = None):
        padding = kernel // 2 if padding is None else padding
        if not 0 <= padding < kernel or stride < 1:
            raise ValueError(
                f"Conv2d: kernel {kernel}, stride {stride}, padding {padding}: stride must be at least 1, and padding "
                "at least 0 and less than kernel"
            )
        self.inputs, self.outputs, self.kernel, self.stride, self.padding = inputs, outputs, kernel, stride, padding
        patch = kernel * kernel * inputs
        self.weight = Parameter((kernel, kernel, inputs, outputs), uniform(math.sqrt(6.0 / patch)))
        self.bias = Parameter((outputs,), constant(0.0))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        kernel, stride, padding, outputs = self.kernel, self.stride, self.padding, self.outputs
        height, width = x.shape[1:3]
        frame, weight = (height + 2 * padding, width + 2 * padding), self.weight.value
        y = np.empty((len(x), *self.output_shape(x.shape[1:])), x.dtype)
        bias = np.tile(self.bias.value, y.shape[2])  # for a whole line of an image: long runs are added faster
        for images, patches in _patches(x, frame, padding, 1, kernel, stride):
            np.matmul(patches, weight.reshape(-1, outputs), out=y[images].reshape(-1, outputs))
            lines = y[images].reshape(-1, bias.size)
            lines += bias

        def backward(dy: Array, grads: Gradients) -> Array | None:
            def by_weights() -> None:
                dweight, dbias = grads[self.weight].reshape(-1, outputs), grads[self.bias]
                dweight[...] = dbias[...] = 0
                for images, patches in _patches(x, frame, padding, 1, kernel, stride):
                    dpixels = dy[images].reshape(-1, outputs)
                    if not self.weight.frozen:
                        dweight += patches.T @ dpixels
                    dbias += np.ones(len(dpixels), dy.dtype) @ dpixels

            if not (self.weight.frozen and self.bias.frozen):
                grads.later(by_weights)
            if not self.needs_dx:
                return None
            # dx is a convolution too: of dy, its pixels spread `stride` apart, with the kernel rotated by 180 degrees.
            rotated = weight[::-1, ::-1].swapaxes(2, 3).reshape(-1, self.inputs)
            dx, around = np.empty(x.shape, dy.dtype), (height + kernel - 1, width + kernel - 1)
            for images, patches in _patches(dy, around, kernel - 1 - padding, stride, kernel, 1):
                np.matmul(patches, rotated, out=dx[images].reshape(-1, self.inputs))
            return dx

        return y, backward

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3 or shape[2] != self.inputs or min(shape[:2]) + 2 * self.padding < self.kernel:
            low = max(self.kernel - 2 * self.padding, 1)
            raise ValueError(
                f"Conv2d({self.inputs}, {self.outputs}, {self.kernel}) takes rows of shape (H, W, {self.inputs}) with "
                f"H and W at least {low}, got {shape}"
            )
        height, width = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in shape[:2])
        return height, width, self.outputs

    def flops(self, shape: Shape) -> int:
        return 2 * self.kernel**2 * self.inputs * math.prod(self.output_shape(shape))


def _patches(
    x: Array, frame: tuple[int, int], offset: int, spacing: int, kernel: int, stride: int
) -> Iterator[tuple[slice, Array]]:
    """All patches of kernel x kernel pixels of images placed in frames of zeros, for a tile of images at a time.

    Args:
        x: images (rows, H, W, channels).
        frame: height and width of the frame.
        offset: row and column of the frame at which the image begins; its pixels lie `spacing` apart.
        stride: between two patches.

    Yields:
        The slice of images, and their patches as a matrix (patches, kernel x kernel x channels), which the next tile
        overwrites.
    """
    height, width, channels = x.shape[1:]
    steps = [(side - kernel) // stride + 1 for side in frame]
    patch, few = kernel * kernel * channels, channels < FEW
    inside_rows, inside_columns = (slice(offset, offset + spacing * side, spacing) for side in (height, width))
    framed = patches = matrix = np.empty(0, x.dtype)
    for images in tiles(len(x), math.prod(steps) * patch * x.itemsize, CACHE):
        first = len(framed) != len(x[images])  # of its size: the last tile may be smaller
        if first:
            framed = np.zeros((len(x[images]), *frame, channels), x.dtype)
            n, down, right, step = framed.strides
            shape, strides = (*steps, kernel, kernel, channels), (stride * down, stride * right, down, right, step)
            patches = as_strided(framed, (len(framed), *shape), (n, *strides), writeable=False)
            patches = patches.transpose(3, 4, 5, 0, 1, 2) if few else patches
        framed[:, inside_rows, inside_columns] = x[images]
        if first:
            matrix = patches.reshape((patch, -1) if few else (-1, patch))
        elif not np.may_share_memory(matrix, framed):  # as it does where a patch is a pixel or a whole image
            np.copyto(matrix.reshape(patches.shape), patches)
        yield images, matrix.T if few else matrix

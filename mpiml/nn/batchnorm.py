"""Batch normalisation: each channel by its mean and variance over a micro-batch, or by running averages of these."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mpiml.nn.base import Array, At, Backward, Layer
from mpiml.nn.parameters import Gradients, Parameter, Shape, Statistic, constant
from mpiml.nn.tiling import tiles


class BatchNorm2d(Layer):
    """y = g (x - mean) / sqrt(variance + epsilon) + b, for each channel; x and y (rows, H, W, channels).

    In training, mean and variance are those of the micro-batch, so its size matters. In evaluation they are running
    averages: each step adds `momentum` times (the mean over the step's rows - the average), for the variance in its
    unbiased form. If a micro-batch has a single value of a channel, the variance is 0 and y = b.
    Ioffe and Szegedy, "Batch normalization", ICML 2015.
    """

    splits = True

    def __init__(self, channels: int, epsilon: float = 1e-5, momentum: float = 0.1):
        if not 0 <= momentum <= 1:
            raise ValueError(f"BatchNorm2d({channels}): momentum {momentum}: must be from 0 to 1")
        self.channels, self.epsilon = channels, epsilon
        self.gain = Parameter((channels,), constant(1.0))
        self.bias = Parameter((channels,), constant(0.0))
        self.running_mean = Statistic((channels,), constant(0.0), momentum)
        self.running_variance = Statistic((channels,), constant(1.0), momentum)

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        # A row of this matrix is a whole line of an image: along the channels of one pixel, loops would be too short.
        lines, width = x.reshape(-1, x.shape[2] * self.channels), x.shape[2]
        line_tiles, count = list(tiles(len(lines), lines.shape[1] * x.itemsize)), len(lines) * width
        mean, variance = self.running_mean.value, self.running_variance.value
        if at.training:
            mean, variance = _moments(lines, line_tiles, self.channels)
        inverse = 1 / np.sqrt(variance + self.epsilon)
        slope = inverse * self.gain.value
        centre, along, bias = (_line(v, width, x) for v in (mean, slope, self.bias.value))
        y = np.empty(x.shape, x.dtype)
        out = y.reshape(lines.shape)
        for tile in line_tiles:
            np.subtract(lines[tile], centre, out=out[tile])
            out[tile] *= along
            out[tile] += bias

        def backward(dy: Array, grads: Gradients) -> Array:
            dy, dx = dy.reshape(lines.shape), np.empty(x.shape, dy.dtype)
            out, dgain, dbias = dx.reshape(lines.shape), np.zeros(self.channels), np.zeros(self.channels)
            for tile in line_tiles:
                product = np.subtract(lines[tile], centre, out=out[tile])
                product *= dy[tile]
                dgain += _sums(product, self.channels)
                dbias += _sums(dy[tile], self.channels)
            dgain *= inverse
            grads[self.gain][...], grads[self.bias][...] = dgain, dbias
            grads[self.running_mean][...] = len(x) * mean
            unbiased = count / (count - 1) if at.training and count > 1 else 1.0
            grads[self.running_variance][...] = len(x) * unbiased * variance
            share = 1 / count if at.training and count else 0.0  # of one value in the mean and the variance
            across, tilt = (_line(v, width, x) for v in (dbias * share, dgain * share * slope * inverse))
            for tile in line_tiles:
                centred = np.subtract(lines[tile], centre)
                np.subtract(dy[tile], across, out=out[tile])
                out[tile] *= along
                out[tile] -= np.multiply(centred, tilt, out=centred)
            return dx

        return y, backward

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3 or shape[2] != self.channels:
            raise ValueError(f"BatchNorm2d({self.channels}) takes rows of shape (H, W, {self.channels}), got {shape}")
        return shape

    def flops(self, shape: Shape) -> int:
        return 8 * math.prod(shape)


def _moments(lines: Array, line_tiles: Sequence[slice], channels: int) -> tuple[Array, Array]:
    """Mean and variance of each channel, float64, in one pass over memory: those of each tile, combined. Chan, Golub
    and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979."""
    means, squares = np.zeros((2, len(line_tiles), channels))
    sizes = np.array([len(lines[tile]) * (lines.shape[1] // channels) for tile in line_tiles]).reshape(-1, 1)
    for index, tile in enumerate(line_tiles):
        means[index] = _sums(lines[tile], channels) / sizes[index]
        centred = lines[tile] - _line(means[index], lines.shape[1] // channels, lines)
        squares[index] = _sums(np.square(centred, out=centred), channels)
    count = max(sizes.sum(), 1)
    mean = (sizes * means).sum(axis=0) / count
    return mean, (squares + sizes * (means - mean) ** 2).sum(axis=0) / count


def _sums(lines: Array, channels: int) -> Array:
    """The sum of each channel: over lines in their own dtype, along a line in float64."""
    over_lines: Array = np.ones(len(lines), lines.dtype) @ lines
    sums: Array = over_lines.reshape(-1, channels).sum(axis=0, dtype=np.float64)
    return sums


def _line(per_channel: Array, width: int, like: Array) -> Array:
    """One value per channel, repeated for all pixels of a line, in the dtype of `like`."""
    return np.tile(per_channel.astype(like.dtype), width)

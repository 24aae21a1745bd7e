"""Batch normalisation: each channel by its mean and variance over a micro-batch, and by running averages of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mpiml.nn.base import Array, At, Backward, Layer
from mpiml.nn.parameters import Gradients, Parameter, Shape, Statistic, constant
from mpiml.nn.tiling import blocks


class BatchNorm2d(Layer):
    """y = g (x - mean) / sqrt(variance + epsilon) + b, each channel by itself; x (rows, H, W, channels).

    In training, mean and variance are those of the micro-batch: its size matters. In evaluation they are running
    averages, into which each step brings the mean over its rows with weight `momentum`; the variance that is averaged
    is the unbiased one. A micro-batch with a single value of a channel has variance 0, and y = b.
    Ioffe and Szegedy, "Batch normalization", ICML 2015.
    """

    def __init__(self, channels: int, epsilon: float = 1e-5, momentum: float = 0.1):
        if not 0 <= momentum <= 1:
            raise ValueError(f"BatchNorm2d({channels}): momentum {momentum}; it is a part, from 0 to 1")
        self.channels, self.epsilon = channels, epsilon
        self.gain = Parameter((channels,), constant(1.0))
        self.bias = Parameter((channels,), constant(0.0))
        self.running_mean = Statistic((channels,), constant(0.0), momentum)
        self.running_variance = Statistic((channels,), constant(1.0), momentum)

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        # The places of an image line at once: along the channels of one place alone, loops would be too short.
        lines, width = x.reshape(-1, x.shape[2] * self.channels), x.shape[2]
        parts, count = list(blocks(len(lines), lines.shape[1] * x.itemsize)), len(lines) * width
        mean, variance = _moments(lines, parts, self.channels) if at.training else self._running()
        inverse = 1 / np.sqrt(variance + self.epsilon)
        slope = inverse * self.gain.value
        centre, along, bias = (_line(v, width, x) for v in (mean, slope, self.bias.value))
        y = np.empty(x.shape, x.dtype)
        out = y.reshape(lines.shape)
        for part in parts:
            np.subtract(lines[part], centre, out=out[part])
            out[part] *= along
            out[part] += bias

        def backward(dy: Array, grads: Gradients) -> Array:
            dy, dx = dy.reshape(lines.shape), np.empty(x.shape, dy.dtype)
            out, dgain, dbias = dx.reshape(lines.shape), np.zeros(self.channels), np.zeros(self.channels)
            for part in parts:
                product = np.subtract(lines[part], centre, out=out[part])
                product *= dy[part]
                dgain += _sums(product, self.channels)
                dbias += _sums(dy[part], self.channels)
            dgain *= inverse
            grads[self.gain][...], grads[self.bias][...] = dgain, dbias
            grads[self.running_mean][...] = len(x) * mean
            unbiased = count / (count - 1) if at.training and count > 1 else 1.0
            grads[self.running_variance][...] = len(x) * unbiased * variance
            share = 1 / count if at.training and count else 0.0  # of a value in the mean and the variance
            across, tilt = (_line(v, width, x) for v in (dbias * share, dgain * share * slope * inverse))
            for part in parts:
                centred = np.subtract(lines[part], centre)
                np.subtract(dy[part], across, out=out[part])
                out[part] *= along
                out[part] -= np.multiply(centred, tilt, out=centred)
            return dx

        return y, backward

    def _running(self) -> tuple[Array, Array]:
        return self.running_mean.value, self.running_variance.value

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3 or shape[2] != self.channels:
            raise ValueError(f"BatchNorm2d({self.channels}) takes rows of shape (H, W, {self.channels}), got {shape}")
        return shape

    def flops(self, shape: Shape) -> int:
        return 8 * math.prod(shape)


def _moments(lines: Array, parts: Sequence[slice], channels: int) -> tuple[Array, Array]:
    """Mean and variance of each channel, float64, in one pass over memory: those of parts that fit the cache, put
    together. Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
    1979."""
    means, squares = np.zeros((2, len(parts), channels))
    sizes = np.array([len(lines[part]) * (lines.shape[1] // channels) for part in parts]).reshape(-1, 1)
    for index, part in enumerate(parts):
        means[index] = _sums(lines[part], channels) / sizes[index]
        centred = lines[part] - _line(means[index], lines.shape[1] // channels, lines)
        squares[index] = _sums(np.square(centred, out=centred), channels)
    count = max(sizes.sum(), 1)
    mean = (sizes * means).sum(axis=0) / count
    return mean, (squares + sizes * (means - mean) ** 2).sum(axis=0) / count


def _sums(lines: Array, channels: int) -> Array:
    """The sum of each channel, in float64 but for the sums over lines."""
    each: Array = np.ones(len(lines), lines.dtype) @ lines
    sums: Array = each.reshape(-1, channels).sum(axis=0, dtype=np.float64)
    return sums


def _line(each: Array, width: int, like: Array) -> Array:
    """What is given for each channel, for all places of a line."""
    return np.tile(each.astype(like.dtype), width)

"""Normalisation within a row: of each position's features, or of groups of channels."""

from __future__ import annotations

import math

import numpy as np

from mpiml.nn.base import Array, At, Backward, Layer, check_last_axis
from mpiml.nn.parameters import Gradients, Parameter, Shape, constant
from mpiml.nn.tiling import tiles

PIXELS = 1 << 10  # pixels of an image that are summed in the image's dtype; these sums are added in float64


class LayerNorm(Layer):
    """y = g (x - mean) / sqrt(variance + epsilon) + b over the last axis of x (rows, ..., features): Ba et al., "Layer
    normalization", 2016."""

    splits = True

    def __init__(self, features: int, epsilon: float = 1e-5):
        self.features, self.epsilon = features, epsilon
        self.gain = Parameter((features,), constant(1.0))
        self.bias = Parameter((features,), constant(0.0))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        gain, bias, rows = self.gain.value, self.bias.value, x.reshape(-1, self.features)
        normal, y = np.empty(rows.shape, x.dtype), np.empty(x.shape, x.dtype)
        inverse, out = np.empty((len(rows), 1), x.dtype), y.reshape(rows.shape)
        for tile in tiles(len(rows), self.features * x.itemsize):
            centred = np.subtract(rows[tile], _mean(rows[tile]), out=normal[tile])
            inverse[tile] = 1 / np.sqrt(_mean_product(centred, centred) + self.epsilon)
            centred *= inverse[tile]
            np.multiply(centred, gain, out=out[tile])
            out[tile] += bias

        def backward(dy: Array, grads: Gradients) -> Array:
            dy, dx = dy.reshape(rows.shape), np.empty(x.shape, dy.dtype)
            dgain, dbias, out = grads[self.gain], grads[self.bias], dx.reshape(rows.shape)
            dgain[...] = dbias[...] = 0
            for tile in tiles(len(rows), self.features * x.itemsize):
                product = dy[tile] * normal[tile]
                dgain += np.add.reduce(product, axis=0)
                dbias += np.add.reduce(dy[tile], axis=0)
                dnormal = np.multiply(dy[tile], gain, out=out[tile])
                along = _mean_product(dnormal, normal[tile])
                dnormal -= _mean(dnormal)
                dnormal -= np.multiply(normal[tile], along, out=product)
                dnormal *= inverse[tile]
            return dx

        return y, backward

    def output_shape(self, shape: Shape) -> Shape:
        check_last_axis(self, self.features, shape, self.features)
        return shape

    def flops(self, shape: Shape) -> int:
        return 8 * math.prod(shape)


class RMSNorm(Layer):
    """y = g x / sqrt(mean of x^2 + epsilon) over the last axis of x (rows, ..., features): Zhang and Sennrich, "Root
    mean square layer normalization", NeurIPS 2019."""

    splits = True

    def __init__(self, features: int, epsilon: float = 1e-5):
        self.features, self.epsilon = features, epsilon
        self.gain = Parameter((features,), constant(1.0))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        gain, rows = self.gain.value, x.reshape(-1, self.features)
        normal, y = np.empty(rows.shape, x.dtype), np.empty(x.shape, x.dtype)
        inverse, out = np.empty((len(rows), 1), x.dtype), y.reshape(rows.shape)
        for tile in tiles(len(rows), self.features * x.itemsize):
            inverse[tile] = 1 / np.sqrt(_mean_product(rows[tile], rows[tile]) + self.epsilon)
            np.multiply(rows[tile], inverse[tile], out=normal[tile])
            np.multiply(normal[tile], gain, out=out[tile])

        def backward(dy: Array, grads: Gradients) -> Array:
            dy, dx = dy.reshape(rows.shape), np.empty(x.shape, dy.dtype)
            dgain, out = grads[self.gain], dx.reshape(rows.shape)
            dgain[...] = 0
            for tile in tiles(len(rows), self.features * x.itemsize):
                product = dy[tile] * normal[tile]
                dgain += np.add.reduce(product, axis=0)
                dnormal = np.multiply(dy[tile], gain, out=out[tile])
                along = _mean_product(dnormal, normal[tile])
                dnormal -= np.multiply(normal[tile], along, out=product)
                dnormal *= inverse[tile]
            return dx

        return y, backward

    def output_shape(self, shape: Shape) -> Shape:
        check_last_axis(self, self.features, shape, self.features)
        return shape

    def flops(self, shape: Shape) -> int:
        return 5 * math.prod(shape)


class GroupNorm(Layer):
    """y = g (x - mean) / sqrt(variance + epsilon) + b, over all pixels and a group of channels of each row.

    x and y (rows, ..., channels); `groups` groups of consecutive channels; g and b have one value per channel.
    Wu and He, "Group normalization", ECCV 2018.
    """

    splits = True

    def __init__(self, groups: int, channels: int, epsilon: float = 1e-5):
        if channels % groups:
            raise ValueError(f"GroupNorm({groups}, {channels}): {groups} groups do not divide {channels} channels")
        self.groups, self.channels, self.epsilon = groups, channels, epsilon
        self.gain = Parameter((channels,), constant(1.0))
        self.bias = Parameter((channels,), constant(0.0))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        gain, bias, pixels = self.gain.value, self.bias.value, math.prod(x.shape[1:-1])
        images = x.reshape(len(x), pixels, self.channels)
        normal, y = np.empty(images.shape, x.dtype), np.empty(x.shape, x.dtype)
        inverse, out = np.empty((len(x), 1, self.channels), x.dtype), y.reshape(images.shape)
        size = self.channels // self.groups
        share = np.kron(np.eye(self.groups), np.full((size, size), 1 / (pixels * size)))  # see _group_means
        for tile in tiles(len(x), pixels * self.channels * x.itemsize):
            centred = np.subtract(images[tile], _group_means(_sums(images[tile]), share, x), out=normal[tile])
            variance = _group_means(_sums(np.square(centred, out=out[tile])), share, x)
            inverse[tile] = 1 / np.sqrt(variance + self.epsilon)
            centred *= inverse[tile]
            np.multiply(centred, gain, out=out[tile])
            out[tile] += bias

        def backward(dy: Array, grads: Gradients) -> Array:
            dy, dx = dy.reshape(images.shape), np.empty(x.shape, dy.dtype)
            dgain, dbias, out = grads[self.gain], grads[self.bias], dx.reshape(images.shape)
            dgain[...] = dbias[...] = 0
            for tile in tiles(len(x), pixels * self.channels * x.itemsize):
                product = dy[tile] * normal[tile]
                along, across = _sums(product), _sums(dy[tile])
                dgain += np.add.reduce(along, axis=0)
                dbias += np.add.reduce(across, axis=0)
                dnormal = np.multiply(dy[tile], gain, out=out[tile])
                dnormal -= _group_means(across * gain, share, x)
                dnormal -= np.multiply(normal[tile], _group_means(along * gain, share, x), out=product)
                dnormal *= inverse[tile]
            return dx

        return y, backward

    def output_shape(self, shape: Shape) -> Shape:
        check_last_axis(self, self.channels, shape, self.groups, self.channels)
        return shape

    def flops(self, shape: Shape) -> int:
        return 8 * math.prod(shape)


def _sums(images: Array) -> Array:
    """Sums over all pixels: (rows, channels) of images (rows, pixels, channels). For many pixels they are float64:
    float32 would lose small deviations from a large mean."""
    parts = [images[:, start : start + PIXELS] for start in range(0, images.shape[1], PIXELS)]
    sums = [np.ones(part.shape[1], part.dtype) @ part for part in parts]
    return sums[0] if len(sums) == 1 else np.add.reduce(sums, axis=0, dtype=np.float64)


def _group_means(sums: Array, share: Array, like: Array) -> Array:
    """For each channel the mean over its group, (rows, 1, channels), from sums over pixels, (rows, channels); `share`
    is the matrix (channels, channels) of each channel's part in a mean."""
    means: Array = (sums @ share.astype(sums.dtype))[:, None].astype(like.dtype, copy=False)
    return means


def _mean(rows: Array) -> Array:
    """The mean of each row, (rows, 1). A matrix product is several times faster than sums along short rows."""
    features = rows.shape[1]
    means: Array = rows @ np.full((features, 1), 1 / features, rows.dtype)
    return means


def _mean_product(a: Array, b: Array) -> Array:
    """The mean over each row of a * b, (rows, 1)."""
    means: Array = np.vecdot(a, b)[:, None]
    means *= 1 / a.shape[1]
    return means

"""Normalisation of the values of a row, or of parts of it."""

from __future__ import annotations

import math

import numpy as np

from mpiml.nn.base import Array, At, Backward, Layer
from mpiml.nn.parameters import Gradients, Parameter, Shape, constant
from mpiml.nn.tiling import blocks

PLACES = 1 << 10  # of an image that are added up together in its own dtype


class LayerNorm(Layer):
    """y = g (x - mean) / sqrt(variance + epsilon) + b over the last axis: Ba et al., "Layer normalization", 2016."""

    def __init__(self, features: int, epsilon: float = 1e-5):
        self.features, self.epsilon = features, epsilon
        self.gain = Parameter((features,), constant(1.0))
        self.bias = Parameter((features,), constant(0.0))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        gain, bias, rows = self.gain.value, self.bias.value, x.reshape(-1, self.features)
        normal, y = np.empty(rows.shape, x.dtype), np.empty(x.shape, x.dtype)
        inverse, out = np.empty((len(rows), 1), x.dtype), y.reshape(rows.shape)
        for block in blocks(len(rows), self.features * x.itemsize):
            centred = np.subtract(rows[block], _mean(rows[block]), out=normal[block])
            inverse[block] = 1 / np.sqrt(_mean_product(centred, centred) + self.epsilon)
            centred *= inverse[block]
            np.multiply(centred, gain, out=out[block])
            out[block] += bias

        def backward(dy: Array, grads: Gradients) -> Array:
            dy, dx = dy.reshape(rows.shape), np.empty(x.shape, dy.dtype)
            dgain, dbias, out = grads[self.gain], grads[self.bias], dx.reshape(rows.shape)
            dgain[...] = dbias[...] = 0
            for block in blocks(len(rows), self.features * x.itemsize):
                product = dy[block] * normal[block]
                dgain += np.add.reduce(product, axis=0)
                dbias += np.add.reduce(dy[block], axis=0)
                dnormal = np.multiply(dy[block], gain, out=out[block])
                along = _mean_product(dnormal, normal[block])
                dnormal -= _mean(dnormal)
                dnormal -= np.multiply(normal[block], along, out=product)
                dnormal *= inverse[block]
            return dx

        return y, backward

    def output_shape(self, shape: Shape) -> Shape:
        if shape[-1:] != (self.features,):
            raise ValueError(f"LayerNorm({self.features}) takes rows whose last axis is {self.features}, got {shape}")
        return shape

    def flops(self, shape: Shape) -> int:
        return 8 * math.prod(shape)


class RMSNorm(Layer):
    """y = g x / sqrt(mean of x^2 + epsilon) over the last axis: Zhang and Sennrich, "RMSNorm", NeurIPS 2019."""

    def __init__(self, features: int, epsilon: float = 1e-5):
        self.features, self.epsilon = features, epsilon
        self.gain = Parameter((features,), constant(1.0))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        gain, rows = self.gain.value, x.reshape(-1, self.features)
        normal, y = np.empty(rows.shape, x.dtype), np.empty(x.shape, x.dtype)
        inverse, out = np.empty((len(rows), 1), x.dtype), y.reshape(rows.shape)
        for block in blocks(len(rows), self.features * x.itemsize):
            inverse[block] = 1 / np.sqrt(_mean_product(rows[block], rows[block]) + self.epsilon)
            np.multiply(rows[block], inverse[block], out=normal[block])
            np.multiply(normal[block], gain, out=out[block])

        def backward(dy: Array, grads: Gradients) -> Array:
            dy, dx = dy.reshape(rows.shape), np.empty(x.shape, dy.dtype)
            dgain, out = grads[self.gain], dx.reshape(rows.shape)
            dgain[...] = 0
            for block in blocks(len(rows), self.features * x.itemsize):
                product = dy[block] * normal[block]
                dgain += np.add.reduce(product, axis=0)
                dnormal = np.multiply(dy[block], gain, out=out[block])
                along = _mean_product(dnormal, normal[block])
                dnormal -= np.multiply(normal[block], along, out=product)
                dnormal *= inverse[block]
            return dx

        return y, backward

    def output_shape(self, shape: Shape) -> Shape:
        if shape[-1:] != (self.features,):
            raise ValueError(f"RMSNorm({self.features}) takes rows whose last axis is {self.features}, got {shape}")
        return shape

    def flops(self, shape: Shape) -> int:
        return 5 * math.prod(shape)


class GroupNorm(Layer):
    """y = g (x - mean) / sqrt(variance + epsilon) + b, over all places and a group of channels of each row.

    x (rows, ..., channels); channels are cut into `groups` groups of neighbours, and g and b are one per channel.
    Wu and He, "Group normalization", ECCV 2018.
    """

    def __init__(self, groups: int, channels: int, epsilon: float = 1e-5):
        if channels % groups:
            raise ValueError(f"GroupNorm({groups}, {channels}): {groups} groups do not divide {channels} channels")
        self.groups, self.channels, self.epsilon = groups, channels, epsilon
        self.gain = Parameter((channels,), constant(1.0))
        self.bias = Parameter((channels,), constant(0.0))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        gain, bias, places = self.gain.value, self.bias.value, math.prod(x.shape[1:-1])
        images = x.reshape(len(x), places, self.channels)
        normal, y = np.empty(images.shape, x.dtype), np.empty(x.shape, x.dtype)
        inverse, out = np.empty((len(x), 1, self.channels), x.dtype), y.reshape(images.shape)
        share = self._share(places)
        for some in blocks(len(x), places * self.channels * x.itemsize):
            centred = np.subtract(images[some], _shared(_sums(images[some]), share, x), out=normal[some])
            variance = _shared(_sums(np.square(centred, out=out[some])), share, x)
            inverse[some] = 1 / np.sqrt(variance + self.epsilon)
            centred *= inverse[some]
            np.multiply(centred, gain, out=out[some])
            out[some] += bias

        def backward(dy: Array, grads: Gradients) -> Array:
            dy, dx = dy.reshape(images.shape), np.empty(x.shape, dy.dtype)
            dgain, dbias, out = grads[self.gain], grads[self.bias], dx.reshape(images.shape)
            dgain[...] = dbias[...] = 0
            for some in blocks(len(x), places * self.channels * x.itemsize):
                product = dy[some] * normal[some]
                along, across = _sums(product), _sums(dy[some])
                dgain += np.add.reduce(along, axis=0)
                dbias += np.add.reduce(across, axis=0)
                dnormal = np.multiply(dy[some], gain, out=out[some])
                dnormal -= _shared(across * gain, share, x)
                dnormal -= np.multiply(normal[some], _shared(along * gain, share, x), out=product)
                dnormal *= inverse[some]
            return dx

        return y, backward

    def _share(self, places: int) -> Array:
        """What turns sums over each channel into means over each group, given once for every channel."""
        size = self.channels // self.groups
        return np.kron(np.eye(self.groups), np.full((size, size), 1 / (places * size)))

    def output_shape(self, shape: Shape) -> Shape:
        if shape[-1:] != (self.channels,):
            raise ValueError(
                f"GroupNorm({self.groups}, {self.channels}) takes rows whose last axis is {self.channels}, got {shape}"
            )
        return shape

    def flops(self, shape: Shape) -> int:
        return 8 * math.prod(shape)


def _sums(images: Array) -> Array:
    """The sums over all places, (rows, channels) of (rows, places, channels): in float64 where there are many places,
    of which float32 would lose what small deviations from a large mean are."""
    parts = [images[:, start : start + PLACES] for start in range(0, images.shape[1], PLACES)]
    sums = [np.ones(part.shape[1], part.dtype) @ part for part in parts]
    return sums[0] if len(sums) == 1 else np.add.reduce(sums, axis=0, dtype=np.float64)


def _shared(sums: Array, share: Array, like: Array) -> Array:
    """Means from sums over places and what each channel's share in them is, (rows, 1, channels)."""
    means: Array = (sums @ share.astype(sums.dtype))[:, None].astype(like.dtype, copy=False)
    return means


def _mean(rows: Array) -> Array:
    """The mean of each row, (rows, 1): a product of matrices is several times faster than adding along short rows."""
    features = rows.shape[1]
    means: Array = rows @ np.full((features, 1), 1 / features, rows.dtype)
    return means


def _mean_product(a: Array, b: Array) -> Array:
    """The mean over each row of a * b, (rows, 1)."""
    means: Array = np.vecdot(a, b)[:, None]
    means *= 1 / a.shape[1]
    return means

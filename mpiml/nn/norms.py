"""Normalisation of the values of a row, or of parts of it."""

from __future__ import annotations

import math

import numpy as np

from mpiml.nn.blocks import blocks
from mpiml.nn.layer import Array, At, Backward, Layer
from mpiml.nn.parameters import Gradients, Parameter, Shape, constant


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
            centred = np.subtract(rows[block], rows[block].mean(axis=1, keepdims=True), out=normal[block])
            variance = np.square(centred).mean(axis=1, keepdims=True)
            inverse[block] = 1 / np.sqrt(variance + self.epsilon)
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
                np.multiply(dnormal, normal[block], out=product)
                along = product.mean(axis=1, keepdims=True)
                dnormal -= dnormal.mean(axis=1, keepdims=True)
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
            inverse[block] = 1 / np.sqrt(np.square(rows[block]).mean(axis=1, keepdims=True) + self.epsilon)
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
                along = np.multiply(dnormal, normal[block], out=product).mean(axis=1, keepdims=True)
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
        for some in blocks(len(x), places * self.channels * x.itemsize):
            centred = np.subtract(images[some], self._mean(images[some]), out=normal[some])
            variance = self._mean(np.square(centred, out=out[some]))
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
                dgain += np.add.reduce(product, axis=(0, 1))
                dbias += np.add.reduce(dy[some], axis=(0, 1))
                product *= gain
                dnormal = np.multiply(dy[some], gain, out=out[some])
                along = self._mean(product)
                dnormal -= self._mean(dnormal)
                dnormal -= np.multiply(normal[some], along, out=product)
                dnormal *= inverse[some]
            return dx

        return y, backward

    def _mean(self, images: Array) -> Array:
        """The mean over the places and the channels of a group, once for every channel: (rows, 1, channels)."""
        sums = np.add.reduce(images, axis=1).reshape(len(images), self.groups, self.channels // self.groups)
        means = np.add.reduce(sums, axis=2) * (self.groups / (images.shape[1] * self.channels))
        return np.repeat(means, self.channels // self.groups, axis=1)[:, None]

    def output_shape(self, shape: Shape) -> Shape:
        if shape[-1:] != (self.channels,):
            raise ValueError(
                f"GroupNorm({self.groups}, {self.channels}) takes rows whose last axis is {self.channels}, got {shape}"
            )
        return shape

    def flops(self, shape: Shape) -> int:
        return 8 * math.prod(shape)

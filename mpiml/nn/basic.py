"""Layers that most models contain: linear maps, dropout, reshaping, and residual connections."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mpiml.nn.base import Array, At, Backward, Layer, check_last_axis, forward, stack_flops, stack_shapes
from mpiml.nn.parameters import Gradients, Parameter, Shape, constant, uniform
from mpiml.random import generator


class Linear(Layer):
    """y = x W + b, with W (inputs, outputs); x (rows, ..., inputs), y (rows, ..., outputs).

    First values of W are uniform with variance gain^2 / inputs; the default gain is for a ReLU after the layer: He et
    al., "Delving deep into rectifiers", ICCV 2015.
    """

    splits = True

    def __init__(self, inputs: int, outputs: int, gain: float = math.sqrt(2.0)):
        self.inputs, self.outputs = inputs, outputs
        self.weight = Parameter((inputs, outputs), uniform(gain * math.sqrt(3.0 / inputs)))
        self.bias = Parameter((outputs,), constant(0.0))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        weight = self.weight.value
        flat = x if x.ndim == 2 else x.reshape(-1, self.inputs)
        y = flat @ weight
        y += self.bias.value

        def backward(dy: Array, grads: Gradients) -> Array | None:
            dy = dy if dy.ndim == 2 else dy.reshape(-1, self.outputs)

            def by_weights() -> None:
                if not self.weight.frozen:
                    np.matmul(flat.T, dy, out=grads[self.weight])
                np.add.reduce(dy, axis=0, out=grads[self.bias])

            grads.later(by_weights)
            if not self.needs_dx:
                return None
            dx = dy @ weight.T
            return dx if x.ndim == 2 else dx.reshape(x.shape)

        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], self.outputs), backward

    def output_shape(self, shape: Shape) -> Shape:
        check_last_axis(self, self.inputs, shape, self.inputs, self.outputs)
        return (*shape[:-1], self.outputs)

    def flops(self, shape: Shape) -> int:
        return 2 * math.prod(shape) * self.outputs


class Dropout(Layer):
    """In training, zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); any shape.

    Srivastava et al., "Dropout", JMLR 15, 2014.
    """

    def __init__(self, rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"dropout rate {rate}: must be at least 0 and less than 1")
        self.rate = rate

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        if not at.training or self.rate == 0:
            return x, lambda dy, grads: dy
        random = generator(at.seed, "dropout", self.path, at.step, at.microbatch)
        keep = random.random(x.shape, dtype=np.float32) >= self.rate
        scale = np.multiply(keep, 1 / (1 - self.rate), dtype=x.dtype)
        return x * scale, lambda dy, grads: dy * scale


class Flatten(Layer):
    """Flattens each row: x (rows, ...), y (rows, values of a row)."""

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        return x.reshape(len(x), math.prod(x.shape[1:])), lambda dy, grads: dy.reshape(x.shape)

    def output_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)

    def flops(self, shape: Shape) -> int:
        return 0


class Reshape(Layer):
    """Reshapes each row: x (rows, ...), y (rows, *shape), with as many values in a row."""

    def __init__(self, shape: Shape):
        self.shape = shape

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        return x.reshape(len(x), *self.shape), lambda dy, grads: dy.reshape(x.shape)

    def output_shape(self, shape: Shape) -> Shape:
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"Reshape{self.shape} takes rows of {math.prod(self.shape)} values, got {shape}")
        return self.shape

    def flops(self, shape: Shape) -> int:
        return 0


class Residual(Layer):
    """y = x + f(x), where f is a stack of layers that keeps the shape of x: He et al., "Deep residual learning for
    image recognition", CVPR 2016."""

    def __init__(self, *layers: Layer):
        self.layers = list(layers)

    def inner(self) -> Sequence[Layer]:
        return self.layers

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        y, inner_backward = forward(self.layers, x, at)

        def backward(dy: Array, grads: Gradients) -> Array | None:
            dx = inner_backward(dy, grads)
            return None if dx is None else dy + dx

        return x + y, backward

    def output_shape(self, shape: Shape) -> Shape:
        inside = stack_shapes(self.layers, shape)[-1]
        if inside != shape:
            raise ValueError(f"Residual needs layers that keep the shape of a row, but they turn {shape} into {inside}")
        return shape

    def flops(self, shape: Shape) -> int:
        return sum(stack_flops(self.layers, shape)) + math.prod(shape)

"""Layers. A layer is called as `y, backward = layer(x, at)`; later `dx = backward(dy, grads)`.

x and y hold one row per example, first axis. `backward` writes the gradients of the layer's parameters into
`grads[parameter]` and returns the gradient by x, or None where nobody needs it. What `backward` needs it holds
itself, so any number of micro-batches may be in flight; nothing that it holds, and no argument, is written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpiml.nn.parameters import Gradients, Parameter, Shape, constant, uniform
from mpiml.random import generator

Array = NDArray[np.floating]
Backward = Callable[[Array, Gradients], Array | None]


@dataclass(frozen=True)
class At:
    """Where in the run a layer is called: all that a layer may depend on besides its input and its parameters."""

    training: bool
    seed: int = 0
    step: int = 0
    microbatch: int = 0


class Layer:
    """What every layer has. A layer of one's own derives from this and defines `__call__`, and `output_shape` and
    `flops` where the defaults (same shape; one operation per element) are wrong.

    Attributes:
        path: "layers.2", the place in the model; names of parameters and keys of random numbers begin with it.
        needs_dx: False on the first layer with parameters: nobody reads its gradient by x.
    """

    path = ""
    needs_dx = True

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        raise TypeError(f"{type(self).__name__} defines no __call__")

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of a row of y for rows of `shape`. Raises ValueError for rows that the layer cannot take."""
        return shape

    def flops(self, shape: Shape) -> int:
        """Floating-point operations of the forward pass for a row of `shape`."""
        return math.prod(shape)

    def inner(self) -> Sequence[Layer]:
        """The layers that this one is made of."""
        return ()


class Linear(Layer):
    """y = x W + b, with W (inputs, outputs); x (rows, inputs), y (rows, outputs).

    He et al., "Delving deep into rectifiers", ICCV 2015, for the first values: uniform, variance 2 / inputs, or
    `gain` squared / inputs.
    """

    def __init__(self, inputs: int, outputs: int, gain: float = math.sqrt(2.0)):
        self.inputs, self.outputs = inputs, outputs
        self.weight = Parameter((inputs, outputs), uniform(gain * math.sqrt(3.0 / inputs)))
        self.bias = Parameter((outputs,), constant(0.0))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        weight = self.weight.value
        y = x @ weight
        y += self.bias.value

        def backward(dy: Array, grads: Gradients) -> Array | None:
            np.matmul(x.T, dy, out=grads[self.weight])
            np.add.reduce(dy, axis=0, out=grads[self.bias])
            dx: Array | None = dy @ weight.T if self.needs_dx else None
            return dx

        return y, backward

    def output_shape(self, shape: Shape) -> Shape:
        if shape != (self.inputs,):
            raise ValueError(f"Linear({self.inputs}, {self.outputs}) takes rows of shape ({self.inputs},), got {shape}")
        return (self.outputs,)

    def flops(self, shape: Shape) -> int:
        return 2 * self.inputs * self.outputs


class ReLU(Layer):
    """y = max(x, 0)."""

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        y = np.maximum(x, 0)
        return y, lambda dy, grads: dy * (y > 0)


class Tanh(Layer):
    """y = tanh(x)."""

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        y = np.tanh(x)
        return y, lambda dy, grads: dy * (1 - y * y)


class GELU(Layer):
    """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): Hendrycks and Gimpel, "Gaussian error linear units", 2016."""

    SCALE = math.sqrt(2.0 / math.pi)
    CUBIC = 0.044715

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        square = x * x
        t = np.tanh(self.SCALE * x * (1 + self.CUBIC * square))
        y = 0.5 * x * (1 + t)

        def backward(dy: Array, grads: Gradients) -> Array:
            slope = self.SCALE * (1 + 3 * self.CUBIC * square)
            dx: Array = dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope)
            return dx

        return y, backward

    def flops(self, shape: Shape) -> int:
        return 10 * math.prod(shape)


class LayerNorm(Layer):
    """y = g (x - mean) / sqrt(variance + epsilon) + b over the last axis: Ba et al., "Layer normalization", 2016."""

    def __init__(self, features: int, epsilon: float = 1e-5):
        self.features, self.epsilon = features, epsilon
        self.gain = Parameter((features,), constant(1.0))
        self.bias = Parameter((features,), constant(0.0))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        gain = self.gain.value
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        inverse = 1 / np.sqrt(variance + self.epsilon)
        normal = centred * inverse

        def backward(dy: Array, grads: Gradients) -> Array:
            rows = tuple(range(dy.ndim - 1))
            np.add.reduce(dy * normal, axis=rows, out=grads[self.gain])
            np.add.reduce(dy, axis=rows, out=grads[self.bias])
            dnormal = dy * gain
            along = (dnormal * normal).mean(axis=-1, keepdims=True)
            dx: Array = inverse * (dnormal - dnormal.mean(axis=-1, keepdims=True) - normal * along)
            return dx

        return normal * gain + self.bias.value, backward

    def output_shape(self, shape: Shape) -> Shape:
        if shape[-1:] != (self.features,):
            raise ValueError(f"LayerNorm({self.features}) takes rows whose last axis is {self.features}, got {shape}")
        return shape

    def flops(self, shape: Shape) -> int:
        return 8 * math.prod(shape)


class Dropout(Layer):
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate), in training only.

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
    """Rows of any shape become rows of one axis."""

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        return x.reshape(len(x), math.prod(x.shape[1:])), lambda dy, grads: dy.reshape(x.shape)

    def output_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)

    def flops(self, shape: Shape) -> int:
        return 0


class Residual(Layer):
    """y = x + f(x), where f is a stack of layers that keeps the shape: He et al., "Deep residual learning", 2015."""

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


def forward(layers: Sequence[Layer], x: Array, at: At) -> tuple[Array, Backward]:
    """Calls the layers one after the other: a stack of layers is a layer.

    What one hands to the next is made what a message between stages would make it: rows one after the other in
    memory, in the input's dtype. A cut between two layers then changes nothing.
    """
    backwards: list[Backward] = []
    for layer in layers:
        y, backward_of_layer = layer(x, at)
        x = np.ascontiguousarray(y, x.dtype)
        if at.training:
            backwards.append(backward_of_layer)

    def backward(dy: Array, grads: Gradients) -> Array | None:
        for index in reversed(range(len(backwards))):
            dx = backwards[index](dy, grads)
            if grads.complete:
                grads.finished(parameters([layers[index]]))
            if dx is None:
                if parameters(layers[:index]):
                    raise ValueError(f"{type(layers[index]).__name__} gives no gradient to the layers before it")
                return None
            dy = np.ascontiguousarray(dx, dy.dtype)
        return dy

    return x, backward


def stack_shapes(layers: Sequence[Layer], shape: Shape) -> list[Shape]:
    """The shape of a row before each layer, and after the last."""
    shapes = [shape]
    for layer in layers:
        shapes.append(layer.output_shape(shapes[-1]))
    return shapes


def stack_flops(layers: Sequence[Layer], shape: Shape) -> list[int]:
    """Forward floating-point operations of each layer for a row of `shape`."""
    return [layer.flops(before) for layer, before in zip(layers, stack_shapes(layers, shape), strict=False)]


def name(layers: Sequence[Layer], prefix: str = "layers") -> None:
    """Give every layer its path and every parameter its name.

    Raises ValueError for a layer that stands in two places: its parameters have room for one gradient.
    """
    flat = list(everything(layers))
    if len({id(layer) for layer in flat}) < len(flat):
        twice = next(layer for index, layer in enumerate(flat) if any(layer is other for other in flat[:index]))
        raise ValueError(f"one {type(twice).__name__} stands in two places of the model; make two")
    for index, layer in enumerate(layers):
        layer.path = f"{prefix}.{index}"
        for attribute, parameter in own_parameters(layer):
            parameter.name = f"{layer.path}.{attribute}"
        name(layer.inner(), f"{layer.path}.layers")


def everything(layers: Sequence[Layer]) -> Iterator[Layer]:
    """All layers, also those inside others."""
    for layer in layers:
        yield layer
        yield from everything(layer.inner())


def own_parameters(layer: Layer) -> Iterator[tuple[str, Parameter]]:
    """The parameters that are attributes of the layer itself, with the attributes' names."""
    return ((key, value) for key, value in vars(layer).items() if isinstance(value, Parameter))


def parameters(layers: Sequence[Layer]) -> list[Parameter]:
    """All parameters in layer order."""
    return [parameter for layer in everything(layers) for _, parameter in own_parameters(layer)]


def skip_first_dx(layers: Sequence[Layer]) -> None:
    """Tell the first layer with parameters, and those before it, that nobody reads their gradients by x."""
    for layer in everything(layers):
        layer.needs_dx = True
    for layer in layers:
        layer.needs_dx = False
        if parameters([layer]):
            break

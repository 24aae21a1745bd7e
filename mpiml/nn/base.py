"""What a layer is, and what a list of layers can do.

A layer is called as `y, backward = layer(x, at)`; later `dx = backward(dy, grads)`.

x and y hold one row per example, first axis. `backward` writes the gradients of the layer's parameters into
`grads[parameter]` and returns the gradient by x, or None where nobody needs it. What `backward` needs it holds
itself, so any number of micro-batches may be in flight; nothing that it holds, and no argument, is written to.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.errors import ConfigError
from mpiml.nn.parameters import Gradients, Parameter, Shape

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
    `flops` where the defaults (same shape; one operation per element) are wrong. Ranks compare its public attributes
    before step 1; what differs between them has a name that begins with "_".

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

    def check_place(self, shape: Shape, tokens: int) -> None:
        """Raise ValueError if the layer cannot be trained where it stands in the model, on rows of `shape`.

        `tokens` is how many token ids these rows may hold; 0 if they come from a layer that has parameters.
        """

    def inner(self) -> Sequence[Layer]:
        """The layers that this one is made of."""
        return ()

    def own_parameters(self) -> Mapping[str, Parameter]:
        """The parameters of the layer itself, by their names in it: those of the attributes that hold them."""
        return {key: value for key, value in vars(self).items() if isinstance(value, Parameter)}

    def described(self) -> dict[str, str]:
        """What ranks must agree in besides the parameters, by path."""
        return {self.path: described(self)}


def forward(layers: Sequence[Layer], x: Array, at: At, learned: bool = False) -> tuple[Array, Backward]:
    """Calls the layers one after the other: a stack of layers is a layer.

    What one hands to the next is made what a message between stages would make it: rows one after the other in
    memory, in the input's dtype. A cut between two layers then changes nothing.

    Args:
        learned: whether layers before these have parameters, so that the gradient by x is needed.

    Raises ConfigError, as `backward` does, for a layer that gives another shape than it says, or no gradient.
    """
    backwards: list[tuple[Backward, Shape]] = []
    for layer in layers:
        y, backward_of_layer = layer(x, at)
        y = np.ascontiguousarray(y, x.dtype)
        _check(layer, "outputs", y.shape, (len(x), *layer.output_shape(x.shape[1:])), "its output_shape says")
        if at.training:
            backwards.append((backward_of_layer, x.shape))
        x = y

    def backward(dy: Array, grads: Gradients) -> Array | None:
        for index in reversed(range(len(backwards))):
            backward_of_layer, shape = backwards[index]
            dx = backward_of_layer(dy, grads)
            if grads.complete:
                grads.finished(parameters([layers[index]]))
            if dx is None:
                if learned or parameters(layers[:index]):
                    raise ConfigError(f"{_named(layers[index])} gives no gradient to the layers before it")
                return None
            _check(layers[index], "gradients", np.shape(dx), shape, "its input has")
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
        for key, parameter in layer.own_parameters().items():
            parameter.name = f"{layer.path}.{key}"
        name(layer.inner(), f"{layer.path}.layers")


def everything(layers: Sequence[Layer]) -> Iterator[Layer]:
    """All layers, also those inside others."""
    for layer in layers:
        yield layer
        yield from everything(layer.inner())


def parameters(layers: Sequence[Layer]) -> list[Parameter]:
    """All parameters in layer order."""
    return [parameter for layer in everything(layers) for parameter in layer.own_parameters().values()]


def skip_first_dx(layers: Sequence[Layer]) -> None:
    """Tell the first layer with parameters, and those before it, that nobody reads their gradients by x."""
    for layer in everything(layers):
        layer.needs_dx = True
    for layer in layers:
        layer.needs_dx = False
        if parameters([layer]):
            break


def _check(layer: Layer, what: str, shape: Shape, needed: Shape, why: str) -> None:
    """Raise ConfigError unless a layer gives an array of the shape, rows first, that is needed."""
    if shape == needed:
        return
    if shape[1:] != needed[1:]:
        raise ConfigError(f"{_named(layer)} gives {what} of shape {shape[1:]} for a row, but {why} {needed[1:]}")
    raise ConfigError(f"{_named(layer)} gives {what} of {shape[0] if shape else 0} rows for {needed[0]}")


def described(thing: Any) -> str:
    """The kind of a layer, or of what it is made of, and its public attributes that are numbers, text or arrays."""
    named = {name: value for name, value in vars(thing).items() if name[0] != "_" and name not in vars(Layer)}
    values = [f"{name}={_described(value)}" for name, value in named.items() if _is_plain(value)]
    return f"{type(thing).__name__}({', '.join(values)})"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    return isinstance(value, (int, float, complex, str, np.generic))


def _described(value: Any) -> str:
    """The value itself if that is short, else its shape and a checksum."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}:{zlib.crc32(value.tobytes()):08x}"
    text = repr(value)
    return text if len(text) <= 40 else f"{len(text)} letters:{zlib.crc32(text.encode()):08x}"


def _named(layer: Layer) -> str:
    """A layer in a message."""
    return f"{layer.path}, {type(layer).__name__},".lstrip(", ")

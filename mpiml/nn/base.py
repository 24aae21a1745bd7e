"""The base class of layers, and functions on lists of layers.

A layer is called as `y, backward = layer(x, at)`; later `dx = backward(dy, grads)`.

The first axis of x and y counts rows, one per example. `backward` writes the gradients of the layer's parameters into
`grads[parameter]` and returns the gradient by x; it may return None if `layer.needs_dx` is False. It may leave the
writing to a function that it gives to `grads.later`, which asks for `grads[parameter]` when it runs: with `--schedule
zb-h1`, while the rank would be idle. `backward` holds all that it needs, so any number of micro-batches may be in
flight; neither the arrays it holds nor the arguments are ever changed.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.errors import ConfigError
from mpiml.nn.constants import Constant
from mpiml.nn.parameters import Gradients, Parameter, Shape
from mpiml.nn.places import separate

Array = NDArray[np.floating]
Backward = Callable[[Array, Gradients], Array | None]


@dataclass(frozen=True)
class At:
    """When in the run a layer is called. A layer's output may depend on this, its input and its parameters only."""

    training: bool
    seed: int = 0
    step: int = 0
    microbatch: int = 0


class Layer:
    """The base class of layers. Your own layer derives from it and defines `__call__`; also `output_shape` and `flops`
    if the defaults (the shape stays; one operation per element) are wrong. Ranks compare its public attributes before
    step 1; begin the names of attributes that may differ between ranks with "_".

    Attributes:
        path: its position in the model, such as "layers.2"; its parameters' names and random keys begin with it.
        needs_dx: False for the first layer that is optimised and those before it: their gradients by x are not used.
        block: the Recompute that it stands in, at the top level of a model.
        transparent: whether the layers inside it have the paths that they would have without it.
        arrays: whether it takes and returns NumPy's arrays; else tensors, those of a device. It also takes arrays then.
        splits: whether backward leaves the gradients of its own parameters to `grads.later`, or they are small.
        least_rows: of a micro-batch that it can be trained on.
        notes: what a person should know before it is trained, a line each.
        joined: what parts of a user's model are this layer, if they could be several; as a sentence.
        torch_names: for each array, all names that its PyTorch module has for it: several if parts share it.
        torch_own_names: for each array, all names in the user's whole module, of which this layer is a part.
    """

    path = ""
    needs_dx = True
    block: Any = None
    transparent = False
    arrays = True
    splits = False
    least_rows = 1
    notes: Sequence[str] = ()
    joined = ""
    torch_names: Mapping[str, Sequence[str]] = {}
    torch_own_names: Mapping[str, Sequence[str]] = {}

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        raise TypeError(f"{type(self).__name__} defines no __call__")

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of a row of y if a row of x has `shape`. Raises ValueError if the layer cannot take such rows."""
        return shape

    def flops(self, shape: Shape) -> int:
        """Floating-point operations of the forward pass for a row of `shape`."""
        return math.prod(shape)

    def check_place(self, shape: Shape, tokens: int) -> None:
        """Raise ValueError if the layer cannot be trained at its position in the model, on rows of `shape`.

        `tokens`: the rows hold token ids below this number; 0 if a layer with parameters comes before.
        """

    def inner(self) -> Sequence[Layer]:
        """The layers inside this one."""
        return ()

    @property
    def given(self) -> Any:
        """What stands for it in the model as its user wrote it: itself, or the first module of which it is made."""
        return self

    @property
    def stack(self) -> Callable[[Sequence[Any]], Layer] | None:
        """What makes one layer of neighbours of this kind, with the same results, because that is faster; None if
        nothing does."""
        return None

    def own_parameters(self) -> Mapping[str, Parameter]:
        """The layer's own parameters, not those of inner layers, by attribute name."""
        return {key: value for key, value in vars(self).items() if isinstance(value, Parameter)}

    def own_constants(self) -> Mapping[str, Constant]:
        """The layer's own arrays that training does not change, by attribute name."""
        return {}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Within the block the layer may be called with other memory for its parameters; it keeps none of that."""
        try:
            yield
        finally:
            for parameter in self.own_parameters().values():
                vars(parameter).pop("value", None)

    def described(self) -> dict[str, str]:
        """Descriptions, by path, that must be equal on all ranks; parameters have their own (Parameter.described)."""
        return {self.path: described(self)}


def forward(layers: Sequence[Layer], x: Array, at: At, learned: bool = False) -> tuple[Array, Backward]:
    """Calls the layers one after the other: a stack of layers is itself a layer.

    Every array between two layers is made C-contiguous and of the input's dtype, as messages between stages are: the
    results are the same wherever the model is cut into stages.

    Args:
        learned: whether layers before these have parameters that are updated, so that the gradient by x is needed.

    Raises ConfigError if a layer returns another shape than its `output_shape` says; so does `backward`, also if a
    layer returns no gradient that is needed.
    """
    backwards: list[tuple[Layer, Backward, Shape]] = []
    for layer in layers:
        y, backward_of_layer = _checked(layer, layer(x, at), at.training)
        y = np.ascontiguousarray(y, x.dtype) if layer.arrays else y
        if y.shape != (needed := (len(x), *layer.output_shape(x.shape[1:]))):
            check_shape(layer, "outputs", y.shape, needed, "its output_shape says")
        # The backward pass ends at the first layer that needs it; those before that keep nothing of their call.
        if at.training and (backwards or learned or layer.needs_dx or updated([layer])):
            backwards.append((layer, backward_of_layer, x.shape))
        x = y

    def backward(dy: Array, grads: Gradients) -> Array | None:
        for index in reversed(range(len(backwards))):
            layer, backward_of_layer, shape = backwards[index]
            dx = backward_of_layer(dy, grads)
            if grads.complete:
                grads.finished(parameters([layer]))
            if dx is None:
                if not learned and not (index and updated([before for before, _, _ in backwards[:index]])):
                    return None
                if layer.needs_dx:
                    raise ConfigError(f"{_named(layer)} gives no gradient to the layers before it")
                # those have running averages alone, which no gradient changes
                dx = np.zeros(shape, dy.dtype) if isinstance(dy, np.ndarray) else dy.new_zeros(shape)
            if (given := np.shape(dx)) != shape:
                check_shape(layer, "gradients", given, shape, "its input has")
            dy = np.ascontiguousarray(dx, dy.dtype) if layer.arrays else dx
        return dy

    return x, backward


def stacked(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, neighbours in one where `Layer.stack` makes one of them."""
    result: list[Layer] = []
    for stack, group in itertools.groupby(layers, key=lambda layer: layer.stack):
        neighbours = list(group)
        result += [stack(neighbours)] if stack and len(neighbours) > 1 else neighbours
    return result


def stack_shapes(layers: Sequence[Layer], shape: Shape) -> list[Shape]:
    """The shape of a row before each layer, and after the last, for input rows of `shape`."""
    shapes = [shape]
    for layer in layers:
        shapes.append(layer.output_shape(shapes[-1]))
    return shapes


def stack_flops(layers: Sequence[Layer], shape: Shape) -> list[int]:
    """Floating-point operations of each layer's forward pass, for an input row of `shape`."""
    return [layer.flops(before) for layer, before in zip(layers, stack_shapes(layers, shape), strict=False)]


def name(layers: Sequence[Layer]) -> None:
    """Give every layer its path and every parameter its name; one that stands in several layers becomes a parameter for
    each place.

    Raises ValueError if the model contains one layer twice, or for a parameter that cannot stand in several layers.
    """
    flat = list(everything(layers))
    if len({id(layer) for layer in flat}) < len(flat):
        twice = next(layer for index, layer in enumerate(flat) if any(layer is other for other in flat[:index]))
        raise ValueError(f"the model contains the same {type(twice).__name__} object twice; make two of them")
    separate((layer, key, parameter) for layer in flat for key, parameter in layer.own_parameters().items())
    _name(layers, "layers")


def _name(layers: Sequence[Layer], prefix: str) -> None:
    for index, layer in enumerate(numbered(layers)):
        layer.path = f"{prefix}.{index}"
        for key, parameter in layer.own_parameters().items():
            parameter.name = f"{layer.path}.{key}"
        _name(layer.inner(), f"{layer.path}.layers")
    for layer in layers:
        if layer.transparent:
            layer.path = next(numbered([layer])).path


def numbered(layers: Sequence[Layer]) -> Iterator[Layer]:
    """The layers that have numbers of their own: in the place of each that is transparent, those inside it."""
    for layer in layers:
        yield from numbered(layer.inner()) if layer.transparent else [layer]


def everything(layers: Sequence[Layer]) -> Iterator[Layer]:
    """All layers, including those inside others, each before its inner ones."""
    for layer in layers:
        yield layer
        yield from everything(layer.inner())


def parameters(layers: Sequence[Layer]) -> list[Parameter]:
    """The parameters of all layers, including inner ones, in the order of `everything`."""
    return [parameter for layer in everything(layers) for parameter in layer.own_parameters().values()]


def updated(layers: Sequence[Layer]) -> bool:
    """Whether training changes any of the layers' parameters: optimises or averages."""
    return any(not own.frozen for layer in everything(layers) for own in layer.own_parameters().values())


def unsplit(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, including inner ones, that have parameters of their own and do not split their backward pass."""
    return [layer for layer in everything(layers) if layer.own_parameters() and not layer.splits]


def constants(layers: Sequence[Layer]) -> dict[str, Constant]:
    """The constants of all layers, including inner ones, by name, such as "layers.2.mask"."""
    return {f"{layer.path}.{key}": own for layer in everything(layers) for key, own in layer.own_constants().items()}


def skip_first_dx(layers: Sequence[Layer]) -> None:
    """Set `needs_dx` to False for the first layer that is optimised and those before it, and to True for all others."""
    for layer in everything(layers):
        layer.needs_dx = True
    for layer in layers:
        layer.needs_dx = False
        if is_optimised(layer):
            break


def is_optimised(layer: Layer) -> bool:
    """Whether the layer has parameters that an optimizer changes."""
    return any(parameter.optimised for parameter in parameters([layer]))


def _checked(layer: Layer, returned: Any, training: bool) -> tuple[Array, Backward]:
    """What a layer returned. Raises ConfigError unless that is a pair of outputs and, in training, a function."""
    pair = isinstance(returned, (tuple, list)) and len(returned) == 2
    if pair and returned[0] is not None and (callable(returned[1]) or not training):
        return returned[0], returned[1]
    kind = f"({', '.join(type(part).__name__ for part in returned)})" if pair else type(returned).__name__
    raise ConfigError(f"{_named(layer)} returns {kind}, but a layer returns outputs and a function, backward")


def check_shape(layer: Layer, what: str, shape: Shape, needed: Shape, why: str) -> None:
    """Raise ConfigError unless the array that a layer returned has the needed shape, rows first."""
    if shape == needed:
        return
    if shape[1:] != needed[1:]:
        raise ConfigError(f"{_named(layer)} gives {what} of shape {shape[1:]} for a row, but {why} {needed[1:]}")
    raise ConfigError(f"{_named(layer)} gives {what} of {shape[0] if shape else 0} rows for {needed[0]}")


def described(thing: Any) -> str:
    """The class of a layer or a module, and its public attributes that are numbers, text or arrays, as text."""
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
    """A layer's path and class, for the beginning of a message."""
    return f"{layer.path}, {type(layer).__name__},".lstrip(", ")


def check_last_axis(layer: Layer, size: int, shape: Shape, *arguments: int) -> None:
    """Raise ValueError unless rows of `shape` have `size` values on their last axis, as a layer needs that was made
    with these arguments."""
    if shape[-1:] != (size,):
        name = f"{type(layer).__name__}({', '.join(map(str, arguments))})"
        raise ValueError(f"{name} takes rows whose last axis is {size}, got {shape}")

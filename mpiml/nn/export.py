"""Weights under the names, and in the order of axes, that PyTorch has for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.nn.attention import CausalSelfAttention
from mpiml.nn.base import Layer, parameters, stack_shapes
from mpiml.nn.basic import Flatten, Linear, Residual
from mpiml.nn.convolution import Conv2d
from mpiml.nn.parameters import Shape

Array = NDArray[Any]
ORDER = {Linear: (1, 0), Conv2d: (3, 2, 0, 1)}  # of the axes of `weight`; all else is as here
NAMES = {"gain": "weight", "running_variance": "running_var"}


def to_torch(layers: Sequence[Layer], arrays: Mapping[str, Array], shape: Shape) -> dict[str, Array]:
    """The state dict of the torch.nn.Sequential of the modules of the same names: the same outputs for the same inputs.

    Images go (rows, channels, H, W) through PyTorch's modules; a Linear after a Flatten of images is put in that order.
    CausalSelfAttention is a MultiheadAttention; Residual a module whose attribute `layers` is a Sequential; of
    PositionalEmbedding, and of layers of one's own, parameters keep name and order.

    Args:
        layers: of a model, named.
        arrays: the parameters by name, as a checkpoint holds them, or gradients.
        shape: of an input row.
    """
    return {name.removeprefix("layers."): np.ascontiguousarray(array) for name, array in _all(layers, arrays, shape)}


def _all(layers: Sequence[Layer], arrays: Mapping[str, Array], shape: Shape) -> Iterator[tuple[str, Array]]:
    image: Shape | None = None  # that has been flattened, until its values are mixed
    for layer, before in zip(layers, stack_shapes(layers, shape), strict=False):
        for attribute, parameter in layer.own_parameters().items():
            array = arrays[parameter.name]
            yield f"{layer.path}.{NAMES.get(attribute, attribute)}", _turned(layer, attribute, array, image)
        if isinstance(layer, Flatten):
            image = before if len(before) == 3 else None
        elif parameters([layer]):
            image = None
        if isinstance(layer, CausalSelfAttention):
            for linear, name in ((layer.project, "in_proj_"), (layer.combine, "out_proj.")):
                yield f"{layer.path}.{name}weight", arrays[linear.weight.name].T
                yield f"{layer.path}.{name}bias", arrays[linear.bias.name]
        elif isinstance(layer, Residual):
            yield from _all(layer.layers, arrays, before)
        else:
            yield from ((p.name, arrays[p.name]) for p in parameters(layer.inner()))


def _turned(layer: Layer, attribute: str, array: Array, image: Shape | None) -> Array:
    """A parameter with its axes in PyTorch's order; `image` is what has been flattened before the layer, if any."""
    if attribute == "weight" and isinstance(layer, Linear) and image:
        array = array.reshape(*image, -1).transpose(2, 0, 1, 3).reshape(array.shape)
    for kind, order in ORDER.items():
        if attribute == "weight" and isinstance(layer, kind):
            return array.transpose(order)
    return array

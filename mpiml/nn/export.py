"""Weights for PyTorch: under its names, with axes in its order."""

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
ORDER = {Linear: (1, 0), Conv2d: (3, 2, 0, 1)}  # PyTorch's axes of `weight`; it orders all other parameters as we do
NAMES = {"gain": "weight", "running_variance": "running_var"}


def to_torch(layers: Sequence[Layer], arrays: Mapping[str, Array], shape: Shape) -> dict[str, Array]:
    """A state dict for a torch.nn.Sequential of the modules of the same names, which then computes the same outputs.

    PyTorch's images are (rows, channels, H, W): the inputs of a Linear after a Flatten of images are reordered so.
    CausalSelfAttention becomes a MultiheadAttention, Residual a module whose attribute `layers` is a Sequential.
    Parameters of PositionalEmbedding, and of your own layers, keep their names and axes.

    Args:
        layers: the model's layers, named.
        arrays: the parameters by name, as a checkpoint holds them; or their gradients.
        shape: of an input row.
    """
    return {name.removeprefix("layers."): np.ascontiguousarray(array) for name, array in _all(layers, arrays, shape)}


def _all(layers: Sequence[Layer], arrays: Mapping[str, Array], shape: Shape) -> Iterator[tuple[str, Array]]:
    image: Shape | None = None  # the shape of an image that was flattened, until a layer mixes its values
    for layer, before in zip(layers, stack_shapes(layers, shape), strict=False):
        for attribute, parameter in layer.own_parameters().items():
            array = arrays[parameter.name]
            yield f"{layer.path}.{NAMES.get(attribute, attribute)}", _reordered(layer, attribute, array, image)
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


def _reordered(layer: Layer, attribute: str, array: Array, image: Shape | None) -> Array:
    """A parameter with its axes in PyTorch's order; `image` is the shape that was flattened before, if any."""
    if attribute == "weight" and isinstance(layer, Linear) and image:
        array = array.reshape(*image, -1).transpose(2, 0, 1, 3).reshape(array.shape)
    for kind, order in ORDER.items():
        if attribute == "weight" and isinstance(layer, kind):
            return array.transpose(order)
    return array

"""Weights of PyTorch and ours: what it calls each array of a model, with its axes in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.nn.attention import CausalSelfAttention
from mpiml.nn.base import Layer, constants, numbered, parameters, stack_shapes
from mpiml.nn.basic import Flatten, Linear, Residual
from mpiml.nn.batchnorm import BatchNorm2d
from mpiml.nn.convolution import Conv2d
from mpiml.nn.norms import GroupNorm, LayerNorm, RMSNorm
from mpiml.nn.parameters import Shape

Array = NDArray[Any]
ORDER = {Linear: (1, 0), Conv2d: (3, 2, 0, 1)}  # PyTorch's axes of `weight`; it orders all other parameters as we do
NORMS = (LayerNorm, RMSNorm, GroupNorm, BatchNorm2d)
NAMES = {"gain": "weight", "running_variance": "running_var"}  # PyTorch's, of what NORMS have


@dataclass(frozen=True)
class Form:
    """An array of a model, and what PyTorch makes of it.

    Attributes:
        names: in the state dict of a torch.nn.Sequential of all layers; a shared tensor has several.
        own_names: in the state dict of the user's own PyTorch module, if the model is one.
        shape: ours.
        split: `shape`, but for axes that are several of PyTorch's: those of an image that was flattened.
        order: the axes of `split` in PyTorch's order.
        torch_shape: PyTorch's shape.
    """

    names: Sequence[str]
    own_names: Sequence[str]
    shape: Shape
    split: Shape
    order: Sequence[int]
    torch_shape: Shape

    @classmethod
    def same(cls, shape: Shape, names: Sequence[str], own_names: Sequence[str] = ()) -> Form:
        """An array that PyTorch has as we have it."""
        return cls(names, own_names, shape, shape, range(len(shape)), shape)

    def to_torch(self, array: Array) -> Array:
        """Our array with PyTorch's axes."""
        return array.reshape(self.split).transpose(self.order).reshape(self.torch_shape)

    def from_torch(self, array: Array) -> Array:
        """PyTorch's array with our axes."""
        turned = array.reshape([self.split[axis] for axis in self.order])
        return turned.transpose(np.argsort(self.order)).reshape(self.shape)


def to_torch(layers: Sequence[Layer], arrays: Mapping[str, Array], shape: Shape) -> dict[str, Array]:
    """A state dict for a torch.nn.Sequential of the modules of the same names, which then computes the same outputs.

    PyTorch's images are (rows, channels, H, W): the inputs of a Linear after a Flatten of images are reordered so.
    CausalSelfAttention becomes a MultiheadAttention, Residual a module whose attribute `layers` is a Sequential.
    Parameters of PositionalEmbedding, and of your own layers, keep their names and axes. An array that stands in
    several layers is there under the names of all its places.

    Args:
        layers: the model's layers, named.
        arrays: the parameters by name, as a checkpoint holds them; or their gradients.
        shape: of an input row.
    """
    of_model = dict(_all(layers, shape))
    return {
        of_model[p.name].names[0]: np.ascontiguousarray(of_model[p.name].to_torch(arrays[p.first.name]))
        for p in parameters(layers)
    }


def forms(layers: Sequence[Layer], shape: Shape) -> dict[str, Form]:
    """The form of every array of a model, parameters and constants, by our name; arguments as of `to_torch`."""
    of_model = dict(_all(layers, shape))
    for parameter in parameters(layers):
        if parameter.first is not parameter:
            form, further = of_model[parameter.first.name], of_model.pop(parameter.name)
            names, own_names = [*form.names, *further.names], [*form.own_names, *further.own_names]
            of_model[parameter.first.name] = replace(form, names=names, own_names=own_names)
    return of_model


def _all(layers: Sequence[Layer], shape: Shape) -> Iterator[tuple[str, Form]]:
    image: Shape | None = None  # the shape of an image that was flattened, until a layer mixes its values
    layers = list(numbered(layers))
    for layer, before in zip(layers, stack_shapes(layers, shape), strict=False):
        shapes = {key: parameter.shape for key, parameter in layer.own_parameters().items()}
        shapes |= {key: constant.array.shape for key, constant in layer.own_constants().items()}
        for key, own in shapes.items():
            yield f"{layer.path}.{key}", _form(layer, key, own, image)
        if isinstance(layer, Flatten):
            image = before if len(before) == 3 else None
        elif parameters([layer]):
            image = None
        if isinstance(layer, CausalSelfAttention):
            for linear, name in ((layer.project, "in_proj_"), (layer.combine, "out_proj.")):
                yield linear.weight.name, _form(linear, "weight", linear.weight.shape, None, f"{layer.path}.{name}")
                yield linear.bias.name, _form(linear, "bias", linear.bias.shape, None, f"{layer.path}.{name}")
        elif isinstance(layer, Residual):
            yield from _all(layer.layers, before)
        else:
            inside = {p.name: p.shape for p in parameters(layer.inner())}
            inside |= {name: constant.array.shape for name, constant in constants(layer.inner()).items()}
            yield from ((name, Form.same(own, [name.removeprefix("layers.")])) for name, own in inside.items())


def _form(layer: Layer, key: str, shape: Shape, image: Shape | None, prefix: str = "") -> Form:
    """The form of a layer's array called `key`; `image` is the shape that was flattened before, if any, and `prefix`
    what PyTorch's name begins with, if not with the layer's path."""
    names = [NAMES.get(key, key)] if isinstance(layer, NORMS) else layer.torch_names.get(key, [key])
    full_names = [f"{prefix or f'{layer.path}.'}{name}".removeprefix("layers.") for name in names]
    same = Form.same(shape, full_names, layer.torch_own_names.get(key, ()))
    order = next((order for kind, order in ORDER.items() if isinstance(layer, kind) and key == "weight"), same.order)
    split, split_order = shape, order
    if image and isinstance(layer, Linear) and key == "weight":
        split, split_order = (*image, shape[1]), ORDER[Conv2d]
    return Form(full_names, same.own_names, shape, split, split_order, tuple(shape[axis] for axis in order))

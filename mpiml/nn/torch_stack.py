"""Neighbouring PyTorch modules called one after the other, with one backward pass of autograd through all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpiml.nn.base import Array, At, Backward, Layer, stack_shapes
from mpiml.nn.parameters import Gradients, Shape
from mpiml.nn.torch_tensors import constant, in_order, tensor_on

if TYPE_CHECKING:
    from mpiml.nn.torch_modules import TorchLayer


class TorchStack(Layer):
    """Neighbouring modules of a stage, called as one layer."""

    def __init__(self, layers: Sequence[TorchLayer]):
        self.layers, self.path, self.needs_dx = layers, layers[0].path, layers[0].needs_dx
        self.arrays = layers[0].arrays

    def inner(self) -> Sequence[Layer]:
        return self.layers

    def output_shape(self, shape: Shape) -> Shape:
        return stack_shapes(self.layers, shape)[-1]

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        return through(self.layers, x, at)


def through(layers: Sequence[TorchLayer], x: Array, at: At) -> tuple[Array, Backward]:
    """Call modules one after the other, and autograd back through all of them at once."""
    first, device = layers[0], layers[0].device
    wants_dx = first.needs_dx and not first.takes_ids(x)
    source = y = tensor_on(device, x).detach().requires_grad_(wants_dx and at.training)
    observed: list[dict[str, Array]] = []
    for layer in layers:
        if layer is not first:
            y = _boundary(y, device.boundary)
        y, of_layer = layer.forward(y, at)
        observed.append(of_layer)

    def backward(dy: Array, grads: Gradients) -> Array | None:
        for layer in layers:
            layer.begin_backward()
        if y.requires_grad:
            with first.redrawn(x, at), constant([tensor for layer in layers for tensor in layer.frozen]):
                y.backward(tensor_on(device, dy))
        for layer, of_layer in zip(layers, observed, strict=True):
            layer.write(of_layer, grads)
        if not wants_dx:
            return None
        dx = torch.zeros_like(source) if source.grad is None else source.grad.to_dense()
        passed: Array = dx.numpy() if first.arrays else dx
        return passed

    return y.detach().numpy() if first.arrays else y.detach(), backward


def _boundary(y: Tensor, boundary: int) -> Tensor:
    """The tensor between two modules, in memory that is as `as_tensor` makes it where the model is cut into stages, and
    so is its gradient: torch's bits depend on it."""
    y = in_order(y, boundary)
    if y.requires_grad:
        y.register_hook(functools.partial(in_order, boundary=boundary))
    return y

"""Trained layers as one PyTorch module that computes the same outputs, for those who take such modules: exporters.

Rows and weights keep our axes: images have their channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mpiml.errors import ConfigError
from mpiml.nn import layers as ours
from mpiml.nn.base import Layer, stack_shapes
from mpiml.nn.parameters import Shape
from mpiml.nn.torch_modules import TorchLayer

Compute = Callable[[Any, Tensor, Any], Tensor]  # of a layer: itself, x, and what has its weights as attributes


def module_of(layers: Sequence[Layer], shape: Shape) -> nn.Sequential:
    """A module (rows, *shape) -> outputs that computes what the layers do in an evaluation, with their weights.

    The layers are taken apart: PyTorch modules among them are not to be used as layers afterwards. Raises ConfigError
    for a layer of the user's own.
    """
    return nn.Sequential(
        *(_module(layer, before) for layer, before in zip(layers, stack_shapes(layers, shape), strict=False))
    )


def takes_ids(layers: Sequence[Layer], shape: Shape) -> bool:
    """Whether layers take integers, token ids."""
    first = layers[0]
    if isinstance(first, TorchLayer):
        return first.takes_ids(np.empty((1, *shape)))
    return isinstance(first, ours.Embedding)


def _module(layer: Layer, shape: Shape) -> nn.Module:
    if isinstance(layer, TorchLayer):
        return _Called(layer.evaluated(), layer.takes_ids(np.empty((1, *shape))), layer.dtype)
    if type(layer) is ours.Residual:
        return _Residual(module_of(layer.layers, shape))
    if type(layer) is ours.Recompute:
        return module_of(layer.layers, shape)
    if type(layer) is ours.CausalSelfAttention:
        return _Attention(layer, shape)
    if type(layer) not in COMPUTE:
        raise ConfigError(
            f"{layer.path}, {type(layer).__name__}, is a layer of your own, of which PyTorch knows nothing: models of "
            "PyTorch modules and of the layers that mpiml has can be exported"
        )
    return _Computed(layer, COMPUTE[type(layer)])


class _Called(nn.Module):
    """A user's module, called as a TorchLayer calls it."""

    def __init__(self, module: nn.Module, ids: bool, dtype: torch.dtype):
        super().__init__()
        self.module, self.ids, self.dtype = module, ids, dtype

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x.long() if self.ids else x)
        return y.to(self.dtype)


class _Computed(nn.Module):
    """A layer's weights, and what is computed with them."""

    def __init__(self, layer: Layer, compute: Compute):
        super().__init__()
        self.layer, self.compute = layer, compute
        for name, parameter in layer.own_parameters().items():
            self.register_buffer(name, torch.from_numpy(np.array(parameter.value)))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self.layer, x, self)


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return x + y


class _Attention(nn.Module):
    def __init__(self, layer: ours.CausalSelfAttention, shape: Shape):
        super().__init__()
        self.project, self.combine = _module(layer.project, shape), _module(layer.combine, shape)
        self.split = (3, layer.heads, layer.features // layer.heads)
        self.register_buffer("mask", torch.full((shape[0], shape[0]), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, self.split).permute(2, 0, 3, 1, 4)  # each (rows, heads, T, d)
        scores = q @ k.transpose(-2, -1) * self.split[-1] ** -0.5 + self.mask.to(q.dtype)
        y: Tensor = self.combine((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


def _batch_norm(layer: Any, x: Tensor, weights: Any) -> Tensor:
    inverse = (weights.running_variance + layer.epsilon).rsqrt()
    return weights.gain * ((x - weights.running_mean) * inverse) + weights.bias


def _group_norm(layer: Any, x: Tensor, weights: Any) -> Tensor:
    return _images(x, lambda x: functional.group_norm(x, layer.groups, weights.gain, weights.bias, layer.epsilon))


def _rms_norm(layer: Any, x: Tensor, weights: Any) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + layer.epsilon).rsqrt() * weights.gain


def _convolution(layer: Any, x: Tensor, weights: Any) -> Tensor:
    kernel = weights.weight.permute(3, 2, 0, 1)
    return _images(x, lambda x: functional.conv2d(x, kernel, weights.bias, layer.stride, layer.padding))


def _images(x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """What `compute` makes of images with their channels first, as PyTorch has them; here they are last."""
    return compute(x.movedim(-1, 1)).movedim(1, -1)


COMPUTE: dict[type[Layer], Compute] = {
    ours.Linear: lambda layer, x, weights: x @ weights.weight + weights.bias,
    ours.Dropout: lambda layer, x, weights: x,
    ours.Flatten: lambda layer, x, weights: x.flatten(1),
    ours.Reshape: lambda layer, x, weights: x.flatten(1).unflatten(1, layer.shape),
    ours.ReLU: lambda layer, x, weights: x.relu(),
    ours.Tanh: lambda layer, x, weights: x.tanh(),
    ours.GELU: lambda layer, x, weights: functional.gelu(x, approximate="tanh"),
    ours.SiLU: lambda layer, x, weights: functional.silu(x),
    ours.LayerNorm: lambda layer, x, weights: functional.layer_norm(
        x, x.shape[-1:], weights.gain, weights.bias, layer.epsilon
    ),
    ours.RMSNorm: _rms_norm,
    ours.GroupNorm: _group_norm,
    ours.BatchNorm2d: _batch_norm,
    ours.Conv2d: _convolution,
    ours.MaxPool2d: lambda layer, x, weights: _images(x, lambda x: functional.max_pool2d(x, layer.size)),
    ours.AvgPool2d: lambda layer, x, weights: _images(x, lambda x: functional.avg_pool2d(x, layer.size)),
    ours.GlobalAvgPool: lambda layer, x, weights: x.mean((1, 2)),
    ours.Embedding: lambda layer, x, weights: functional.embedding(x.long(), weights.weight),
    ours.Unembedding: lambda layer, x, weights: x @ weights.weight.T,
    ours.PositionalEmbedding: lambda layer, x, weights: x + weights.weight,
}

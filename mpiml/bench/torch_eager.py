"""The models of mpiml.nn as a PyTorch user writes them, and their training step on one core."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mpiml.bench.models import MOMENTUM, RATE


def mlp(hidden: Sequence[int]) -> nn.Module:
    """A perceptron 784-hidden-10."""
    widths = itertools.pairwise([784, *hidden, 10])
    return nn.Sequential(*[layer for a, b in widths for layer in (nn.Linear(a, b), nn.ReLU())][:-1])


def cnn(channels: int) -> nn.Module:
    """Two convolutions with pooling for images of 28 x 28 pixels, as mpiml.nn.convnets.cnn."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, channels), (channels, 2 * channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * channels * 7 * 7, 10))


def gpt(tokens: int, places: int, width: int, heads: int, blocks: int) -> nn.Module:
    """A language model, as mpiml.nn.transformers.gpt."""
    layers: list[nn.Module] = [Embeddings(tokens, places, width)]
    for _ in range(blocks):
        perceptron = [nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)]
        layers.append(Residual(nn.LayerNorm(width), CausalSelfAttention(width, heads)))
        layers.append(Residual(nn.LayerNorm(width), *perceptron))
    return nn.Sequential(*layers, nn.LayerNorm(width), nn.Linear(width, tokens))


def resnet(channels: int, outputs: int = 10) -> nn.Module:
    """A residual network with group normalisation for images of 3 channels: three sizes, one block each."""
    widths = [channels, 2 * channels, 4 * channels]
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for inputs, width in zip([channels, *widths], widths, strict=False):
        layers.append(Block(inputs, width, 1 if inputs == width else 2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], outputs))


class Block(nn.Module):
    """y = relu(f(x) + shortcut(x)), f two convolutions, each with a group normalisation."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.inner = nn.Sequential(
            *(nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(8, width)),
        )
        self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.inner(x) + self.shortcut(x))


class Embeddings(nn.Module):
    """The sum of token and position embeddings."""

    def __init__(self, tokens: int, places: int, width: int):
        super().__init__()
        self.token, self.place = nn.Embedding(tokens, width), nn.Embedding(places, width)

    def forward(self, x: Any) -> Any:
        return self.token(x) + self.place.weight


class Residual(nn.Module):
    """y = x + f(x)."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x: Any) -> Any:
        return x + self.inner(x)


class CausalSelfAttention(nn.Module):
    """Causal attention by PyTorch's own kernel."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.project, self.combine = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Any) -> Any:
        rows, places, width = x.shape
        split = (rows, places, 3, self.heads, width // self.heads)
        q, k, v = self.project(x).view(split).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.combine(y.transpose(1, 2).reshape(x.shape))


class Eager:
    """Trains a module on rows gathered from memory, by softmax cross-entropy; momentum or Adam.

    Args:
        x: rows of numbers or token ids; images are (height, width, channels), or as PyTorch has them if images is None.
        rows: rows of a step.
        images: memory format of images, contiguous_format (PyTorch's default) or channels_last.
        fused: whether the optimizer's kernels are fused.
    """

    def __init__(
        self,
        module: nn.Module,
        x: np.ndarray,
        y: np.ndarray,
        rows: int,
        optimizer: str,
        images: str | None = None,
        fused: bool = True,
    ):
        torch.set_num_threads(1)
        if images and x.ndim == 4:
            module = module.to(memory_format=getattr(torch, images))
            x = x.transpose(0, 3, 1, 2).copy()  # with strides that say so, even of one channel
        self.module, self.x, self.y = module, torch.from_numpy(x), torch.from_numpy(y)
        if optimizer == "momentum":
            self.optimizer: Any = torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM, fused=fused)
        else:
            self.optimizer = torch.optim.Adam(module.parameters(), lr=RATE, fused=fused)
        self.order, self.rows, self.at = torch.randperm(len(x)), rows, 0

    def step(self) -> None:
        """One step."""
        self.train(self.order[self.at : self.at + self.rows])
        self.at = (self.at + self.rows) % (len(self.order) - self.rows + 1)

    def train(self, index: Any) -> None:
        """One step on these rows."""
        self.optimizer.zero_grad(set_to_none=True)
        y: Any = self.module(self.x[index])
        loss = nn.functional.cross_entropy(y.flatten(0, -2), self.y[index].flatten())
        loss.backward()
        self.optimizer.step()

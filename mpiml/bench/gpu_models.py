"""PyTorch modules and random rows on which a device is checked: `--model` and `--data` of its runs.

All operations have deterministic kernels on GPUs, attention too (PyTorch's own, by its memory-efficient kernel or the
flash kernel).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpiml.data.dataset import Dataset
from mpiml.nn.parameters import Shape

ROWS, TESTS = 512, 64


@dataclass(frozen=True)
class Size:
    """How large a gpt is."""

    tokens: int
    places: int
    width: int
    heads: int
    blocks: int

    def module(self) -> Any:
        """It, as a sequence of PyTorch modules."""
        from mpiml.bench import torch_eager

        return torch_eager.gpt(self.tokens, self.places, self.width, self.heads, self.blocks)

    @property
    def parameters(self) -> int:
        """How many it has: matrices and biases of the blocks, norms, embeddings, and the output's own matrix."""
        block = 12 * self.width**2 + 13 * self.width
        ends = (2 * self.tokens + self.places) * self.width + self.tokens
        return self.blocks * block + ends + 2 * self.width

    def rows(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Random token ids, and as many to predict: (count, places) each."""
        x, y = np.random.default_rng(0).integers(0, self.tokens, (2, count, self.places))
        y.flat[0] = self.tokens - 1  # so that all tokens count as classes
        return x, y


SMALL = Size(tokens=97, places=32, width=64, heads=4, blocks=2)
# GPT-2's size: 124 M parameters, and 39 M more because the output has a matrix of its own.
GPT2 = Size(tokens=50304, places=1024, width=768, heads=12, blocks=12)


def gpt(shape: Shape, outputs: int) -> Any:
    """A small language model."""
    return SMALL.module()


def gpt2(shape: Shape, outputs: int) -> Any:
    """A language model of GPT-2's size."""
    return GPT2.module()


def cnn(shape: Shape, outputs: int, dropout: float = 0.1) -> Any:
    """Three convolutions with batch normalisation and dropout, for images (3, 16, 16)."""
    from torch import nn

    layers: list[Any] = []
    for inputs, channels in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, outputs))


def images() -> Dataset:
    """Random images (3, 16, 16) of 10 classes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS + TESTS, 3, 16, 16), np.float32)
    return _cut(x, np.arange(len(x)) % 10)


def tokens() -> Dataset:
    """Random rows for `gpt`."""
    return _cut(*SMALL.rows(ROWS + TESTS))


def gpt2_tokens() -> Dataset:
    """Random rows for `gpt2`."""
    x, y = GPT2.rows(64)
    return Dataset.from_arrays(x, y, x[:1], y[:1])


def _cut(x: np.ndarray, y: np.ndarray) -> Dataset:
    return Dataset.from_arrays(x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:])


def flag(function: Callable[..., Any]) -> str:
    """A function of this module as --model and --data name it."""
    return f"{__name__}:{function.__name__}"

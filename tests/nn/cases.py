"""Every kind of layer, alone and in stacks, with what a test needs to run it forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import pytest

from mpiml.nn import layers as nn
from mpiml.nn.base import skip_first_dx
from mpiml.nn.layers import (
    GELU,
    At,
    AvgPool2d,
    BatchNorm2d,
    CausalSelfAttention,
    Conv2d,
    Dropout,
    Embedding,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Layer,
    LayerNorm,
    Linear,
    MaxPool2d,
    PositionalEmbedding,
    ReLU,
    Reshape,
    Residual,
    RMSNorm,
    SiLU,
    Tanh,
    Unembedding,
)
from mpiml.nn.parameters import Gradients, Layout

AT = At(training=True, seed=3, step=5, microbatch=2)
TOKENS = 7
GARBAGE = 1e30  # what gradients hold before `backward`: a backward that adds, or leaves some out, is seen
Stack = Callable[[], list[Layer]]
CASES: dict[str, tuple[Stack, tuple[int, ...]]] = {
    "linear": (lambda: [Linear(3, 4)], (3,)),
    "linear of two axes": (lambda: [Linear(3, 4)], (2, 3)),
    "relu": (lambda: [ReLU()], (5,)),
    "tanh": (lambda: [Tanh()], (5,)),
    "gelu": (lambda: [GELU()], (5,)),
    "silu": (lambda: [SiLU()], (5,)),
    "layer norm": (lambda: [LayerNorm(6)], (6,)),
    "layer norm of two axes": (lambda: [LayerNorm(5)], (2, 5)),
    "layer norm, large epsilon": (lambda: [LayerNorm(4, epsilon=0.5)], (4,)),
    "rms norm": (lambda: [RMSNorm(6)], (6,)),
    "rms norm of two axes": (lambda: [RMSNorm(5)], (2, 5)),
    "group norm": (lambda: [GroupNorm(2, 6)], (3, 2, 6)),
    "group norm of one group": (lambda: [GroupNorm(1, 4)], (2, 2, 4)),
    "group norm of each channel": (lambda: [GroupNorm(3, 3)], (2, 2, 3)),
    "group norm of one axis": (lambda: [GroupNorm(2, 8)], (8,)),
    "batch norm": (lambda: [BatchNorm2d(3)], (4, 2, 3)),
    "batch norm of one place": (lambda: [BatchNorm2d(2, epsilon=0.5)], (1, 1, 2)),
    "convolution": (lambda: [Conv2d(2, 3)], (4, 5, 2)),
    "convolution of one channel": (lambda: [Conv2d(1, 2)], (3, 3, 1)),
    "convolution without padding": (lambda: [Conv2d(2, 3, padding=0)], (4, 3, 2)),
    "convolution, stride 2": (lambda: [Conv2d(2, 3, stride=2)], (5, 4, 2)),
    "convolution, stride 2, a rest": (lambda: [Conv2d(1, 2, stride=2, padding=0)], (6, 5, 1)),
    "convolution, stride beyond kernel": (lambda: [Conv2d(1, 2, 2, 3, 1)], (6, 7, 1)),
    "convolution 1 x 1": (lambda: [Conv2d(3, 2, 1)], (2, 3, 3)),
    "convolution 5 x 5, stride 3": (lambda: [Conv2d(1, 2, 5, 3, 1)], (7, 8, 1)),
    "max pool": (lambda: [MaxPool2d()], (4, 6, 2)),
    "max pool with a rest": (lambda: [MaxPool2d(2)], (5, 3, 2)),
    "max pool of three": (lambda: [MaxPool2d(3)], (3, 7, 1)),
    "average pool": (lambda: [AvgPool2d()], (4, 2, 2)),
    "average pool with a rest": (lambda: [AvgPool2d(3)], (4, 5, 2)),
    "global average pool": (lambda: [GlobalAvgPool()], (2, 3, 4)),
    "images": (
        lambda: [Reshape((4, 4, 1)), Conv2d(1, 4), GroupNorm(2, 4), SiLU(), MaxPool2d(), Conv2d(4, 2), GlobalAvgPool()],
        (16,),
    ),
    "images, batch norm": (
        lambda: [Conv2d(1, 3), BatchNorm2d(3), SiLU(), Residual(BatchNorm2d(3), Conv2d(3, 3)), GlobalAvgPool()],
        (3, 2, 1),
    ),
    "embedding": (lambda: [Embedding(TOKENS, 4)], (5,)),
    "embedding of one id a row": (lambda: [Embedding(TOKENS, 4)], ()),
    "positional embedding": (lambda: [PositionalEmbedding(3, 4)], (3, 4)),
    "unembedding": (lambda: [Unembedding(Embedding(TOKENS, 4))], (3, 4)),
    "unembedding of one place": (lambda: [Unembedding(Embedding(TOKENS, 4))], (4,)),
    "attention": (lambda: [CausalSelfAttention(6, 2)], (5, 6)),
    "attention of one head": (lambda: [CausalSelfAttention(4, 1)], (3, 4)),
    "attention of one place": (lambda: [CausalSelfAttention(4, 2)], (1, 4)),
    "tokens": (
        lambda: [
            Embedding(TOKENS, 4),
            PositionalEmbedding(3, 4),
            Residual(LayerNorm(4), CausalSelfAttention(4, 2)),
            Residual(RMSNorm(4), Linear(4, 5), GELU(), Linear(5, 4)),
            LayerNorm(4),
            Linear(4, TOKENS),
        ],
        (3,),
    ),
    "dropout": (lambda: [Dropout(0.4)], (9,)),
    "flatten": (lambda: [Flatten()], (2, 3)),
    "reshape": (lambda: [Reshape((3, 2, 1))], (2, 3)),
    "residual": (lambda: [Residual(Linear(4, 4))], (4,)),
    "residual of a stack": (lambda: [Residual(Linear(4, 6), Tanh(), Dropout(0.3), Linear(6, 4))], (4,)),
    "residual in residual": (lambda: [Residual(Tanh(), Residual(Linear(3, 3), GELU()))], (3,)),
    "stack": (
        lambda: [
            Flatten(),
            Linear(6, 5),
            GELU(),
            LayerNorm(5),
            Residual(Linear(5, 5), ReLU()),
            Dropout(0.2),
            Linear(5, 2),
        ],
        (2, 3),
    ),
}
TAKE_TOKENS = {"embedding", "embedding of one id a row", "tokens"}  # whose input has no gradient
every_case = pytest.mark.parametrize("case", CASES)


class Bench:
    """A case's layers with parameters in one vector, none of them at a special value; those numbered `frozen` are not
    trained."""

    def __init__(self, case: str, dtype: str = "float64", skip_dx: bool = False, frozen: Collection[int] = ()):
        build, self.shape = CASES[case]
        self.tokens = case in TAKE_TOKENS
        self.layers = build()
        nn.name(self.layers)
        for index in frozen:
            nn.parameters(self.layers)[index].rate = 0.0
        if skip_dx:
            skip_first_dx(self.layers)
        self.layout = Layout(nn.parameters(self.layers), dtype)
        self.values = self.layout.zeros()
        self.layout.bind(self.values)
        self.values[...] = np.random.default_rng(1).uniform(0.3, 1.2, self.values.size)
        self.values[::2] *= -1

    def rows(self, count: int, seed: int = 0) -> np.ndarray:
        """Inputs at a distance from 0, where ReLU has no derivative."""
        random = np.random.default_rng(seed)
        if self.tokens:
            return random.integers(0, TOKENS - 1, (count, *self.shape)).astype(self.layout.dtype)  # the last is rare
        x = random.uniform(0.1, 1.5, (count, *self.shape)) * random.choice([-1.0, 1.0], (count, *self.shape))
        return x.astype(self.layout.dtype)

    def gradients(self) -> Gradients:
        vector = self.layout.zeros()
        vector += GARBAGE
        return Gradients(self.layout, vector)

    def forward(self, x: np.ndarray, at: At = AT) -> tuple[np.ndarray, nn.Backward]:
        return nn.forward(self.layers, x, at)

    def both(self, x: np.ndarray, at: At = AT, seed: int = 9) -> list[np.ndarray]:
        """Forward and backward of some dy: dx, zero where there is none, and the gradient of every parameter."""
        y, backward = self.forward(x, at)
        dy = np.random.default_rng(seed).standard_normal(y.shape).astype(y.dtype)
        grads = self.gradients()
        dx = backward(dy, grads)
        assert dx is not None or self.tokens or not self.layers[0].needs_dx
        return [np.zeros(x.shape) if dx is None else dx, *(grads[p].copy() for p in self.layout.parameters)]


def named(layout: Layout, vector: np.ndarray) -> dict[str, np.ndarray]:
    """The views of `vector` under the parameters' names, in layer order."""
    return {parameter.name: view for parameter, view in layout.views(vector)}

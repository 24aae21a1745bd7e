"""Embeddings: a vector for each token id, and a vector for each position."""

from __future__ import annotations

import numpy as np

from mpiml.nn.base import Array, At, Backward, Layer
from mpiml.nn.parameters import Gradients, Parameter, Shape, normal


class Embedding(Layer):
    """y = W[x], with W (tokens, features); x (rows, ...) holds token ids, y (rows, ..., features).

    Ids arrive in the run's dtype, as all inputs do; float32 is exact for ids up to 2^24. They get no gradient.
    First values are normal with standard deviation `deviation`. Bengio et al., "A neural probabilistic language model",
    JMLR 3, 2003.
    """

    def __init__(self, tokens: int, features: int, deviation: float = 0.02):
        self.tokens, self.features = tokens, features
        self.weight = Parameter((tokens, features), normal(deviation))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        ids = x.astype(np.intp)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.tokens:
            raise ValueError(f"token ids are {ids.min()} to {ids.max()}, but Embedding has only 0 to {self.tokens - 1}")

        def backward(dy: Array, grads: Gradients) -> None:
            if self.weight.frozen:
                return
            grads[self.weight].fill(0)
            order = np.argsort(ids, axis=None, kind="stable")
            ordered = ids.reshape(-1)[order]
            starts = np.flatnonzero(np.diff(ordered, prepend=-1))
            if len(starts):
                sums = np.add.reduceat(dy.reshape(-1, self.features)[order], starts, axis=0)
                grads[self.weight][ordered[starts]] = sums

        return self.weight.value[ids], backward

    def check_place(self, shape: Shape, tokens: int) -> None:
        if tokens > self.tokens:
            raise ValueError(
                f"{self.path}, Embedding({self.tokens}, {self.features}), has no vector for token ids above "
                f"{self.tokens - 1}; they go up to {tokens - 1}, which needs Embedding({tokens}, {self.features})"
            )

    def output_shape(self, shape: Shape) -> Shape:
        return (*shape, self.features)

    def flops(self, shape: Shape) -> int:
        return 0


class PositionalEmbedding(Layer):
    """y = x + P, with P (positions, features), one vector for each position; x and y (rows, positions, features).

    First values are drawn as in Embedding. Gehring et al., "Convolutional sequence to sequence learning", ICML 2017.
    """

    def __init__(self, positions: int, features: int, deviation: float = 0.02):
        self.shape = (positions, features)
        self.weight = Parameter(self.shape, normal(deviation))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        def backward(dy: Array, grads: Gradients) -> Array:
            np.add.reduce(dy, axis=0, out=grads[self.weight])
            return dy

        return x + self.weight.value, backward

    def output_shape(self, shape: Shape) -> Shape:
        if shape != self.shape:
            raise ValueError(f"PositionalEmbedding{self.shape} takes rows of shape {self.shape}, got {shape}")
        return shape

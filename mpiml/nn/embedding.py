"""Embeddings: a vector for each token id, and a vector for each position; and scores of tokens by their vectors."""

from __future__ import annotations

import math

import numpy as np

from mpiml.nn.base import Array, At, Backward, Layer, check_last_axis
from mpiml.nn.parameters import Gradients, Parameter, Shape, normal


class Embedding(Layer):
    """y = W[x], with W (tokens, features); x (rows, ...) holds token ids, y (rows, ..., features).

    Ids arrive in the run's dtype, as all inputs do; float32 is exact for ids up to 2^24. They get no gradient.
    First values are normal with standard deviation `deviation`. Bengio et al., "A neural probabilistic language model",
    JMLR 3, 2003.
    """

    splits = True

    def __init__(self, tokens: int, features: int, deviation: float = 0.02):
        self.tokens, self.features = tokens, features
        self.weight = Parameter((tokens, features), normal(deviation))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        ids = x.astype(np.intp)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.tokens:
            raise ValueError(f"token ids are {ids.min()} to {ids.max()}, but Embedding has only 0 to {self.tokens - 1}")

        def by_weights(dy: Array, grads: Gradients) -> None:
            if self.weight.frozen:
                return
            grads[self.weight].fill(0)
            order = np.argsort(ids, axis=None, kind="stable")
            ordered = ids.reshape(-1)[order]
            starts = np.flatnonzero(np.diff(ordered, prepend=-1))
            if len(starts):
                sums = np.add.reduceat(dy.reshape(-1, self.features)[order], starts, axis=0)
                grads[self.weight][ordered[starts]] = sums

        def backward(dy: Array, grads: Gradients) -> None:
            grads.later(lambda: by_weights(dy, grads))

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


class Unembedding(Layer):
    """y = x W^T, where W (tokens, features) is the array of an Embedding, which thus stands in two layers; x (rows,
    ..., features), y (rows, ..., tokens) are scores of the tokens.

    Press and Wolf, "Using the output embedding to improve language models", EACL 2017.
    """

    splits = True

    def __init__(self, embedding: Embedding):
        self.tokens, self.features = embedding.tokens, embedding.features
        self.weight = embedding.weight

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        weight = self.weight.value
        flat = x.reshape(-1, self.features)

        def backward(dy: Array, grads: Gradients) -> Array | None:
            dy = dy.reshape(-1, self.tokens)

            def by_weights() -> None:
                if not self.weight.frozen:
                    np.matmul(dy.T, flat, out=grads[self.weight])

            grads.later(by_weights)
            return (dy @ weight).reshape(x.shape) if self.needs_dx else None

        return (flat @ weight.T).reshape(*x.shape[:-1], self.tokens), backward

    def output_shape(self, shape: Shape) -> Shape:
        check_last_axis(self, self.features, shape, self.tokens, self.features)
        return (*shape[:-1], self.tokens)

    def flops(self, shape: Shape) -> int:
        return 2 * math.prod(shape) * self.tokens


class PositionalEmbedding(Layer):
    """y = x + P, with P (positions, features), one vector for each position; x and y (rows, positions, features).

    First values are drawn as in Embedding. Gehring et al., "Convolutional sequence to sequence learning", ICML 2017.
    """

    splits = True

    def __init__(self, positions: int, features: int, deviation: float = 0.02):
        self.shape = (positions, features)
        self.weight = Parameter(self.shape, normal(deviation))

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        def backward(dy: Array, grads: Gradients) -> Array:
            grads.later(lambda: np.add.reduce(dy, axis=0, out=grads[self.weight]))
            return dy

        return x + self.weight.value, backward

    def output_shape(self, shape: Shape) -> Shape:
        if shape != self.shape:
            raise ValueError(f"PositionalEmbedding{self.shape} takes rows of shape {self.shape}, got {shape}")
        return shape

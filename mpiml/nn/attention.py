"""Causal self-attention: each position of a row attends to itself and to the positions before it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from mpiml.nn.base import Array, At, Backward, Layer
from mpiml.nn.basic import Linear
from mpiml.nn.parameters import Gradients, Shape

QUERIES = 128  # queries in a tile: their scores fit a second-level cache, and few scores are computed to be masked


class CausalSelfAttention(Layer):
    """softmax(Q K^T / sqrt(d) + mask) V in each head, between two linear maps; x and y (rows, T, features).

    The first map gives Q, K and V, each of size d = features / heads per head; the mask hides later positions.
    Vaswani et al., "Attention is all you need", NeurIPS 2017. The backward pass computes the scores again, using the
    log of each softmax's sum: Dao et al., "FlashAttention", NeurIPS 2022.

    Args:
        gain: for the first values of the linear map after the heads (see Linear); the map before them has gain 1.
    """

    def __init__(self, features: int, heads: int, gain: float = 1.0):
        if heads < 1 or features % heads:
            problem = f"{heads} heads do not divide {features} features"
            raise ValueError(f"CausalSelfAttention({features}, {heads}): {problem}")
        self.features, self.heads = features, heads
        self.project, self.combine = Linear(features, 3 * features, 1.0), Linear(features, features, gain)

    def inner(self) -> Sequence[Layer]:
        return self.project, self.combine

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        rows, length = x.shape[:2]
        projected, project_backward = self.project(x, at)
        split = (rows, length, 3, self.heads, self.features // self.heads)
        qkv = projected.reshape(split).transpose(2, 0, 3, 1, 4)  # (3, rows, heads, T, d)
        attended = np.empty(x.shape, x.dtype)
        heads = _heads(attended, self.heads)
        log_sums = np.empty((*heads.shape[:3], 1), x.dtype)
        for row, here, seen in _query_tiles(rows, length):
            scores = _scores(qkv, row, here, seen)
            highest = scores.max(axis=-1, keepdims=True)
            scores -= highest
            sums = np.exp(scores, out=scores).sum(axis=-1, keepdims=True)
            heads[row, :, here] = scores @ qkv[2, row, :, seen] / sums
            log_sums[row, :, here] = np.log(sums) + highest
        y, combine_backward = self.combine(attended, at)

        def backward(dy: Array, grads: Gradients) -> Array | None:
            dattended = combine_backward(dy, grads)
            assert dattended is not None, "an inner layer always returns its gradient by x"
            dheads = _heads(dattended, self.heads)
            along = np.add.reduce(dheads * heads, axis=-1, keepdims=True)
            dprojected = np.zeros(projected.shape, x.dtype)
            dq, dk, dv = dprojected.reshape(split).transpose(2, 0, 3, 1, 4)
            for row, here, seen in _query_tiles(rows, length):
                q, k, v = qkv[0, row, :, here], qkv[1, row, :, seen], qkv[2, row, :, seen]
                p = _scores(qkv, row, here, seen)
                p -= log_sums[row, :, here]
                np.exp(p, out=p)
                dv[row, :, seen] += p.swapaxes(1, 2) @ dheads[row, :, here]
                dscores = dheads[row, :, here] @ v.swapaxes(1, 2)
                dscores -= along[row, :, here]
                dscores *= p
                dscores *= 1 / math.sqrt(q.shape[-1])
                dq[row, :, here] = dscores @ k
                dk[row, :, seen] += dscores.swapaxes(1, 2) @ q
            return project_backward(dprojected, grads)

        return y, backward

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 2 or shape[1] != self.features:
            raise ValueError(f"CausalSelfAttention takes rows of shape (T, {self.features}), got {shape}")
        return shape

    def flops(self, shape: Shape) -> int:
        seen = shape[0] * (shape[0] + 1) // 2
        return self.project.flops(shape) + self.combine.flops(shape) + 4 * self.features * seen


def _heads(x: Array, heads: int) -> Array:
    """The view (rows, heads, T, d) of x (rows, T, features)."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)


def _query_tiles(rows: int, length: int) -> Iterator[tuple[int, slice, slice]]:
    """Each tile of queries: (row, the queries' positions, the positions that any of them attends to)."""
    for row in range(rows):
        for start in range(0, length, QUERIES):
            stop = min(start + QUERIES, length)
            yield row, slice(start, stop), slice(0, stop)


def _scores(qkv: Array, row: int, here: slice, seen: slice) -> Array:
    """Q K^T / sqrt(d) of all heads of a row, (heads, queries here, keys seen); -inf for keys later than the query."""
    q, k = qkv[0, row, :, here], qkv[1, row, :, seen]
    scores: Array = q @ k.swapaxes(1, 2)
    scores *= 1 / math.sqrt(q.shape[-1])
    scores[:, :, here] += _mask(here.stop - here.start)
    return scores


@functools.cache
def _mask(length: int) -> Array:
    """(queries, keys): 0 for keys up to the query's own position, -inf for later ones."""
    return np.triu(np.full((length, length), -np.inf, np.float32), 1)

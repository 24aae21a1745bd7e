"""Losses and metrics. Both return sums over rows, not means: the update divides once, by the whole batch's weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mpiml.nn.tiling import tiles

Array = NDArray[np.floating]
Labels = NDArray[np.generic]


class Loss(Protocol):
    """`loss(y, labels, weights)` returns (sum over rows of weight x loss, sum of weights, gradient of the first by y).

    `weights` (rows,) multiply what the rows count for by themselves; None: by 1.
    """

    def __call__(self, y: Array, labels: Labels, weights: Array | None = None) -> tuple[float, float, Array]: ...


class Metric(Protocol):
    """A score that is computed from sums over rows, so that parts of the rows can be summed apart.

    `sums(y, labels)` returns the sums over the given rows, float64; `value(totals)` the score, from the sums over all.
    """

    name: str  # under which the score is logged
    columns: int  # how many sums

    def sums(self, y: Array, labels: Labels) -> NDArray[np.float64]: ...

    def value(self, totals: Sequence[float]) -> float: ...


def softmax_cross_entropy(y: Array, labels: Labels, weights: Array | None = None) -> tuple[float, float, Array]:
    """-log softmax(y)[label] of every label; returns as Loss.

    y (rows, ..., classes), labels (rows, ...) integers in 0..classes-1, each of weight one; a label of -1 (padding, a
    masked token) has weight zero.
    """
    outputs, goals = y.reshape(-1, y.shape[-1]), labels.reshape(-1).astype(np.intp, copy=False)
    dy, losses = np.empty(outputs.shape, y.dtype), np.empty(len(outputs), y.dtype)
    for tile in tiles(len(outputs), outputs.shape[1] * y.itemsize):
        part = np.subtract(outputs[tile], outputs[tile].max(axis=1, keepdims=True), out=dy[tile])
        label = np.arange(len(part)), goals[tile]
        score = part[label]
        total = np.exp(part, out=part).sum(axis=1, keepdims=True)
        losses[tile] = np.log(total[:, 0]) - score
        part /= total
        part[label] -= 1
    masked = goals < 0
    losses[masked] = 0
    dy[masked] = 0
    weight = float(np.count_nonzero(~masked))
    if weights is not None:
        each = np.repeat(weights, len(goals) // max(len(weights), 1))
        losses *= each
        dy *= each[:, None]
        weight = float(np.add.reduce(each[~masked], dtype=np.float64))
    loss = float(np.add.reduce(losses, dtype=np.float64))
    return loss, weight, dy.reshape(y.shape)


def mean_squared_error(y: Array, labels: Labels, weights: Array | None = None) -> tuple[float, float, Array]:
    """The mean over a row's outputs of (y - label)^2, of weight one; returns as Loss. y and labels (rows, outputs)."""
    error: Array = y - labels.reshape(y.shape).astype(y.dtype, copy=False)
    outputs = max(math.prod(y.shape[1:]), 1)
    squares = np.square(error, dtype=np.float64)
    if weights is None:
        return float(np.add.reduce(squares, axis=None)) / outputs, float(len(y)), error * (2 / outputs)
    each = weights.reshape(-1, *[1] * (y.ndim - 1))
    loss = float(np.add.reduce(squares * each, axis=None)) / outputs
    return loss, float(np.add.reduce(weights, dtype=np.float64)), error * (each * (2 / outputs))


class Accuracy:
    """The fraction of labels but -1 whose output is the largest; y (rows, ..., classes), labels (rows, ...)."""

    name = "accuracy"
    columns = 2

    def sums(self, y: Array, labels: Labels) -> NDArray[np.float64]:
        return np.array([np.count_nonzero(y.argmax(axis=-1) == labels), np.count_nonzero(labels != -1)], np.float64)

    def value(self, totals: Sequence[float]) -> float:
        return totals[0] / totals[1] if totals[1] else math.nan


class R2:
    """The coefficient of determination, 1 - residual / total sum of squares, averaged over the outputs.

    An output whose labels are all equal counts 1 if every prediction is exact, and 0 otherwise.
    """

    name = "r2"

    def __init__(self, outputs: int):
        self.outputs = outputs
        self.columns = 1 + 3 * outputs

    def sums(self, y: Array, labels: Labels) -> NDArray[np.float64]:
        truth = labels.reshape(len(y), self.outputs).astype(np.float64)
        error = y.reshape(truth.shape) - truth
        parts = [np.add.reduce(part, axis=0) for part in (truth, truth * truth, error * error)]
        return np.concatenate([[len(y)], *parts])

    def value(self, totals: Sequence[float]) -> float:
        rows, sums = totals[0], np.reshape(totals[1:], (3, self.outputs))
        if not rows:
            return math.nan
        spread = np.maximum(sums[1] - sums[0] ** 2 / rows, 0)
        constant = spread <= 1e-14 * sums[1]
        score = 1 - sums[2] / np.where(constant, 1, spread)
        return float(np.mean(np.where(constant, sums[2] == 0, score)))

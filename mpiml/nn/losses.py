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

    @property
    def higher_is_better(self) -> bool | None:
        """Whether higher scores are better, which --best needs to know; None: it is not known."""

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
        scores = outputs[tile]
        part = np.subtract(scores, np.maximum.reduce(scores, axis=1, keepdims=True), out=dy[tile])
        label = np.arange(len(part)), goals[tile]
        score = part[label]
        total = np.add.reduce(np.exp(part, out=part), axis=1, keepdims=True)
        losses[tile] = np.log(total[:, 0]) - score
        part /= total
        part[label] -= 1
    masked, each = goals < 0, None
    if weights is not None:
        each = np.repeat(weights, len(goals) // max(len(weights), 1))
        masked |= each == 0
    count = np.count_nonzero(masked)
    if count:
        losses[masked] = 0
        dy[masked] = 0
    weight = float(len(goals) - count)
    if each is not None:
        losses *= each
        dy *= each[:, None]
        weight = float(np.add.reduce(each[~masked], dtype=np.float64))
    loss = float(np.add.reduce(losses, dtype=np.float64))
    return loss, weight, dy.reshape(y.shape)


def mean_squared_error(y: Array, labels: Labels, weights: Array | None = None) -> tuple[float, float, Array]:
    """The mean over a row's outputs of (y - label)^2, of weight one; returns as Loss. y (rows, ...), as many labels."""
    error: Array = y - labels.reshape(y.shape).astype(y.dtype, copy=False)
    outputs = max(math.prod(y.shape[1:]), 1)
    squares = np.square(error, dtype=np.float64)
    if weights is None:
        return float(np.add.reduce(squares, axis=None)) / outputs, float(len(y)), error * (2 / outputs)
    each = weights.reshape(-1, *[1] * (y.ndim - 1))
    loss = float(np.add.reduce(squares * each, axis=None)) / outputs
    return loss, float(np.add.reduce(weights, dtype=np.float64)), error * (each * (2 / outputs))


def softmax(y: Array) -> Array:
    """The probabilities of classes, on the last axis, whose scores are y."""
    small: Array = np.exp(y - y.max(axis=-1, keepdims=True))
    return small / np.add.reduce(small, axis=-1, keepdims=True)


def sigmoid(y: Array) -> Array:
    """1 / (1 + exp(-y)), without numbers that are too large."""
    small = np.exp(-np.abs(y))
    probability: Array = np.where(y >= 0, 1, small) / (1 + small)
    return probability


def binary_cross_entropy(y: Array, labels: Labels, weights: Array | None = None) -> tuple[float, float, Array]:
    """The mean over a row's outputs of -t log p - (1 - t) log(1 - p), where p = sigmoid(y), of weight one.

    y (rows, ...), as many labels t from 0 to 1; returns as Loss. Written as log(1 + exp(y)) - t y, stable for any y.
    """
    goals, outputs = labels.reshape(y.shape).astype(y.dtype, copy=False), math.prod(y.shape[1:])
    losses = np.maximum(y, 0) - goals * y + np.log1p(np.exp(-np.abs(y)))
    dy = (sigmoid(y) - goals) / outputs
    each = np.add.reduce(losses.reshape(len(y), outputs), axis=1, dtype=np.float64) / outputs
    if weights is None:
        return float(np.add.reduce(each)), float(len(y)), dy
    dy *= weights.reshape(-1, *[1] * (y.ndim - 1))
    return float(np.add.reduce(each * weights)), float(np.add.reduce(weights, dtype=np.float64)), dy


class Accuracy:
    """The fraction of labels but -1 whose output is the largest; y (rows, ..., classes), labels (rows, ...)."""

    name = "accuracy"
    columns = 2
    higher_is_better = True

    def sums(self, y: Array, labels: Labels) -> NDArray[np.float64]:
        return self.sums_of_predicted(y.argmax(axis=-1), labels)

    def sums_of_predicted(self, classes: Labels, labels: Labels) -> NDArray[np.float64]:
        """The same of predicted classes (rows, ...)."""
        return np.array([np.count_nonzero(classes == labels), np.count_nonzero(labels != -1)], np.float64)

    def value(self, totals: Sequence[float]) -> float:
        return totals[0] / totals[1] if totals[1] else math.nan


class BinaryAccuracy:
    """The fraction of labels, each 0 or 1, that outputs predict: 1 from 0 on; y (rows, ...), as many labels.

    A label of at least 0.5 counts as 1.
    """

    name = "accuracy"
    columns = 2
    higher_is_better = True

    def sums(self, y: Array, labels: Labels) -> NDArray[np.float64]:
        return np.array([np.count_nonzero(_right(y, labels)), y.size], np.float64)

    def value(self, totals: Sequence[float]) -> float:
        return totals[0] / totals[1] if totals[1] else math.nan


class ExactMatch(BinaryAccuracy):
    """The fraction of rows of which outputs predict all labels, as BinaryAccuracy has it."""

    name = "exact_match"

    def sums(self, y: Array, labels: Labels) -> NDArray[np.float64]:
        return np.array([np.count_nonzero(_right(y, labels).all(axis=1)), len(y)], np.float64)


def _right(y: Array, labels: Labels) -> NDArray[np.bool_]:
    """Whether outputs predict labels of 0 and 1, (rows, labels of a row)."""
    right: NDArray[np.bool_] = (y >= 0) == (labels.reshape(y.shape).astype(y.dtype, copy=False) >= 0.5)
    return right.reshape(len(y), math.prod(y.shape[1:]))


class R2:
    """The coefficient of determination, 1 - residual / total sum of squares, averaged over the outputs.

    With outputs = 1, all values of rows with several are taken together, around their common mean. An output whose
    labels are all equal counts 1 if every prediction is exact, and 0 otherwise.
    """

    name = "r2"
    higher_is_better = True

    def __init__(self, outputs: int):
        self.outputs = outputs
        self.columns = 1 + 3 * outputs

    def sums(self, y: Array, labels: Labels) -> NDArray[np.float64]:
        truth = labels.reshape(-1, self.outputs).astype(np.float64)
        error = y.reshape(truth.shape) - truth
        parts = [np.add.reduce(part, axis=0) for part in (truth, truth * truth, error * error)]
        return np.concatenate([[len(truth)], *parts])

    def value(self, totals: Sequence[float]) -> float:
        count, sums = totals[0], np.reshape(totals[1:], (3, self.outputs))
        if not count:
            return math.nan
        spread = np.maximum(sums[1] - sums[0] ** 2 / count, 0)
        constant = spread <= 1e-14 * sums[1]
        score = 1 - sums[2] / np.where(constant, 1, spread)
        return float(np.mean(np.where(constant, sums[2] == 0, score)))

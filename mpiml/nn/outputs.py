"""How a model's outputs meet the labels: which axis counts the classes, and which labels stand beside which outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpiml.nn.losses import Array, Labels, Loss, Metric
from mpiml.nn.parameters import Shape


@dataclass(frozen=True)
class Outputs:
    """Rows of outputs beside rows of labels.

    Attributes:
        goals: the shape of a row of labels without the axes that outputs lack, such as that of a column of labels.
        axis: of a row of outputs, the one that counts classes, the first or the last; None if there is an output for
            each label, a value.
    """

    goals: Shape
    axis: int | None

    @classmethod
    def of(cls, shape: Shape, labels: Shape, classes: int | None = None, torch: bool = False) -> Outputs:
        """For rows of outputs of `shape` and of `labels`, which are values unless there are `classes`.

        `torch`: whether a PyTorch module makes the outputs: it may put classes first, as PyTorch's losses want them.
        Where the labels have several axes and both would fit, it does.

        Raises ValueError, which names the shapes that would fit, if outputs of `shape` do not.
        """
        if classes is None:
            if cls.fits(shape, labels):
                return cls(labels, None)
            needed = [labels, (math.prod(labels),)]
        else:
            needed = []
            for fitting, goals, axis in _places(labels, classes, torch):
                if shape == fitting:
                    return cls(goals, axis)
                needed.append(fitting)
        raise ValueError(" or ".join(dict.fromkeys(map(str, needed))))

    @staticmethod
    def fits(shape: Shape, labels: Shape) -> bool:
        """Whether rows of outputs have a value for each label."""
        return shape == (math.prod(labels),) or _long(shape) == _long(labels)

    def classes_last(self, y: Array) -> Array:
        """Outputs (rows, ...) with the axis that counts classes last."""
        return y if self.axis in (None, len(self.goals)) else np.moveaxis(y, 1, -1)

    def beside(self, labels: Labels) -> Labels:
        """Labels (rows, ...) in the shape in which they stand beside the outputs."""
        return labels.reshape(len(labels), *self.goals)

    def loss(self, loss: Loss) -> Loss:
        """The same loss of outputs and labels as they are, for a `loss` that takes classes on the last axis."""

        def of_outputs(y: Array, labels: Labels, weights: Array | None = None) -> tuple[float, float, Array]:
            total, weight, dy = loss(self.classes_last(y), self.beside(labels), weights)
            return total, weight, dy if self.axis in (None, len(self.goals)) else np.moveaxis(dy, -1, 1)

        return of_outputs

    def metric(self, metric: Metric) -> Metric:
        """The same metric of outputs and labels as they are, for one that takes classes on the last axis."""
        return _OfOutputs(metric, self)


class _OfOutputs:
    def __init__(self, metric: Metric, outputs: Outputs):
        self.name, self.columns, self.higher_is_better = metric.name, metric.columns, metric.higher_is_better
        self._metric, self._outputs = metric, outputs

    def sums(self, y: Array, labels: Labels) -> np.ndarray:
        return self._metric.sums(self._outputs.classes_last(y), self._outputs.beside(labels))

    def value(self, totals: Sequence[float]) -> float:
        return self._metric.value(totals)


def _long(shape: Shape) -> Shape:
    """The axes that are longer than 1."""
    return tuple(length for length in shape if length > 1)


def _places(labels: Shape, classes: int, torch: bool) -> Iterator[tuple[Shape, Shape, int]]:
    """Where outputs may count the classes: (shape of a row of outputs, of labels beside them, axis), the best first."""
    for goals in dict.fromkeys([labels, _long(labels)]):
        last = (*goals, classes), goals, len(goals)
        first = (classes, *goals), goals, 0
        if not torch or not goals:
            yield last
        else:
            yield from (first, last) if len(goals) > 1 else (last, first)

"""A user's own loss and metric, with checks of everything that they return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.errors import ConfigError
from mpiml.nn.losses import Array, Labels
from mpiml.usercode import called_with, named


class OwnLoss:
    """The loss function that --loss names.

    Raises ConfigError if it is not a loss function; when called, if it does not return (total, weight, gradient).
    """

    def __init__(self, name: str):
        self.flag = f"--loss {name}"
        self.loss = called_with(named(name, "--loss"), self.flag, "y", "labels")

    def __call__(self, y: Array, labels: Labels, weights: Array | None = None) -> tuple[float, float, Array]:
        result = self.loss(y, labels)
        try:
            total, weight, dy = result
        except (TypeError, ValueError):
            needed = "(sum of weight x loss, sum of weights, gradient by y)"
            raise ConfigError(f"{self.flag}: returns {_kind(result)}; {needed} is needed") from None
        weight = _number(weight, f"{self.flag}: returns as sum of weights")
        if not 0 <= weight < math.inf:
            raise ConfigError(f"{self.flag}: returns {weight:g} as sum of weights; it must be finite and not negative")
        if np.shape(dy) != y.shape:
            raise ConfigError(f"{self.flag}: returns a gradient of shape {np.shape(dy)} for outputs of shape {y.shape}")
        return _number(total, f"{self.flag}: returns as sum of losses"), weight, dy


class OwnMetric:
    """The metric that --metric names, for a model with `outputs` outputs. Raises ConfigError as OwnLoss does."""

    def __init__(self, name: str, outputs: int):
        self.flag = f"--metric {name}"
        self.metric = called_with(named(name, "--metric"), self.flag, "outputs")(outputs)
        for attribute in ("name", "columns", "sums", "value"):
            if not hasattr(self.metric, attribute):
                raise ConfigError(f"{self.flag}: {type(self.metric).__name__} has no {attribute}")
        self.name, self.columns = self.metric.name, self.metric.columns
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"{self.flag}: is called {self.name!r}; its name must be text")
        if not isinstance(self.columns, int) or self.columns < 0:
            raise ConfigError(f"{self.flag}: columns is {self.columns!r}; it must be the number of sums")
        called_with(self.metric.sums, f"{self.flag}: sums", "y", "labels")
        called_with(self.metric.value, f"{self.flag}: value", "totals")

    def sums(self, y: Array, labels: Labels) -> NDArray[np.float64]:
        sums = self.metric.sums(y, labels)
        if np.size(sums) != self.columns:
            raise ConfigError(f"{self.flag}: sums returns {np.size(sums)} values, but columns is {self.columns}")
        return np.ravel(sums)

    def value(self, totals: Sequence[float]) -> float:
        return _number(self.metric.value(totals), f"{self.flag}: value returns")


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{what} {_kind(value)}; a number is needed") from None


def _kind(value: Any) -> str:
    """A value that a user's function returned, described in one line."""
    return f"{type(value).__name__} of shape {value.shape}" if hasattr(value, "shape") else f"{value!r:.60}"

"""A user's own loss and metric, with checks of everything that they return."""

from __future__ import annotations

import importlib
import inspect
import math
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpiml.devices.host import HOST, Host
from mpiml.errors import ConfigError
from mpiml.nn.losses import Array, Labels, Loss
from mpiml.nn.outputs import Outputs
from mpiml.random import Draws
from mpiml.usercode import called_with, named

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A few rows to try a loss and a metric of a user's own on: outputs, labels and, if rows have some, weights.

    Attributes:
        outputs: how the outputs meet the labels, if that is known.
        seed, threads: the run's.
        ignored: labels that the run turns into -1, if it does.
        device: where the outputs are computed.
    """

    y: Array
    labels: Labels
    weights: Array | None = None
    outputs: Outputs | None = None
    seed: int = 0
    threads: int = 1
    ignored: int | None = None
    device: Host = HOST


class OwnLoss:
    """The loss that --loss names: a NumPy function (y, labels) or (y, labels, weights) that returns (total, weight,
    gradient), or one that PyTorch computes (mpiml.nn.torch_losses). Which it is a trial shows.

    Raises ConfigError if it is no loss; when called, if it does not return what it has to.

    Attributes:
        draws: the generators of the process that it draws from.
    """

    def __init__(self, name: str, sample: Sample):
        self.flag = f"--loss {name}"
        self.loss = named(name, "--loss")
        arguments = sample.y, sample.labels, sample.weights
        with Draws(sample.seed, "trial"), _quiet():
            if not isinstance(self.loss, type) and _takes_nothing(self.loss):
                self.loss = self.loss()
            self._compute = self._of_torch_class(sample) or self._of_function(sample)

        def score() -> Any:
            total, weight, dy = self(*arguments)
            return total, weight, sample.device.array(dy)  # tensors that are equal may have other pickles

        self.draws = _draws(sample.seed, score, self.flag)

    def __call__(self, y: Array, labels: Labels, weights: Array | None = None) -> tuple[float, float, Array]:
        return self._compute(y, labels, weights)

    @property
    def takes_tensors(self) -> bool:
        """Whether it takes outputs on a device as they are."""
        return getattr(self._compute, "takes_tensors", False)

    def _of_torch_class(self, sample: Sample) -> Loss | None:
        torch = _torch_losses()
        if not (torch and torch.is_class(self.loss)):
            return None
        loss: Loss = self._tried(lambda: torch.of_class(self.loss, self.flag, sample), sample)
        return loss

    def _of_function(self, sample: Sample) -> Loss:
        """A NumPy function if it works on arrays; else one of PyTorch if it works on tensors."""
        self._weighted = _takes_weights(self.loss)
        self._plain = not (self._weighted and _needs_three(self.loss))
        called_with(self.loss, self.flag, "y", "labels", *([] if self._plain else ["weights"]))
        try:
            self._numpy(sample.y, sample.labels, sample.weights)
        except Exception as error:
            return self._of_torch_function(sample, error)
        return self._numpy

    def _of_torch_function(self, sample: Sample, error: Exception) -> Loss:
        """The function as PyTorch's, after it has raised an `error` as NumPy's."""
        if torch := _torch_losses():
            loss = torch.TorchLoss(self.loss, self.flag, sample.threads, sample.outputs, device=sample.device)
            try:
                self._tried(lambda: loss.try_on(sample.y, sample.labels), sample)
                if sample.ignored not in (None, -1):
                    self._try_ignored(loss, sample)
            except ConfigError:
                if isinstance(error, (TypeError, AttributeError)):  # as PyTorch's functions do, given arrays
                    raise
            else:
                of_torch: Loss = loss
                return of_torch
        if isinstance(error, ConfigError):
            raise error
        return self._numpy  # rows of zeros may be what it cannot take

    def _try_ignored(self, loss: Loss, sample: Sample) -> None:
        """Raise ConfigError if a function that takes other labels does not take those that do not count."""
        labels = sample.labels.copy()
        labels[0] = -1
        try:
            with sample.device.checked_indices():
                loss(sample.y, labels)
        except Exception as error:
            raise ConfigError(
                f"{self.flag}: it gets labels of {sample.ignored} as -1, by --ignore {sample.ignored}, and fails: "
                f"{type(error).__name__}: {error}; let it leave out -1 (cross_entropy: ignore_index=-1)"
            ) from None

    def _tried(self, attempt: Callable[[], T], sample: Sample) -> T:
        try:
            with sample.device.checked_indices():
                return attempt()
        except ConfigError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
            rows = f"for outputs of shape {sample.y.shape} and labels of {sample.labels.shape}"
            hint = ""
            if isinstance(error, TypeError) and "argument" in reason:
                hint = "; it gets these two: name a function (outputs, labels) of yours that calls it with all it needs"
            elif sample.labels.dtype.kind == "i":
                hint = ", which are integers; --metric r2 or exact_match makes them values"
            raise ConfigError(f"{self.flag}: {type(error).__name__}: {reason}, {rows}{hint}") from None

    def _numpy(self, y: Array, labels: Labels, weights: Array | None = None) -> tuple[float, float, Array]:
        if weights is not None and not self._weighted:
            raise ConfigError(
                f"{self.flag}: rows have weights, but it takes none; let it take a third argument, weights (rows,), "
                "multiply losses and gradient by them, and return their sum as the weight"
            )
        if weights is None and self._plain:
            result = self.loss(y, labels)
        else:
            result = self.loss(y, labels, np.ones(len(y), y.dtype) if weights is None else weights)
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
    """The metric that --metric names, for a model with `outputs` outputs. Raises ConfigError as OwnLoss does.

    Attributes:
        draws: the generators of the process that it draws from.
    """

    def __init__(self, name: str, outputs: int, sample: Sample):
        self.flag = f"--metric {name}"
        self.metric = called_with(named(name, "--metric"), self.flag, "outputs")(outputs)
        for attribute in ("name", "columns", "sums", "value"):
            if not hasattr(self.metric, attribute):
                raise ConfigError(f"{self.flag}: {type(self.metric).__name__} has no {attribute}")
        self.name, self.columns = self.metric.name, self.metric.columns
        self.higher_is_better = getattr(self.metric, "higher_is_better", None)
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"{self.flag}: is called {self.name!r}; its name must be text")
        if not isinstance(self.columns, int) or self.columns < 0:
            raise ConfigError(f"{self.flag}: columns is {self.columns!r}; it must be the number of sums")
        called_with(self.metric.sums, f"{self.flag}: sums", "y", "labels")
        called_with(self.metric.value, f"{self.flag}: value", "totals")
        self.draws = _draws(sample.seed, lambda: self.sums(sample.y, sample.labels), f"{self.flag}: sums")

    def sums(self, y: Array, labels: Labels) -> NDArray[np.float64]:
        sums = self.metric.sums(y, labels)
        if np.size(sums) != self.columns:
            raise ConfigError(f"{self.flag}: sums returns {np.size(sums)} values, but columns is {self.columns}")
        return np.ravel(sums)

    def value(self, totals: Sequence[float]) -> float:
        return _number(self.metric.value(totals), f"{self.flag}: value returns")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, of NumPy and of others, that rows of zeros are no good input."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _takes_weights(function: Any) -> bool:
    """Whether a function has a third argument that is there for weights of rows."""
    try:
        arguments = list(inspect.signature(function).parameters.values())[2:3]
    except (TypeError, ValueError):
        return False
    wanted = (one.default is one.empty or "weight" in one.name or one.name == "w" for one in arguments)
    return any(wanted) and arguments[0].kind not in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


def _needs_three(function: Any) -> bool:
    try:
        inspect.signature(function).bind("y", "labels")
    except TypeError:
        return True
    return False


def _takes_nothing(function: Any) -> bool:
    """Whether it has no arguments: it makes a loss then, and is none."""
    try:
        return callable(function) and not inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _draws(seed: int, call: Callable[[], object], what: str) -> frozenset[str]:
    """The generators that a call draws from. Raises ConfigError as it does, and if it returns something else when it is
    made again; for what else it raises, rows of zeros may be the reason."""
    results = []
    for _ in range(3):
        with Draws(seed, "trial") as draws, _quiet():
            try:
                results.append(pickle.dumps(call()))
            except ConfigError:
                raise
            except Exception:
                return draws.which
    if len(set(results)) > 1:
        raise ConfigError(
            f"{what}: returns something else when it is called again with the same outputs and labels; it must keep "
            "nothing from call to call, and draw from the generators of torch, numpy.random or random alone"
        )
    return draws.which


def _torch_losses() -> Any:
    """The adapter of PyTorch's losses; None if PyTorch is not imported."""
    return importlib.import_module("mpiml.nn.torch_losses") if "torch" in sys.modules else None


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{what} {_kind(value)}; a number is needed") from None


def _kind(value: Any) -> str:
    """A value that a user's function returned, described in one line."""
    return f"{type(value).__name__} of shape {value.shape}" if hasattr(value, "shape") else f"{value!r:.60}"

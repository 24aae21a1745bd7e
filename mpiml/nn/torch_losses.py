"""Losses that PyTorch computes: functions that return a tensor, and loss classes; autograd gives the gradient."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mpiml.devices.device import Device
from mpiml.devices.host import HOST, Host
from mpiml.errors import ConfigError
from mpiml.nn.base import Array
from mpiml.nn.checked import Sample
from mpiml.nn.losses import Accuracy, Labels
from mpiml.nn.outputs import Outputs
from mpiml.nn.torch_tensors import numpy_dtype, prepare_torch, tensor_on
from mpiml.random import generator

Function = Callable[[Tensor, Tensor], Any]


def is_class(loss: Any) -> bool:
    """Whether a loss is a class of PyTorch modules, which has to be made first."""
    return isinstance(loss, type) and issubclass(loss, torch.nn.Module)


def of_class(loss: type[torch.nn.Module], flag: str, sample: Sample) -> TorchLoss:
    """The loss of that class, for a value per label, in which labels of -1 do not count. One that gives no such values
    is made to sum them itself.

    Raises ConfigError for a class that needs arguments, and for what is no loss.
    """
    made = _moving(_made(loss, flag, "none"), flag, sample)
    if made.single and "reduction" in inspect.signature(loss).parameters:
        made = _moving(_made(loss, flag, "sum"), flag, sample)
    return made


def of_name(name: str, sample: Sample) -> TorchLoss:
    """The loss that mpiml.nn.losses has under that name in --loss, for outputs on a device."""
    functions = {"cross_entropy": _cross_entropy, "mse": _squared_error, "bce": _binary_cross_entropy}
    return _moving(functions[name], f"--loss {name}", sample)


def _moving(function: Function, flag: str, sample: Sample) -> TorchLoss:
    """The loss of a function that takes classes after the rows."""
    made = TorchLoss(function, flag, sample.threads, sample.outputs, moves=True, device=sample.device)
    made.try_on(sample.y, sample.labels)
    return made


def _cross_entropy(scores: Tensor, goals: Tensor) -> Tensor:
    """Of each label. Scores are a matrix: of more axes, PyTorch has no sum on GPUs whose order is fixed."""
    matrix = scores.movedim(1, -1).reshape(-1, scores.shape[1])
    return functional.cross_entropy(matrix, goals.reshape(-1), ignore_index=-1, reduction="none").view(goals.shape)


def _squared_error(y: Tensor, goals: Tensor) -> Tensor:
    return _mean_of_row((y - goals).square())


def _binary_cross_entropy(y: Tensor, goals: Tensor) -> Tensor:
    return _mean_of_row(functional.binary_cross_entropy_with_logits(y, goals, reduction="none"))


def _mean_of_row(losses: Tensor) -> Tensor:
    return losses.reshape(len(losses), -1).mean(1)


class AccuracyThere(Accuracy):
    """The accuracy of outputs that count classes on a device, of which only the predicted classes get to the host."""

    takes_tensors = True

    def __init__(self, outputs: Outputs, device: Host):
        self._outputs, self._device = outputs, device

    def sums(self, y: Any, labels: Labels) -> NDArray[np.float64]:
        predicted = self._device.array(y.argmax(1 + (self._outputs.axis or 0)))
        return self.sums_of_predicted(predicted, self._outputs.beside(labels))


def _made(loss: type[torch.nn.Module], flag: str, reduction: str) -> torch.nn.Module:
    takes = inspect.signature(loss).parameters
    wanted = {"reduction": reduction, "ignore_index": -1}
    try:
        return loss(**{name: value for name, value in wanted.items() if name in takes})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{flag}: {first_line(error)}; name a function that makes and calls it") from None


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason'])[0]}"


class TorchLoss:
    """A loss of a tensor of outputs and one of labels; returns as mpiml.nn.losses.Loss.

    A tensor with a value for each row, or for each output or label of a row, is summed: each value counts 1, or as much
    as its row weighs, but 0 where the label beside it is -1. A single number is the mean over the rows of a micro-batch
    and counts as often as it has rows, or as much as these weigh together; but one that grows with the number of equal
    rows is the sum over the rows.

    Args:
        function: gets integer labels as int64, others in the run's dtype. Labels that are values get the shape of the
            outputs where only axes of length 1 differ, so that PyTorch does not combine each with all; for PyTorch's
            own losses also where outputs are flat.
        outputs: how they meet the labels, if that is known.
        moves: whether it is made from a class, as PyTorch's own: these take classes after the rows, and labels without
            an axis of their own for these.
        device: where outputs are, and their gradient is to be.

    Attributes:
        takes_tensors: whether outputs and their gradient are tensors on the device.
    """

    def __init__(
        self,
        function: Function,
        flag: str,
        threads: int,
        outputs: Outputs | None,
        moves: bool = False,
        device: Host = HOST,
    ):
        self.function, self.flag, self._device, self.takes_tensors = function, flag, device, device.there
        self.classes = outputs if outputs and outputs.axis is not None else None
        self.moves, self.flat = moves and self.classes is not None, moves
        self.single = False  # whether the function returns a single number
        self.summed = getattr(function, "reduction", None) == "sum"
        prepare_torch(threads, device)
        if isinstance(function, torch.nn.Module) and any(
            parameter.requires_grad for parameter in function.parameters()
        ):
            raise ConfigError(f"{flag}: has parameters, but a loss is not trained; move them into the model")

    def try_on(self, y: Array, labels: Labels) -> None:
        """Learn what the function returns, of outputs of two rows at least. Raises ConfigError for what is no loss."""
        if isinstance(self.function, torch.nn.Module):
            self.function.to(torch.from_numpy(np.empty(0, y.dtype)).dtype)
            if isinstance(self._device, Device):
                self._device.place(self.function)
        _, values = self._values(y, labels)
        what = f"{self.flag}: returns"
        if not isinstance(values, Tensor):
            raise ConfigError(f"{what} {type(values).__name__}; a tensor is needed")
        self.single = values.numel() == 1
        if not self.single and (values.shape[:1] != y.shape[:1] or len(y) in values.shape[1:]):
            shapes = f"outputs of shape {y.shape} and labels of {labels.shape}"
            raise ConfigError(f"{what} shape {tuple(values.shape)} for {shapes}; a number or one a row is needed")
        if not values.is_floating_point() or not values.requires_grad:
            raise ConfigError(f"{what} {values.dtype} without a gradient by the outputs")
        self.summed |= self.single and self._adds_up(y, labels)

    def _adds_up(self, y: Array, labels: Labels) -> bool:
        """Whether the value is about 16 times as high where all rows are there 16 times. That of a loss that compares
        rows with each other may double where they are there twice."""
        y = generator(0, "trial").standard_normal(y.shape).astype(y.dtype)
        once, often = (self._values(np.concatenate([y] * n), np.concatenate([labels] * n))[1] for n in (1, 16))
        return 15 < float(often) / (float(once) or math.inf) < 17

    def __call__(self, y: Array, labels: Labels, weights: Array | None = None) -> tuple[float, float, Array]:
        source, values = self._values(y, labels)
        dtype = numpy_dtype(source.dtype)
        ones = np.ones(len(y), dtype) if weights is None else weights
        if self.single:
            if self.summed and weights is not None:
                raise ConfigError(
                    f"{self.flag}: rows have weights, but it sums over rows; it must give each row its own value"
                )
            weight = float(np.add.reduce(ones, dtype=np.float64))
            each = np.full(tuple(values.shape), 1 if self.summed else weight, dtype)
        else:
            each = self._each(tuple(values.shape), labels, ones)
            weight = float(np.add.reduce(each, axis=None, dtype=np.float64))
        numbers = values.detach().cpu().numpy().astype(np.float64)
        total = float(np.add.reduce(np.multiply(numbers, each, where=each != 0, out=np.zeros_like(numbers)), axis=None))
        if values.requires_grad:  # else these rows have a constant loss
            values.backward(tensor_on(self._device, each).to(values.dtype))
        dy = torch.zeros_like(source) if source.grad is None else source.grad.to_dense()
        return total, weight, dy if self.takes_tensors else dy.numpy()

    def _values(self, y: Array, labels: Labels) -> tuple[Tensor, Any]:
        """The outputs as a leaf of autograd's graph, and what the function makes of them."""
        source = tensor_on(self._device, y).detach().requires_grad_()
        scores, goals = source, labels
        if self.moves and self.classes:
            scores, goals = source.movedim(1 + (self.classes.axis or 0), 1), self.classes.beside(labels)
        same = [n for n in goals.shape if n > 1] == [n for n in y.shape if n > 1]
        if not self.classes and (same or (self.flat and y.size == goals.size)):
            goals = goals.reshape(y.shape)
        with torch.enable_grad():
            # a copy: the function may write to it
            return source, self.function(scores, tensor_on(self._device, np.array(goals)))

    def _each(self, shape: tuple[int, ...], labels: Labels, weights: Array) -> Array:
        """What each value counts for."""
        each: Array = np.broadcast_to(weights.reshape(-1, *[1] * (len(shape) - 1)), shape).copy()
        if labels.dtype.kind != "f" and each.size == labels.size:
            each[labels.reshape(shape) == -1] = 0
        return each

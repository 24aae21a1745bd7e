"""From settings to what is trained: the layers, the loss and the metric; no MPI."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpiml.config import Config
from mpiml.devices import choice
from mpiml.devices.host import HOST, Host
from mpiml.errors import ConfigError
from mpiml.nn import base as nn
from mpiml.nn.checked import OwnLoss, OwnMetric, Sample
from mpiml.nn.losses import (
    R2,
    Accuracy,
    BinaryAccuracy,
    ExactMatch,
    Loss,
    Metric,
    binary_cross_entropy,
    mean_squared_error,
    softmax_cross_entropy,
)
from mpiml.nn.outputs import Outputs
from mpiml.nn.parameters import Shape
from mpiml.nn.recompute import blocks, opened
from mpiml.random import global_generators, keyed
from mpiml.run.result import FIELDS
from mpiml.training import factors
from mpiml.training.task import Task
from mpiml.usercode import called_with, is_name, named

Model = Any  # layers, PyTorch modules, a list of both, or a function (shape, outputs) that returns such
Objective = Callable[[Any, Any, Any, bool, nn.At], tuple[list[float], Any]]


def model_for(config: Config, task: Task, model: Model | None, device: Host = HOST) -> list[nn.Layer]:
    """The layers, named, for what a data set asks, to compute on a device; `model` is in the place of config.model."""
    tokens = task.vocabulary
    make = chosen(config, tokens) if model is None else model
    try:
        _check_inputs(task, config.model if model is None and not is_name(config.model) else None)
        layers = _list_of_layers(_made(make, config, task, device))
        _check_inputs(task, _own_layer(layers[0]))
        nn.name(layers)
        _check_arithmetic(config, layers)
        *shapes, final = nn.stack_shapes(layers, task.shape)  # which shows what PyTorch modules change
        factors.set_rates(layers, config.rates)
        nn.skip_first_dx(layers)
        for layer, before in zip(layers, shapes, strict=True):
            layer.check_place(before, tokens)
            tokens = 0 if nn.parameters([layer]) else tokens
    except ConfigError:
        raise
    except ValueError as error:
        several = f", whose rows have the inputs {task.shapes}" if task.inputs else ""
        raise ConfigError(f"the model does not fit the data{several}: {error}") from None
    if not any(parameter.size and parameter.momentum is None for parameter in nn.parameters(layers)):
        raise ConfigError("the model has no parameters, so there is nothing to train")
    outputs_for(config, task, layers, final)
    return layers


def outputs_for(config: Config, task: Task, layers: Sequence[nn.Layer], shape: Shape) -> Outputs | None:
    """How the model's rows of outputs, of `shape`, meet the labels; None if that is only for a user's own loss and
    metric to know. Raises ConfigError if they do not fit."""
    modules = _torch_modules()
    torch = modules is not None and isinstance(layers[-1], modules.TorchLayer)
    own = is_name(config.loss) and is_name(config.metric)
    try:
        return Outputs.of(shape, task.labels, task.outputs if task.classification else None, torch)
    except ValueError as error:
        if own:
            return None
        what = f"the model gives rows of shape {shape}, but the labels need {error}"
        raise ConfigError(f"{what}{_misfit(config, task, shape)}") from None


def _misfit(config: Config, task: Task, shape: Shape) -> str:
    """What helps where outputs do not fit the labels."""
    outputs, labels = math.prod(shape), math.prod(task.labels)
    hints = []
    if task.classification and labels > 1:
        hints.append("for labels of 0 and 1, each by itself, --loss bce; for values, --loss mse")
        hints += ["one-hot labels: store y.argmax(1)"] if len(task.labels) == 1 else []
    elif task.classification and outputs == 1:
        hints.append("for one output a row, --loss bce if labels are 0 and 1, --loss mse if they are values")
    elif not task.classification and outputs > labels:
        hints.append("labels are values, one output each: if they are classes, make them integers")
    if is_name(config.loss) and not is_name(config.metric):
        hints.append("with a --metric of your own, too, outputs may have any shape")
    return "".join(f"; {hint}" for hint in hints)


def chosen(config: Config, tokens: int = 0) -> Model:
    """What builds the model that --model names."""
    if is_name(config.model):
        model: Model = named(config.model, "--model")
        return called_with(model, f"--model {config.model}", "shape", "outputs") if callable(model) else model
    channels, again = config.channels, {"recompute": config.recompute}
    transformer = {"tokens": tokens, "width": config.width, "heads": config.heads, "blocks": config.blocks}
    transformer["tie"] = config.tie
    builders: dict[str, tuple[str, dict[str, Any]]] = {
        "mlp": ("mpiml.nn.perceptrons:mlp", {"hidden": config.hidden, "activation": config.activation}),
        "cnn": ("mpiml.nn.convnets:cnn", {"channels": channels, "norm": config.norm}),
        "resnet": (
            "mpiml.nn.convnets:resnet",
            {"channels": channels, "blocks": config.blocks, "norm": config.norm} | again,
        ),
        "gpt": ("mpiml.nn.transformers:gpt", transformer | again),
    }
    name, sizes = builders[config.model]
    return functools.partial(named(name, "--model"), **sizes, dropout=config.dropout)


def _check_inputs(task: Task, taker: str | None) -> None:
    """Raise ConfigError if rows have several inputs and would be given to `taker`, which takes one array."""
    if task.inputs and taker:
        text = ", ".join(f"{name or 'one'} {shape}" for name, shape, _ in task.inputs)
        raise ConfigError(
            f"rows have several inputs ({text}), which PyTorch modules take, but {taker} takes one array: give --model "
            "a function that returns a module, or put the inputs beside each other in one array"
        )


def _own_layer(layer: nn.Layer) -> str | None:
    """The name of a layer that is not a PyTorch module."""
    modules = _torch_modules()
    return None if modules and isinstance(layer, modules.TorchLayer) else type(layer).__name__


def _check_arithmetic(config: Config, layers: Sequence[nn.Layer]) -> None:
    """Raise ConfigError for layers that NumPy computes where the settings ask for what PyTorch alone can do."""
    device = [] if choice.is_host(config.device) else [f"--device {config.device}"]
    asked = [*device, *[f"--autocast {config.autocast}"] * (config.autocast != "none")]
    if not asked:
        return
    for layer in layers:
        if name := _own_layer(layer):
            made = "" if is_name(config.model) else f"--model {config.model} is of layers of mpiml: "
            raise ConfigError(
                f"{asked[0]}: {made}{layer.path}, {name}, computes with NumPy, on the processor; give "
                "--model a function that returns a PyTorch module, or a list of such"
            )


def _made(model: Model, config: Config, task: Task, device: Host) -> Any:
    """The model, made if it is a function that makes it, with layers in place of PyTorch's modules.

    What it draws from a generator of the process is a function of the seed alone.
    """
    modules = _torch_modules()
    if isinstance(model, nn.Layer) or (modules and modules.is_module(model)) or not callable(model):
        made = model
    else:
        with keyed(global_generators(), config.seed, "init", "torch"):
            made = model(task.shapes, task.outputs)
        if not modules and _torch_modules():  # the call itself has imported it, and drawn what it liked
            return _made(model, config, task, device)
    given = made if isinstance(made, Sequence) else [made]
    if not any(blocks(given)):
        return _as_layers(made, config, task, device)
    layers = _as_layers(opened(given), config, task, device)
    block_of = dict(zip(map(id, opened(given)), blocks(given), strict=True))
    for layer in layers:
        if isinstance(layer, nn.Layer):
            layer.block = block_of[id(layer.given)]
    return layers


def _as_layers(made: Any, config: Config, task: Task, device: Host) -> Any:
    """A model with layers in the place of PyTorch's modules."""
    if not (modules := _torch_modules()):
        return made
    settings = config.dtype, config.threads, task.inputs, task.bounds
    return modules.as_layers(made, *settings, device=device, autocast=config.autocast != "none")


def described(layers: Sequence[nn.Layer], seed: int) -> dict[str, str]:
    """What ranks must agree in: the kind and the attributes of every layer, the shape and the first values of every
    parameter, under names that a message can use."""
    described: dict[str, str] = {}
    for layer in nn.everything(layers):
        described |= {f"the model, {path}": text for path, text in layer.described().items()}
        for parameter in layer.own_parameters().values():
            described[f"first values of the model, {parameter.name}"] = parameter.described(seed)
    return described


def integers(layers: Sequence[nn.Layer]) -> list[slice]:
    """The values of packed rows that the model takes as integers: those are not to be normalised."""
    modules = _torch_modules()
    return modules.integers(layers) if modules else []


def _torch_modules() -> Any:
    """The adapter of PyTorch modules; None if PyTorch is not imported, which takes seconds."""
    return importlib.import_module("mpiml.nn.torch_modules") if "torch" in sys.modules else None


def _list_of_layers(made: Any) -> list[nn.Layer]:
    layers = list(made) if isinstance(made, Sequence) else [made]
    for layer in layers:
        if not isinstance(layer, nn.Layer):
            raise ValueError(f"it must be a list of layers, but holds {type(layer).__name__}")
    if not layers:
        raise ValueError("it has no layers")
    return layers


@dataclass(frozen=True)
class Scoring:
    """What scores a model's outputs by the labels; `outputs` says how they meet, if that is known."""

    loss: Loss
    metric: Metric
    outputs: Outputs | None


def build_scoring(
    config: Config, task: Task, layers: Sequence[nn.Layer], weighted: bool = False, device: Host = HOST
) -> Scoring:
    """The loss and the metric that the settings name, for the outputs of a model; `weighted`: whether rows have
    weights. Raises ConfigError for those that do not work."""
    *_, shape = nn.stack_shapes(layers, task.shape)
    outputs = outputs_for(config, task, layers, shape)
    rows = next(rows for rows in itertools.count(2) if rows not in (*shape, *task.labels))
    sample = Sample(
        np.zeros((rows, *shape), config.dtype),
        np.zeros((rows, *task.labels), np.intp if task.classification else config.dtype),
        np.ones(rows, config.dtype) if weighted else None,
        *(outputs, config.seed, config.threads, config.ignore if task.classification else None),
        device,
    )
    loss, metric = build_loss(config, sample), build_metric(config, task, sample)
    if device.there and outputs:
        losses = importlib.import_module("mpiml.nn.torch_losses")
        loss = loss if is_name(config.loss) else losses.of_name(config.loss, sample)
        of_classes = not is_name(config.metric) and outputs.axis is not None
        return Scoring(loss, losses.AccuracyThere(outputs, device) if of_classes else metric, outputs)
    if outputs and outputs.axis is not None:
        loss = loss if is_name(config.loss) else outputs.loss(loss)
        metric = metric if is_name(config.metric) else outputs.metric(metric)
    return Scoring(loss, metric, outputs)


def build_loss(config: Config, sample: Sample) -> Loss:
    """The loss that --loss names; one of ours takes classes on the last axis."""
    if is_name(config.loss):
        return OwnLoss(config.loss, sample)
    losses = {"cross_entropy": softmax_cross_entropy, "mse": mean_squared_error, "bce": binary_cross_entropy}
    return losses[config.loss]


def build_metric(config: Config, task: Task, sample: Sample) -> Metric:
    """The metric that --metric names; a user's own is what the named function returns for the number of outputs."""
    if is_name(config.metric):
        metric = OwnMetric(config.metric, task.outputs, sample)
        if metric.name in FIELDS:
            raise ConfigError(
                f"{metric.flag}: is called {metric.name!r}; choose another name than a field of result.json"
            )
        return metric
    if config.metric == "accuracy":
        return Accuracy() if task.classification else BinaryAccuracy()
    return ExactMatch() if config.metric == "exact_match" else R2(1 if len(task.labels) > 1 else task.outputs)


def objective(loss: Loss, metric: Metric, device: Host = HOST) -> Objective:
    """What the last stage computes: (y, labels, weights, measured, at) -> a row of the step record, and the gradient by
    the model's output; the metric is summed only if it is to be measured. `at` keys what a user's own loss and metric
    draw from generators of the process. What takes tensors on the device as they are says so by `takes_tensors`."""
    none: frozenset[str] = frozenset()
    of_loss, of_metric = getattr(loss, "draws", none), getattr(metric, "draws", none)
    loss_there, metric_there = (device.there and getattr(one, "takes_tensors", False) for one in (loss, metric))

    def score(y: Any, labels: Any, weights: Any, measured: bool, at: nn.At) -> tuple[list[float], Any]:
        outputs = y if loss_there else device.array(y)
        with keyed(of_loss, at.seed, "loss", at.step, at.microbatch):
            total, weight, dy = loss(outputs, labels, weights)
        sums: Any = ()
        if measured:
            with keyed(of_metric, at.seed, "metric", at.step, at.microbatch):
                sums = metric.sums(y if metric_there else device.array(y), labels)
        return [total, weight, *sums], dy if loss_there else np.ascontiguousarray(dy, outputs.dtype)

    return score

"""From settings to what is trained: the layers, the loss and the metric; no MPI."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpiml.config import Config
from mpiml.errors import ConfigError
from mpiml.nn import base as nn
from mpiml.nn.checked import OwnLoss, OwnMetric
from mpiml.nn.losses import R2, Accuracy, Loss, Metric, mean_squared_error, softmax_cross_entropy
from mpiml.random import global_generators, keyed
from mpiml.run.result import FIELDS
from mpiml.training.task import Task
from mpiml.usercode import called_with, is_name, named

Model = Any  # layers, PyTorch modules, a list of both, or a function (shape, outputs) that returns such
Objective = Callable[[Any, Any, Any, bool], tuple[list[float], Any]]


def model_for(config: Config, task: Task, model: Model | None) -> list[nn.Layer]:
    """The layers, named, for what a data set asks; `model` is a Model in place of config.model."""
    tokens = task.vocabulary
    make = chosen(config, tokens) if model is None else model
    try:
        _check_inputs(task, config.model if model is None and not is_name(config.model) else None)
        layers = _list_of_layers(_made(make, config, task))
        _check_inputs(task, _own_layer(layers[0]))
        nn.name(layers)
        nn.skip_first_dx(layers)
        *shapes, final = nn.stack_shapes(layers, task.shape)
        for layer, before in zip(layers, shapes, strict=True):
            layer.check_place(before, tokens)
            tokens = 0 if nn.parameters([layer]) else tokens
    except ConfigError:
        raise
    except ValueError as error:
        several = f", whose rows have the inputs {task.shapes}" if task.inputs else ""
        raise ConfigError(f"the model does not fit the data{several}: {error}") from None
    if not any(parameter.size for parameter in nn.parameters(layers)):
        raise ConfigError("the model has no parameters, so there is nothing to train")
    ours = not (is_name(config.loss) and is_name(config.metric))  # else nothing of ours looks at the outputs
    if ours and final != task.final:
        raise ConfigError(f"the model gives rows of shape {final}, but the labels need {task.final}")
    return layers


def chosen(config: Config, tokens: int = 0) -> Model:
    """What builds the model that --model names."""
    if is_name(config.model):
        model: Model = named(config.model, "--model")
        return called_with(model, f"--model {config.model}", "shape", "outputs") if callable(model) else model
    channels, blocks = config.channels, config.blocks
    transformer = {"tokens": tokens, "width": config.width, "heads": config.heads, "blocks": blocks}
    builders: dict[str, tuple[str, dict[str, Any]]] = {
        "mlp": ("mpiml.nn.perceptrons:mlp", {"hidden": config.hidden, "activation": config.activation}),
        "cnn": ("mpiml.nn.convnets:cnn", {"channels": channels, "norm": config.norm}),
        "resnet": ("mpiml.nn.convnets:resnet", {"channels": channels, "blocks": blocks, "norm": config.norm}),
        "gpt": ("mpiml.nn.transformers:gpt", transformer),
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


def _made(model: Model, config: Config, task: Task) -> Any:
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
            return _made(model, config, task)
    return modules.as_layers(made, config.dtype, config.threads, task.inputs, task.bounds) if modules else made


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
    """What knows PyTorch, or None where nobody has imported that: it takes seconds."""
    return importlib.import_module("mpiml.nn.torch_modules") if "torch" in sys.modules else None


def _list_of_layers(made: Any) -> list[nn.Layer]:
    layers = list(made) if isinstance(made, Sequence) else [made]
    for layer in layers:
        if not isinstance(layer, nn.Layer):
            raise ValueError(f"it must be a list of layers, but holds {type(layer).__name__}")
    if not layers:
        raise ValueError("it has no layers")
    return layers


def build_loss(config: Config) -> Loss:
    """The loss that --loss names."""
    if is_name(config.loss):
        return OwnLoss(config.loss)
    return softmax_cross_entropy if config.loss == "cross_entropy" else mean_squared_error


def build_metric(config: Config, outputs: int) -> Metric:
    """The metric that --metric names; a user's own is what the named function returns for `outputs`."""
    if is_name(config.metric):
        metric = OwnMetric(config.metric, outputs)
        if metric.name in FIELDS:
            raise ConfigError(
                f"{metric.flag}: is called {metric.name!r}; choose another name than a field of result.json"
            )
        return metric
    return Accuracy() if config.metric == "accuracy" else R2(outputs)


def objective(loss: Loss, metric: Metric) -> Objective:
    """What the last stage computes: (y, labels, weights, measured) -> a row of the step record, and the gradient by the
    model's output; the metric is summed only if it is to be measured."""

    def score(y: Any, labels: Any, weights: Any, measured: bool) -> tuple[list[float], Any]:
        total, weight, dy = loss(y, labels, weights)
        return [total, weight, *(metric.sums(y, labels) if measured else ())], np.ascontiguousarray(dy, y.dtype)

    return score

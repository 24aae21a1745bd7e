"""From a checkpoint to what other programs take: layers that compute by themselves, and a PyTorch state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpiml.nn.base import Layer, everything, parameters
from mpiml.nn.parameters import Shape
from mpiml.run import checkpoint
from mpiml.training.constants import Constants
from mpiml.training.model import Model, model_for
from mpiml.training.saved import averaged_weights, settings_of
from mpiml.training.task import Task


def trained(file: str | Path, model: Model | None = None, average: bool = False) -> tuple[list[Layer], Shape]:
    """The layers of a checkpoint's model with its weights and constants, and the shape of an input row.

    Needs no MPI: `y, _ = forward(layers, x, At(training=False))` computes outputs. What --fill and --normalize do to
    inputs is not part of the model: they put data.fill in place of NaN, and then make (inputs - data.mean) * data.scale
    of it, with arrays that the checkpoint has as well. If it was saved within a round of workers, the weights are those
    before the round.

    Args:
        model: what the run was trained with, as `train` takes it, or its name, package.module:function. A model that is
            the user's own must be given: a checkpoint is data, and code that it names is not run.
        average: whether to take the average of the weights that a run with --ema keeps, in place of the weights.

    Raises OutputError for a checkpoint that is damaged, of another model or without the average, ConfigError for one
    that needs `model`.
    """
    saved = checkpoint.load(Path(file), checkpoint.is_of_model)
    task, config = Task.of_checkpoint(saved), settings_of(saved, ("model",), {"model": model})
    if average:
        saved.arrays = averaged_weights(saved, config, saved.arrays)
    layers = model_for(config, task, None if isinstance(model, str) else model)
    constants = Constants.of(layers)
    constants.check(saved.header, {p.first.name: (config.dtype, p.shape) for p in parameters(layers)})
    constants.take(saved.arrays)
    for parameter in parameters(layers):
        parameter.value = saved.arrays[parameter.first.name]
    return layers, task.shape


def torch_state_dict(file: str | Path, model: Model | None = None, average: bool = False) -> dict[str, Any]:
    """The weights as torch tensors, as mpiml.nn.export.to_torch names and orders them; of torch modules their own state
    dicts, with buffers and parameters that require no gradient. Arguments as of `trained`."""
    import torch

    from mpiml.nn.export import to_torch
    from mpiml.nn.torch_modules import TorchLayer

    layers, shape = trained(file, model, average)
    arrays = to_torch(layers, {p.first.name: p.value for p in parameters(layers)}, shape)
    modules = {
        f"{layer.path}.".removeprefix("layers."): layer for layer in everything(layers) if isinstance(layer, TorchLayer)
    }
    own = {name: torch.from_numpy(a.copy()) for name, a in arrays.items() if not name.startswith(tuple(modules))}
    return own | {path + name: value for path, layer in modules.items() for name, value in layer.state_dict().items()}

"""From a checkpoint to what other programs take: layers that compute by themselves, and a PyTorch state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpiml.nn.base import Layer, parameters
from mpiml.nn.parameters import Shape
from mpiml.run import checkpoint
from mpiml.training.model import Model, check_constants, constants, model_for
from mpiml.training.saved import settings_of
from mpiml.training.task import Task


def trained(file: str | Path, model: Model | None = None) -> tuple[list[Layer], Shape]:
    """The layers of a checkpoint's model with its weights as their values, and the shape of an input row.

    Needs no MPI: `y, _ = forward(layers, x, At(training=False))` computes outputs. What --fill and --normalize do to
    inputs is not part of the model: they put data.fill in place of NaN, and then make (inputs - data.mean) * data.scale
    of it, with arrays that the checkpoint has as well.

    Args:
        model: what the run was trained with, as `train` takes it, or its name, package.module:function. A model that is
            the user's own must be given: a checkpoint is data, and code that it names is not run.

    Raises OutputError for a checkpoint that is damaged or of another model, ConfigError for one that needs `model`.
    """
    saved = checkpoint.load(Path(file), checkpoint.is_of_model)
    task, config = Task.of_checkpoint(saved), settings_of(saved, ("model",), {"model": model})
    layers = model_for(config, task, None if isinstance(model, str) else model)
    check_constants(constants(layers), saved)
    needed = {p.name: (config.dtype, p.shape) for p in parameters(layers)}
    checkpoint.check_kinds(saved.origin, checkpoint.kinds_of(saved.arrays), needed)
    for parameter in parameters(layers):
        parameter.value = saved.arrays[parameter.name]
    return layers, task.shape


def torch_state_dict(file: str | Path, model: Model | None = None) -> dict[str, Any]:
    """The weights as torch tensors, as mpiml.nn.export.to_torch names and orders them. Arguments as of `trained`."""
    import torch

    from mpiml.nn.export import to_torch

    layers, shape = trained(file, model)
    arrays = to_torch(layers, {p.name: p.value for p in parameters(layers)}, shape)
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

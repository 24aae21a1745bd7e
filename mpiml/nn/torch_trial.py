"""A trial of a PyTorch module on rows of zeros: its output's shape, its cost, and whether it can be trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mpiml.errors import ConfigError
from mpiml.nn.parameters import Shape
from mpiml.nn.torch_tensors import checksum, leaves
from mpiml.random import keyed

ROWS = 2, 3  # rows in two calls: an axis of fixed length cannot have both lengths, so it is not taken for the rows


@dataclass(frozen=True)
class Trial:
    """How a module treats rows of one shape."""

    output: Shape  # of a row that it returns
    flops: int  # of the forward pass, for one row
    takes_ids: bool  # whether the rows must be integers, as token ids are
    writes_input: bool
    reaches_parameters: bool  # whether a backward pass gives at least one parameter a gradient
    reaches_input: bool


def check_parameters(module: torch.nn.Module) -> None:
    """Raise ConfigError for parameters that cannot lie in the flat vector."""
    for name, tensor in module.named_parameters():
        what = f"{type(module).__name__}: its parameter {name}"
        if torch.nn.parameter.is_lazy(tensor):
            raise ConfigError(f"{what} has no shape before the first call; use a module that is not lazy")
        if tensor.device.type != "cpu":
            raise ConfigError(f"{what} is on {tensor.device}; modules are trained on the CPU")
        if tensor.requires_grad and tensor.is_complex():
            raise ConfigError(f"{what} is complex; real parameters are needed")


def attempt(module: torch.nn.Module, shape: Shape, dtype: torch.dtype, name: str) -> Trial:
    """Call the module, `name` in messages, on rows of `shape` in `dtype`, or else on integers.

    Raises ValueError if it can take neither, ConfigError if it cannot be trained.
    """
    errors: list[Exception] = []
    for kind in (dtype, torch.long):
        try:
            return _run_zeros(module, shape, kind, name)
        except ConfigError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            errors.append(error)
    # If the module needs integers, the first error says only that, and the second one what is really wrong.
    reason = str(errors["long" in str(errors[0]).lower()]).splitlines()[0]
    raise ValueError(f"{name} cannot take rows of shape {shape}: {reason}")


def _run_zeros(module: torch.nn.Module, shape: Shape, dtype: torch.dtype, name: str) -> Trial:
    before = _versions(module)
    module.train()
    outputs: list[Shape] = []
    for rows in ROWS:
        source = torch.zeros((rows, *shape), dtype=dtype, requires_grad=dtype.is_floating_point)
        x = source.clone()  # the module may write to it, which a leaf that requires a gradient does not allow
        with keyed(["PyTorch"], 0), torch.enable_grad(), FlopCounterMode(display=False) as counter:
            y = module(x)
        if not isinstance(y, Tensor):
            raise ValueError(f"it returns a {type(y).__name__}, but a layer returns one tensor")
        outputs.append(tuple(y.shape[1:]))
        if not y.is_floating_point() or not y.ndim or len(y) != rows or outputs[0] != outputs[-1]:
            raise ValueError(
                f"for {rows} rows it returns {y.dtype} of shape {tuple(y.shape)}; "
                f"{rows} rows of floating-point numbers are needed, and their shape must always be the same"
            )
    if changed := [tensor for tensor, version in _versions(module).items() if before.get(tensor) != version]:
        raise ConfigError(
            f"{name} changes {', '.join(changed[:3])} in its forward pass, so that ranks would get different values; "
            "use GroupNorm, or BatchNorm with track_running_stats=False"
        )
    reached = leaves(y)
    return Trial(
        output=outputs[0],
        flops=counter.get_total_flops() // rows + math.prod(shape),
        takes_ids=not dtype.is_floating_point,
        writes_input=x._version > 0,
        reaches_parameters=any(tensor.requires_grad and tensor in reached for tensor in module.parameters()),
        reaches_input=source in reached,
    )


def _versions(module: torch.nn.Module) -> dict[str, int]:
    """For each parameter and buffer, a number that changes when it is written to."""
    versions = {name: tensor._version for name, tensor in module.named_parameters()}
    # Buffers by content: writes by torch's normalisations do not count as a new version.
    return versions | {name: checksum(tensor) for name, tensor in module.named_buffers()}

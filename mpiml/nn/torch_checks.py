"""What a PyTorch module must bring to be a layer: parameters, their type, and what it returns."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from mpiml.errors import ConfigError, first_few
from mpiml.nn.parameters import Shape
from mpiml.nn.torch_names import plain_name, uncompiled
from mpiml.nn.torch_tensors import WRONG, one_line, plain

GENERATORS = np.random.Generator, np.random.RandomState, random.Random, torch.Generator


def check_parameters(module: torch.nn.Module, device: str = "cpu") -> None:
    """Raise ConfigError for parameters that cannot lie in the flat vector, and for those on another kind of device than
    the one on which the module is to compute."""
    for name, tensor in module.named_parameters():
        what = f"{type(uncompiled(module)).__name__}: its parameter {plain_name(name)}"
        if torch.nn.parameter.is_lazy(tensor):
            raise ConfigError(f"{what} has no shape before the first call; use a module that is not lazy")
        if tensor.device.type not in ("cpu", device):
            raise ConfigError(
                f"{what} is on {tensor.device}; leave it on the CPU, or give --device {tensor.device.type} to train it "
                "there"
            )


def types_besides(module: torch.nn.Module, dtype: torch.dtype) -> str:
    """The types of the module's real parameters other than `dtype` and PyTorch's default, as text."""
    types = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()}
    return ", ".join(sorted(map(str, types - {dtype, torch.get_default_dtype()})))


def converted(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The module itself, on the host, with real tensors in `dtype` and complex ones in its complex counterpart;
    integers stay."""

    def convert(tensor: Tensor) -> Tensor:
        real, tensor = tensor.is_floating_point(), tensor.cpu()
        return plain(tensor.to(dtype if real else dtype.to_complex()) if real or tensor.is_complex() else tensor)

    return module._apply(convert)  # module.to(dtype) would drop imaginary parts


def output_shape(y: Any, rows: int, expected: Shape | None = None) -> Shape:
    """The shape of a row of what a module returns for `rows` rows. Raises ValueError for what is no layer's output."""
    if not isinstance(y, Tensor):
        raise ValueError(
            f"it returns {_described(y)}, but a layer returns one tensor: let the model function wrap it in a module "
            "whose forward returns that tensor alone, in training and in evaluation"
        )
    shape = tuple(y.shape[1:])
    if not y.is_floating_point() or not y.ndim or len(y) != rows or expected not in (None, shape):
        raise ValueError(
            f"for {rows} rows it returns {y.dtype} of shape {tuple(y.shape)}; "
            f"{rows} rows of floating-point numbers are needed, and their shape must always be the same"
        )
    return shape


def refuse_rows(errors: Sequence[Exception], shape: Shape, tried: Sequence[int], name: str) -> NoReturn:
    """Raise what was wrong when a module was `tried` with so many rows in the run's type, or else with integers."""
    rows = f"{' and '.join(map(str, tried))} rows"
    if not isinstance(errors[0], WRONG):
        errors[0].add_note(f"{name} was called with {rows} of shape {shape} before step 1")
        raise errors[0]
    # If the module needs integers, the first error says only that, and the second one what is really wrong.
    reason = one_line(errors["long" in str(errors[0]).lower()])
    if "it returns" in reason:
        raise ValueError(f"{name} is no layer: {reason}")
    raise ValueError(f"{name} cannot take rows of shape {shape} (it was tried with {rows}): {reason}")


def not_repeated(name: str, changed: Mapping[str, Any]) -> str:
    """What is wrong with a module that gives other outputs when it is called again, and has `changed` attributes."""
    draw = "draw from the generators of torch, numpy.random or random, which are keyed for each call"
    what = f"{name} gives other outputs or gradients or buffers when it is called again with the same rows"
    if not changed:
        return f"{what}; they must follow from rows, parameters, buffers and draws: {draw}"
    of_generators = any(isinstance(value, GENERATORS) for value in changed.values())
    how = draw if of_generators else "make it a buffer (register_buffer), which is averaged and saved"
    return f"{what}, because it changes its {first_few([*changed])}; {how}"


def _described(value: Any) -> str:
    """Such as: a dict of logits (2, 10)."""
    kind = f"a {type(value).__name__}"
    named = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    parts = [(f"{name} ", part) for name, part in named.items()]
    if isinstance(value, tuple | list):
        parts = [("", part) for part in value]
    texts = [f"{name}{tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__}" for name, part in parts]
    return f"{kind} of {', '.join(texts[:4])}" if texts else kind

"""The parts of a user's model that become layers: children of an nn.Sequential, items of a list, else the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from mpiml.errors import ConfigError
from mpiml.nn.torch_names import plain_name, uncompiled


class Joined(torch.nn.Sequential):  # type: ignore[misc]
    """Neighbouring modules that share parameters, so that they are one layer; `text` says so."""

    text: str


def is_module(model: Any) -> bool:
    """Whether a user's model is a PyTorch module; unlike other things that can be called, it makes no model."""
    return isinstance(model, Module)


def parts_of(model: Any) -> list[Any]:
    """The parts of a model that become layers. Raises ConfigError for parts that share parameters and cannot be one."""
    if not is_module(model):
        return _joined(list(model)) if isinstance(model, Sequence) else [model]
    original = uncompiled(model)
    if getattr(type(original), "forward", None) is not torch.nn.Sequential.forward:  # TorchScript has none
        return [model]
    parts = _joined(list(original))
    return parts if original is model else [model.dynamo_ctx(part) for part in parts]  # compiled as the whole was


def _joined(parts: list[Any]) -> list[Any]:
    """The parts, with neighbours in one that share tensors which training changes."""
    first: dict[Tensor, int] = {}
    last: dict[int, tuple[int, str]] = {}  # up to where a part shares, and what
    for index, part in enumerate(parts):
        for name, tensor in _changing(part) if is_module(part) else ():
            if (owner := first.setdefault(tensor, index)) != index:
                last[owner] = index, plain_name(name)
    joined, index = [], 0
    while index < len(parts):
        end, shared = last.get(index, (index, ""))
        inner = index
        while inner < end:
            inner += 1
            end = max(end, last.get(inner, (0, ""))[0])
        joined.append(_one(parts[index : end + 1], index, shared) if shared else parts[index])
        index = end + 1
    return joined


def _changing(part: Module) -> list[tuple[str, Tensor]]:
    """The tensors of a module that training changes, as far as this can be seen without calling it."""
    norms = [p for p in part.modules() if isinstance(p, torch.nn.modules.batchnorm._NormBase)]
    averages = [(n, t) for norm in norms for n, t in norm.named_buffers()]
    return [(name, tensor) for name, tensor in part.named_parameters() if tensor.requires_grad] + averages


def _one(parts: list[Any], first: int, shared: str) -> Joined:
    end = first + len(parts) - 1
    if not all(map(is_module, parts)):
        raise ConfigError(
            f"layers {first} and {end} of the model share {shared}; only parts of one module can share parameters, so "
            f"combine layers {first} to {end} into one module"
        )
    one = Joined(*parts)
    one.text = f"parts {first} to {end} of the model share {shared}: they are one layer"
    return one

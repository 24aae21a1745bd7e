"""Several inputs of a row for a PyTorch module: taken apart in front of it, and handed over by name or in order."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mpiml.errors import ConfigError
from mpiml.nn.parameters import Shape
from mpiml.random import global_generators, keyed

Inputs = Sequence[tuple[str, Shape, str]]  # of each its name ("" if they have an order instead), shape, kind of dtype
Dtypes = list[torch.dtype | None]
ROWS = 2  # that a module is tried on
MOST_TRIES = 64
HOOKS = weakref.WeakKeyDictionary[torch.nn.Module, Any]()  # of modules that take several inputs
INTEGERS = weakref.WeakKeyDictionary[torch.nn.Module, list[slice]]()  # the values that these take as integers


def split_inputs(module: torch.nn.Module, inputs: Inputs, bounds: Sequence[int] = ()) -> None:
    """From now on, the module takes packed rows (rows, values), whose inputs it gets as (rows, *shape) each.

    Its parameters keep their names, and calls with inputs that are not packed work as before. Inputs from integers are
    passed as integers, and from booleans as booleans, if the module does not take them in the run's dtype.

    `bounds` are the lowest and the highest integer of each input. Raises ConfigError if it takes no such inputs.
    """
    if module in HOOKS:
        HOOKS.pop(module).remove()
    width = sum(math.prod(shape) for _, shape, _ in inputs)
    dtypes = _tried(module, inputs, bounds)

    def split(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].shape[1:] != (width,):
            return None
        return _arguments(_parts(args[0], inputs, dtypes), inputs)

    ends = itertools.accumulate((math.prod(shape) for _, shape, _ in inputs), initial=0)
    spans = zip(itertools.starmap(slice, itertools.pairwise(ends)), dtypes, strict=True)
    INTEGERS[module] = [span for span, dtype in spans if dtype is not None]
    HOOKS[module] = module.register_forward_pre_hook(split, with_kwargs=True)


def _tried(module: torch.nn.Module, inputs: Inputs, bounds: Sequence[int]) -> Dtypes:
    """For each input the dtype that the module takes it in; None: in that of the rows."""
    first = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), torch.empty(0))
    zeros = [torch.zeros((ROWS, *shape), dtype=first.dtype) for _, shape, _ in inputs]
    error = None
    for dtypes in itertools.islice(_choices(inputs), MOST_TRIES):
        error = _error(module, _arguments(_as(zeros, dtypes), inputs))
        if error is None:
            for extremes in (bounds[::2], bounds[1::2]):
                parts = [part + extreme for part, extreme in zip(zeros, extremes, strict=False)] or zeros
                if isinstance(error := _error(module, _arguments(_as(parts, dtypes), inputs)), IndexError):
                    raise ConfigError(_out_of_range(module, inputs, extremes))
            return dtypes
    text = ", ".join(f"{name or 'input'} {shape}" for name, shape, _ in inputs)
    how = "by these names" if inputs[0][0] else "in this order"
    reason = " ".join(str(error).split())
    raise ConfigError(f"{type(module).__name__} does not take the data's inputs, {text}, {how}: {reason}")


def _choices(inputs: Inputs) -> Iterator[Dtypes]:
    """The dtypes that the inputs may be passed in: first those of the rows, then all integers as such, then others."""
    others = {"i": [None, torch.long], "u": [None, torch.long], "b": [torch.bool, None, torch.long], "f": [None]}
    of_each = [others[kind] for _, _, kind in inputs]
    yield [dtypes[0] for dtypes in of_each]
    yield [torch.long if kind in "iu" else others[kind][0] for _, _, kind in inputs]
    yield from map(list, itertools.product(*of_each))


def _out_of_range(module: torch.nn.Module, inputs: Inputs, extremes: Sequence[int]) -> str:
    tables = ", ".join(str(part) for part in module.modules() if isinstance(part, torch.nn.Embedding))
    named = zip(inputs, extremes, strict=True)
    text = ", ".join(f"{extreme} in {name or 'an input'}" for (name, _, _), extreme in named if extreme)
    return f"{type(module).__name__} cannot take integers such as {text}: {tables or 'they are out of range'}"


def _error(module: torch.nn.Module, arguments: tuple[tuple[Tensor, ...], dict[str, Tensor]]) -> Exception | None:
    """The error that a call of the module raises, which leaves the module as it was; None if there is none."""
    modes = {part: part.training for part in module.modules()}
    module.eval()  # which leaves running averages as they are
    try:
        with keyed(global_generators(), 0), torch.no_grad():
            module(*arguments[0], **arguments[1])
        return None
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return error
    finally:
        for part, training in modes.items():
            part.training = training


def _as(parts: Sequence[Tensor], dtypes: Dtypes) -> list[Tensor]:
    return [part if dtype is None else part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]


def _parts(x: Tensor, inputs: Inputs, dtypes: Dtypes) -> list[Tensor]:
    flat = x.split([math.prod(shape) for _, shape, _ in inputs], dim=1)
    parts = [part.reshape(len(x), *shape) for part, (_, shape, _) in zip(flat, inputs, strict=True)]
    return _as(parts, dtypes)


def _arguments(parts: list[Tensor], inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    named = {name: part for (name, _, _), part in zip(inputs, parts, strict=True) if name}
    return (() if named else tuple(parts)), named

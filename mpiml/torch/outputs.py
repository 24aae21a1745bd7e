"""The tensors in what a module returns, in whatever they are packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module

DEEPEST = 8  # a module's output may refer to anything
SKIPPED = (str, bytes, int, float, type(None), type, Module, ModuleType)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a value: in lists, tuples, sets and dicts, and in attributes, such as those of dataclasses."""
    return _tensors_in(value, 0, set())


def _tensors_in(value: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth < DEEPEST and not isinstance(value, SKIPPED) and id(value) not in seen:
        seen.add(id(value))
        inner: Any = ()
        if isinstance(value, Mapping):
            inner = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            inner = value
        elif hasattr(value, "__dict__"):
            inner = vars(value).values()
        elif hasattr(value, "__dataclass_fields__"):  # with slots
            inner = [getattr(value, name) for name in value.__dataclass_fields__]
        for item in inner:
            yield from _tensors_in(item, depth + 1, seen)

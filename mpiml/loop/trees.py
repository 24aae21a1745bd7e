"""Arrays in lists, tuples and dicts, within each other: taken apart, and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.errors import ConfigError

Leaf = NDArray[Any]
KINDS = (np.dtype(np.float32), np.dtype(np.float64))


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All that is no list, tuple or dict in a tree, by name, such as "layers.0.weight"; dicts in the order of their
    keys."""
    if isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            yield from leaves(tree[key], f"{name}.{key}".lstrip("."))
    elif isinstance(tree, (list, tuple)):
        for index, item in enumerate(tree):
            yield from leaves(item, f"{name}.{index}".lstrip("."))
    else:
        yield name or "the array", tree


def rebuilt(tree: Any, new: Sequence[Any]) -> Any:
    """A tree of the same form with `new` in place of its leaves, in the order of `leaves`."""
    return _rebuilt(tree, iter(new))


def _rebuilt(tree: Any, new: Iterator[Any]) -> Any:
    if isinstance(tree, Mapping):
        done = {key: _rebuilt(tree[key], new) for key in sorted(tree, key=str)}
        return {key: done[key] for key in tree}
    if isinstance(tree, (list, tuple)):
        items = [_rebuilt(item, new) for item in tree]
        named = isinstance(tree, tuple) and hasattr(tree, "_fields")
        return type(tree)(*items) if named else tuple(items) if isinstance(tree, tuple) else items
    return next(new)


def array(value: Any, name: str) -> Leaf:
    """A leaf as a NumPy array of float32 or float64, without a copy where that is possible; numbers become float64.

    Raises ConfigError for anything else.
    """
    if isinstance(value, (int, float, np.integer)):
        return np.asarray(value, np.float64)
    try:
        if not isinstance(value, np.ndarray) and hasattr(value, "detach"):
            value = value.detach()  # PyTorch gives no array of what autograd follows
        found = np.asarray(value)
    except Exception as error:  # each library has its own for memory of a device
        raise ConfigError(
            f"{name}: {type(value).__name__} gives no NumPy array ({error}); move it to the CPU"
        ) from None
    if found.dtype not in KINDS:
        raise ConfigError(f"{name}: is {found.dtype}, but only float32 and float64 are summed")
    return found

"""Arrays in lists, tuples and dicts, within each other: taken apart, and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpiml.errors import ConfigError

KINDS = (np.dtype(np.float32), np.dtype(np.float64))
HOST = (1, 3, 11)  # DLPack's numbers of memory of the host: ordinary, and pinned for CUDA and for ROCm


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


def values(tree: Any) -> Iterator[Any]:
    """The same without names, which takes less time."""
    if isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            yield from values(tree[key])
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from values(item)
    else:
        yield tree


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


def is_number(value: Any) -> bool:
    """Whether a leaf is a number of Python's own: it is summed in float64, and its sum is such a number."""
    return isinstance(value, (int, float))


def array(value: Any, name: str) -> NDArray[Any]:
    """A leaf as a NumPy array, without a copy where that is possible.

    Raises ConfigError for what NumPy makes no array of, and for what does not lie in the memory of the host.
    """
    if type(value) is np.ndarray:
        return value
    try:
        if hasattr(value, "detach"):
            value = value.detach()  # PyTorch gives no array of what autograd follows
        elif hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        elif hasattr(value, "__dlpack_device__") and _on_device(value):
            raise BufferError("it lies in the memory of a device, such as a GPU")
        return np.asarray(value, np.float64 if is_number(value) else None)
    except Exception as error:  # each library has its own for memory of a device
        kind, why = type(value).__name__, str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{name}: no NumPy array can be made of a {kind} ({why}); .cpu() or .float() may help"
        ) from error


def _on_device(value: Any) -> bool:
    """Whether a leaf says that it lies in memory of a device. JAX would copy it for each `put`, without a word."""
    try:
        return bool(value.__dlpack_device__()[0] not in HOST)
    except Exception:  # as JAX does for what lies on several devices
        return False


def summed(value: Any, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype in which a leaf is summed, and its shape. Raises ConfigError unless it is float32 or float64."""
    leaf = array(value, name)
    kind = leaf.dtype.newbyteorder("=")
    if kind not in KINDS:
        what = type(value).__name__ if kind.hasobject and not leaf.shape else str(kind)
        raise ConfigError(f"{name}: is {what}, but only float32 and float64 are summed, and Python's own numbers")
    return kind, leaf.shape


def write(value: Any, view: NDArray[Any], weight: float, name: str) -> None:
    """Write `weight` times a leaf to its place in a slot."""
    given = array(value, name)
    casting: Literal["safe", "same_kind"] = "safe" if given.ndim else "same_kind"  # of numbers of Python's own, any
    if given.shape != view.shape or not np.can_cast(given.dtype, view.dtype, casting):
        what = type(value).__name__ if given.dtype.hasobject else f"{given.dtype} {given.shape}"
        raise ConfigError(f"{name} is {what}, but {view.dtype} {view.shape} in `like`")
    if weight == 0:
        view.fill(0)  # 0 times what is not finite would not be 0
    elif weight == 1:
        np.copyto(view, given, casting)
    else:
        with np.errstate(all="ignore"):  # the sum is looked at
            np.multiply(given, view.dtype.type(weight), out=view)

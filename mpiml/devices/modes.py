"""Watching the operations of PyTorch: among others those that use indices, before a device does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TABLES = ("embedding", "embedding_bag", "embedding_bag_forward_only")
ALONG = ("gather", "index_select", "index_add", "index_copy", "index_reduce", "index_fill")  # an axis
SCATTERED = ("scatter", "scatter_add", "scatter_reduce")
LISTS = ("index", "index_put", "index_put_impl", "unsafe_index", "unsafe_index_put")
TARGETS = ("nll_loss_forward", "nll_loss2d_forward")


class Mode(TorchDispatchMode):  # type: ignore[misc]
    """Gets the operations of PyTorch that are called within it."""

    supports_higher_order_operators = True  # such as flex_attention, which are called as they are

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch asks. To skip it would be to load it first, which takes seconds."""
        return False


class CheckedIndices(Mode):
    """Within it, an index out of range is an IndexError, as on the host. A GPU would notice it in a kernel, and then do
    nothing more for this process."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for index, low, high in _ranges(func, args, kwargs):
            if index.numel() and not (low <= int(index.min()) and int(index.max()) < high):
                raise IndexError(f"index out of range: {int(index.min())} to {int(index.max())}, of {high}")
        return func(*args, **kwargs)


def _ranges(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, int, int]]:
    """The indices that an operation uses, with the lowest that is allowed and the first that is not."""
    if not isinstance(func, torch._ops.OpOverload):
        return
    name = func._schema.name.partition("::")[2].strip("_")
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if name in TABLES:
        yield named["indices"], 0, len(named["weight"])
    elif name in ALONG or name in SCATTERED:
        size = named["self"].shape[named["dim"]] if named["self"].ndim else 1
        yield named["index"], -size if name == "index_fill" else 0, size  # which counts from the end, too
    elif name == "take":
        yield named["index"], -named["self"].numel(), named["self"].numel()
    elif name in TARGETS:
        classes, target = named["self"].shape[min(1, named["self"].ndim - 1)], named["target"]
        yield target[target != named["ignore_index"]], 0, classes
    elif name in LISTS:
        axis = 0
        for index in named["indices"]:
            is_mask = index is not None and index.element_size() == 1
            if index is not None and not is_mask:
                size = named["self"].shape[axis]
                yield index, -size, size
            axis += index.ndim if is_mask else 1

"""Memory that PyTorch allocates for tensors and does not free, by the operations that make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):  # type: ignore[misc]
    """Within its block, notes the memory of all tensors that operations make. What PyTorch did not allocate itself,
    such as that of NumPy's arrays, is left out. Compiled modules compute as if they were not compiled."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                if storage.resizable():
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return made

    @property
    def held(self) -> int:
        """Bytes of what has been made and is not freed."""
        return sum(size for ref, size in self._made.values() if not ref.expired())

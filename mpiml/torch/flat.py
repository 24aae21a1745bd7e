"""Tensors in flat vectors, of float32 and of float64, as a sum takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpiml.clock import unwatched
from mpiml.devices.device import Device
from mpiml.nn.torch_tensors import as_kind_of, as_real, is_whole, real_shape
from mpiml.vectors import padded

Arrays = list[NDArray[Any]]
DOUBLE = (torch.float64, torch.complex128)


class Slot:
    """Views of the flat vectors of one slot, or of the total: of each tensor, and of a flag for each. `written` is to
    be called when they have been written to: it takes vectors on a device to where they are summed."""

    def __init__(self, tensors: list[Tensor], flags: Tensor, written: Callable[[], object] = unwatched):
        self.tensors, self.flags, self.written = tensors, flags, written


class Places:
    """Where each of these tensors lies in the flat vectors, from a 64-byte boundary on; and behind them the flags.

    float64 and integers lie in the one of float64, all others in that of float32: lower precisions are summed in it.

    Attributes:
        like: the vectors' form, as `Sum` takes it.
    """

    def __init__(self, tensors: Iterable[Tensor], flags: int):
        self._sizes: dict[np.dtype[Any], int] = {np.dtype(np.float32): 0, np.dtype(np.float64): 0}
        shapes = [(_kind(tensor), real_shape(tensor)) for tensor in tensors]
        self._places = [self._place(kind, shape) for kind, shape in [*shapes, (np.dtype(np.float32), (flags,))]]
        self._kinds = [kind for kind, size in self._sizes.items() if size]

    @property
    def like(self) -> Arrays:
        return [np.broadcast_to(np.zeros((), kind), self._sizes[kind]) for kind in self._kinds]

    def slot(self, arrays: Sequence[NDArray[Any]]) -> Slot:
        """Views of such vectors."""
        return self._views([torch.from_numpy(array) for array in arrays])

    def _views(self, given: Sequence[Tensor]) -> Slot:
        vectors = dict(zip(self._kinds, given, strict=True))
        *tensors, flags = (
            vectors[kind][start : start + math.prod(shape)].view(shape) for kind, start, shape in self._places
        )
        return Slot(tensors, flags)

    def there(self, device: Device) -> Vectors:
        """Such vectors on a device."""
        return Vectors(self, device)

    def _place(self, kind: np.dtype[Any], shape: tuple[int, ...]) -> tuple[np.dtype[Any], int, tuple[int, ...]]:
        start = self._sizes[kind]
        self._sizes[kind] += padded(math.prod(shape), kind)
        return kind, start, shape


class Vectors:
    """Vectors on a device, through which slots get to the host, one after another, and the total gets back."""

    def __init__(self, places: Places, device: Device):
        self._device = device
        self._vectors = [device.vectors.zeros(len(array), array.dtype) for array in places.like]
        self._places = places

    def slot(self, arrays: Arrays) -> Slot:
        """Views of the vectors, for a slot whose own are `arrays`."""
        slot = self._places._views(self._vectors)
        slot.written = partial(self._fetch, arrays)
        return slot

    def total(self, arrays: Arrays) -> Slot:
        """Views of the vectors, which have the values of `arrays` until a slot is written to."""
        for array, vector in zip(arrays, self._vectors, strict=True):
            self._device.put(array, vector)
        self._device.settle()
        return self._places._views(self._vectors)

    def lock(self, *arrays: Arrays) -> None:
        """Lock memory of the host, of which these are: slots, and the total."""
        for alike in zip(*arrays, strict=True):
            self._device.lock(*alike)

    def _fetch(self, arrays: Arrays) -> None:
        for array, vector in zip(arrays, self._vectors, strict=True):
            self._device.fetch(vector, array)
        self._device.settle()


def copy(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy tensors into views of flat vectors."""
    _copy_alike(into, [as_real(t) if t.is_complex() else t for t in tensors])


def take(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """The reverse: give tensors values of flat vectors; integers get the nearest."""
    alike = all(t.dtype == v.dtype for t, v in zip(tensors, values, strict=True))
    _copy_alike(tensors, values if alike else list(map(as_kind_of, tensors, values)))


def _copy_alike(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy tensors into others of their shapes, those of the same types at once: on GPUs, some versions of PyTorch take
    the types of all for those of the first (its issue 173383)."""
    pairs: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(into, tensors, strict=True):
        targets, sources = pairs.setdefault((target.dtype, source.dtype), ([], []))
        targets.append(target)
        sources.append(source)
    for targets, sources in pairs.values():
        torch._foreach_copy_(targets, sources)


def _kind(tensor: Tensor) -> np.dtype[Any]:
    return np.dtype(np.float64 if tensor.dtype in DOUBLE or is_whole(tensor) else np.float32)

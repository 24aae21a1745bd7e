"""A device with memory of its own: what lies there, and how it gets there and back."""

from __future__ import annotations

import mmap
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from torch.nn import Module

from mpiml import vectors
from mpiml.devices.arithmetic import OnDevice
from mpiml.devices.host import Host
from mpiml.devices.modes import CheckedIndices
from mpiml.errors import ConfigError

Array = NDArray[Any]
PAGE = mmap.PAGESIZE
LESS = "fewer rows in a micro-batch (more --microbatches), more stages (--pipe), or fewer ranks to a device need less"
STAGING = 1 << 24  # bytes of page-locked memory through which arrays travel that are not page-locked themselves


class Device(Host, ABC):
    """A device of a rank. Its four verbs move what a step needs: `place` a module once; then `fetch` gradients, `put`
    values, and `settle`, after which what has been fetched and put is there.

    Transfers run beside computations; each begins when what was computed before it is there. Until `settle` neither end
    of one may be changed. Arrays that travel in every step should be locked first, which makes their transfers fast.

    Args:
        kind, number, name: as Host has them; alone: whether no other rank uses it.
    """

    there = True
    boundary = vectors.BOUNDARY

    def __init__(self, kind: str, number: int, name: str, alone: bool):
        self.kind, self.number, self.name, self.alone = kind, number, name, alone
        self.vectors = OnDevice(self)
        self._locked: list[tuple[int, int]] = []  # ranges of addresses
        self._staging: Tensor | None = None

    def place(self, module: Module) -> None:
        """Move what the module keeps besides the parameters that are trained: buffers, and parameters that require no
        gradient. Those that are trained become views of a vector that lies here."""
        for tensor in _kept(module):
            tensor.data = self.tensor(tensor.data)

    @contextmanager
    def lent(self, module: Module) -> Iterator[None]:
        """Within the block the module is here, with all that it has; afterwards it is on the host as it was."""
        before = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
        for tensor, data in before:
            tensor.data = self.tensor(data)
        try:
            yield
        finally:
            for tensor, data in before:
                tensor.data = data
            known = {id(tensor) for tensor, _ in before}
            for tensor in (*module.parameters(), *module.buffers()):
                if id(tensor) not in known:  # a call has made it
                    tensor.data = self.on_host(tensor.data)

    def fetch(self, source: Tensor, target: Array) -> None:
        """Begin to copy a vector that lies here into an array of the same type and length on the host."""
        if self._is_locked(target):
            self._begin(source, torch.from_numpy(target))
            return
        for part, staged in self._staged(target):
            self._begin(source[part], staged)
            self.settle()
            target[part] = staged.numpy()

    def put(self, source: Array, target: Tensor) -> None:
        """Begin to copy an array on the host into a vector that lies here."""
        if self._is_locked(source):
            self._begin(_readable(source), target)
            return
        for part, staged in self._staged(source):
            staged.numpy()[...] = source[part]
            self._begin(staged, target[part])
            self.settle()

    def lock(self, *arrays: Array) -> None:
        """Lock the pages of arrays in memory, those that share a page at once, so that the device reads and writes them
        by itself. Where the system does not allow that, they travel through memory that is locked."""
        for start, stop in _joined(sorted(_pages(array) for array in arrays if array.nbytes)):
            first = max([start, *(last for begin, last in self._locked if begin <= start < last)])
            end = min([stop, *(begin for begin, last in self._locked if begin < stop <= last)])
            if first < end and self._lock(first, end - first):
                self._locked.append((first, end))

    def unlock(self, *arrays: Array) -> None:
        """Undo `lock`, of all arrays if none are given; to be called before their memory is given back."""
        if not arrays:
            while self._locked:
                self._unlock(self._locked.pop()[0])
            self._staging = None
        for start, stop in _joined(sorted(_pages(array) for array in arrays)):
            for one in [one for one in self._locked if start <= one[0] and one[1] <= stop]:
                self._locked.remove(one)
                self._unlock(one[0])

    def free(self) -> None:
        self.unlock()

    @property
    def locked(self) -> int:
        """Bytes that are locked."""
        return sum(stop - start for start, stop in self._locked)

    def array(self, array: Any) -> Any:
        return self.on_host(array).numpy() if isinstance(array, Tensor) else array

    def checked_indices(self) -> AbstractContextManager[object]:
        return CheckedIndices()

    def check_memory(self, needed: int, what: str) -> None:
        free, total = self.memory()
        if needed * self.ranks > free:
            each = f"{self.ranks} times " * (self.ranks > 1)
            raise ConfigError(
                f"--device {self.kind}: {what} needs {each}{needed / 1e9:.3g} GB on {self.name}, of which "
                f"{free / 1e9:.3g} of {total / 1e9:.3g} GB are free; more stages (--pipe), or fewer ranks to a device, "
                "need less"
            )

    @contextmanager
    def named_memory(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            of_cublas = "ALLOC_FAILED" in str(error)
            if not (isinstance(error, torch.cuda.OutOfMemoryError) or of_cublas):
                raise
            free, total = self.memory()
            reason = " ".join(str(error).split()).partition(". ")[0]
            raise ConfigError(
                f"--device {self.kind}: too little memory on {self.name} for {what}: {reason}; "
                f"{free / 1e9:.3g} of {total / 1e9:.3g} GB are free; {LESS}"
            ) from None

    def empty(self, size: int, dtype: DTypeLike) -> Tensor:
        """A vector here of `size` elements, not initialised. Raises ConfigError if memory is not free."""
        with self.named_memory(f"a vector of {size:,} elements"):
            return self._empty(size, dtype_of(dtype))

    def _is_locked(self, array: Array) -> bool:
        start, stop = array.ctypes.data, array.ctypes.data + array.nbytes
        return any(first <= start and stop <= last for first, last in self._locked)

    def _staged(self, array: Array) -> Iterator[tuple[slice, Tensor]]:
        """Parts of an array, each with locked memory of its size; one after another."""
        if self._staging is None:
            self._staging = self._pinned(STAGING)
        staging = self._staging.view(dtype_of(array.dtype))
        for start in range(0, len(array), len(staging)):
            part = slice(start, min(start + len(staging), len(array)))
            yield part, staging[: part.stop - start]

    # What kinds of devices do.

    @abstractmethod
    def tensor(self, given: Tensor | Array) -> Tensor:
        """A tensor here with the same values, which nothing else changes: the tensor itself if it is here."""

    @abstractmethod
    def on_host(self, tensor: Tensor) -> Tensor:
        """The same on the host."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Bytes that are free here, those that this process keeps for itself included, and bytes in all."""

    @abstractmethod
    def settle(self) -> None:
        """Return when all transfers are over."""

    def wait(self) -> None:
        self.settle()

    @abstractmethod
    def _begin(self, source: Tensor, target: Tensor) -> None:
        """Begin to copy between tensors of one type, one of which is here."""

    @abstractmethod
    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """A vector here, not initialised. Raises torch.cuda.OutOfMemoryError."""

    @abstractmethod
    def _pinned(self, size: int) -> Tensor:
        """So many bytes of the host in memory that is locked."""

    @abstractmethod
    def _lock(self, address: int, size: int) -> bool:
        """Whether so many bytes are now locked."""

    @abstractmethod
    def _unlock(self, address: int) -> None:
        """Undo what `_lock` did there."""


def dtype_of(dtype: DTypeLike) -> torch.dtype:
    """PyTorch's type of the same kind."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _readable(array: Array) -> Tensor:
    """An array as a tensor that nothing writes to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that torch does not know of read-only memory
        return torch.from_numpy(array)


def _pages(array: Array) -> tuple[int, int]:
    """Where the pages of an array begin and end."""
    start, stop = array.ctypes.data, array.ctypes.data + array.nbytes
    return start // PAGE * PAGE, -(-stop // PAGE) * PAGE


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges, in one where they overlap: others may be of different kinds of memory."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and start < joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


def _kept(module: Module) -> Iterator[Tensor]:
    yield from module.buffers()
    yield from (parameter for parameter in module.parameters() if not parameter.requires_grad)

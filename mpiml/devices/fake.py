"""A pretended device, for tests on machines without GPUs: its memory is apart from the host's, and that is enforced.

What a GPU would do wrong shows here too: memory that has not been written holds NaN; a transfer takes place as late as
it may, when it is waited for; an operation of tensors on both sides is refused, as PyTorch refuses it for a GPU; and
after an index out of range nothing works any more.

`MPIML_FAKE_DEVICES` says which devices a process sees, by their types: "a,a" are two of one type, "a:64" is one with
64 MB, "" are none. By default each rank sees one for each rank of a node.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from mpiml.devices.arithmetic import OnDevice
from mpiml.devices.device import Array, Device
from mpiml.devices.host import HOST, Host
from mpiml.devices.modes import Mode
from mpiml.errors import ConfigError

DEVICES = "MPIML_FAKE_DEVICES"
UNLOCKED = "MPIML_FAKE_UNLOCKED"  # if set, no memory of the host can be locked
MEMORY = 4e9  # bytes, unless the name of a device says so
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default)
ARRAYS = (torch.Tensor.numpy, torch.Tensor.__array__)
OUT_OF_RANGE = re.compile(r"(?<!Dimension )out of (range|bounds)|not in the valid range")
BROKEN = "an index is out of range: the device does nothing more"
VIEWS = (
    torch.Tensor.to,
    torch.as_tensor,
    torch.asarray,
)  # calls that may name a device and return what they were given


def seen(node: str, ranks: int) -> list[tuple[str, str]]:
    """As mpiml.devices.cuda.seen; `ranks` are those of the node. Raises ConfigError if there are none."""
    names = os.environ.get(DEVICES)
    every = ["fake"] * ranks if names is None else [name for name in names.split(",") if name]
    if not every:
        raise ConfigError(f"--device fake: {DEVICES} is empty, so there are none")
    return [(name, f"{node}, device {number}") for number, name in enumerate(every)]


def of_tensor(tensor: Tensor) -> Host:
    """The pretended device on which a tensor lies, or the host."""
    return Fake(0, "fake", alone=True) if Sides.on_there(tensor) else HOST


class Fake(Device):
    """A pretended device. See Device."""

    def __init__(self, number: int, name: str, alone: bool):
        super().__init__("fake", number, name, alone)
        self.torch = torch.device("cpu")
        self._sides = Sides.on()
        self.vectors = OnFake(self, self._sides)
        self._size = int(float(name.partition(":")[2] or MEMORY / 1e6) * 1e6)
        self._used = 0  # bytes of vectors, which are never given back
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def tensor(self, given: Tensor | Array) -> Tensor:
        if isinstance(given, Tensor) and self._sides.is_there(given):
            return given
        with self._sides.off():
            here = given.detach().clone() if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
        return self._sides.put(here)

    def on_host(self, tensor: Tensor) -> Tensor:
        with self._sides.off():
            return tensor.detach().clone()

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        needed = size * dtype.itemsize
        if needed > self.memory()[0]:
            raise torch.cuda.OutOfMemoryError(f"a vector of {size:,} elements does not fit")
        self._used += needed
        with self._sides.off():
            vector = torch.full((size,), math.nan, dtype=dtype)
        return self._sides.put(vector)

    def free(self) -> None:
        super().free()
        Sides.end()

    def memory(self) -> tuple[int, int]:
        return self._size - self._used, self._size

    def settle(self) -> None:
        with self._sides.off():
            for source, target in self._waiting:
                target.copy_(source)
        self._waiting.clear()

    def _begin(self, source: Tensor, target: Tensor) -> None:
        if self._sides.is_there(source) == self._sides.is_there(target):
            raise RuntimeError("a transfer between two places on one side")
        with self._sides.off():
            target.fill_(math.nan)
        self._waiting.append((source, target))

    def _pinned(self, size: int) -> Tensor:
        with self._sides.off():
            return torch.empty(size, dtype=torch.uint8)

    def _lock(self, address: int, size: int) -> bool:
        return UNLOCKED not in os.environ

    def _unlock(self, address: int) -> None:
        pass


class OnFake(OnDevice):
    """Arithmetic as on a GPU, on the processor."""

    def __init__(self, device: Fake, sides: Sides):
        super().__init__(device)
        self._sides = sides

    def sqrt(self, a: Tensor, out: Tensor) -> Tensor:
        """The root. PyTorch's on the processor is not always the nearest number."""
        with self._sides.off():
            np.sqrt(a.numpy(), out=out.numpy())
        return out


class Sides(Mode):
    """Knows which tensors lie on the device, and refuses operations that mix them with others.

    What an operation makes lies where its arguments do; if it has none, on the host, unless the call names a device, as
    by `device=x.device`. The text "cpu" names the host. As on a GPU, numbers of the host, tensors without axes, may be
    mixed with tensors there.
    """

    _entered: Sides | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls(self)
        self._there: dict[int, StorageWeakRef] = {}
        self._broken = False
        self._limit = 1024  # of entries, before those of freed memory are dropped

    @classmethod
    def on(cls) -> Sides:
        """The one of this process, which watches from now on."""
        if cls._entered is None:
            cls._entered = cls()
            cls._entered.__enter__()
            cls._entered.calls.__enter__()
        return cls._entered

    @classmethod
    def end(cls) -> None:
        """Watch no more; devices that are there lose their memory."""
        if cls._entered is not None:
            cls._entered.calls.__exit__(None, None, None)
            cls._entered.__exit__(None, None, None)
            cls._entered = None

    @classmethod
    def on_there(cls, tensor: Tensor) -> bool:
        """Whether a tensor lies on a device of this process."""
        return cls._entered is not None and cls._entered.is_there(tensor)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block operations are not watched."""
        before, self.calls.watching = self.calls.watching, False
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                yield
        finally:
            self.calls.watching = before

    def put(self, tensor: Tensor) -> Tensor:
        """Count the tensor's memory as the device's. Returns the tensor."""
        for storage in _storages(tensor):
            self._there[storage._cdata] = StorageWeakRef(storage)
        if len(self._there) > self._limit:
            self._there = {key: ref for key, ref in self._there.items() if not ref.expired()}
            self._limit = max(1024, 2 * len(self._there))
        return tensor

    def drop(self, tensor: Tensor) -> Tensor:
        """Count the tensor's memory as the host's. Returns the tensor."""
        for storage in _storages(tensor):
            del self._there[storage._cdata]
        return tensor

    def is_there(self, tensor: Tensor) -> bool:
        return any(storage._cdata in self._there for storage in _storages(tensor))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        there = [self.is_there(tensor) for tensor in given]
        sizes = {is_there for tensor, is_there in zip(given, there, strict=True) if tensor.ndim}
        if len(sizes) > 1 and func not in COPIES:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but some are on the host and some on the fake "
                "device"
            )
        made = self._made_there(func, args, kwargs) if any(there) else func(*args, **kwargs)
        if func not in COPIES and (any(there) or (not given and self.calls.there)):
            for tensor in _tensors(made):
                self.put(tensor)
        return made

    def _made_there(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What an operation makes of tensors on the device. As on a GPU, an index out of range is its last."""
        if not self._broken:
            try:
                return func(*args, **kwargs)
            except (IndexError, RuntimeError) as error:
                if not OUT_OF_RANGE.search(str(error)):
                    raise
                self._broken = True
        raise RuntimeError(f"{func}: {BROKEN}")


class Calls(TorchFunctionMode):  # type: ignore[misc]
    """Knows which calls of PyTorch's functions name a device, which its operations cannot: they are all given one. And
    refuses to show NumPy what lies on the device."""

    def __init__(self, sides: Sides):
        super().__init__()
        self._sides = sides
        self._arguments: Any = ()
        self.watching = True

    @property
    def there(self) -> bool:
        """Whether the call that runs has arguments on the device, so that what it makes for itself is there too."""
        return any(map(self._sides.is_there, _tensors(self._arguments)))

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ARRAYS and self.watching and self._sides.is_there(args[0]):
            raise TypeError("can't convert fake device type tensor to numpy; copy the tensor to host memory first")
        before, self._arguments = self._arguments, (args, kwargs)
        try:
            made = func(*args, **kwargs)
        finally:
            self._arguments = before
        if isinstance(made, Tensor):
            named = kwargs.get("device", args[1] if func is Tensor.to and len(args) > 1 else None)
            if isinstance(named, torch.device) and named.type == "cpu" and not self._sides.is_there(made):
                return self._sides.put(made.clone() if func in VIEWS else made)
            if (func is Tensor.cpu or named == "cpu") and self._sides.is_there(made):
                return self._sides.drop(made.clone())
        return made


def _tensors(of: Any) -> list[Tensor]:
    """All tensors in arguments of a call, or in what it returns."""
    if isinstance(of, Tensor):
        return [of]
    if isinstance(of, dict):
        of = of.values()
    elif not isinstance(of, (tuple, list)):
        return []
    return [tensor for one in of for tensor in _tensors(one)]


def _storages(tensor: Tensor) -> list[Any]:
    """The memory of a tensor, of a sparse one in several parts."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # as torch.func has them
        return _storages(torch._C._functorch.get_unwrapped(tensor))
    if tensor.layout == torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices().untyped_storage(), tensor._values().untyped_storage()]
    return [tensor.values().untyped_storage()]

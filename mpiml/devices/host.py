"""The host as the device of a rank: vectors are where layers compute, and nothing travels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from mpiml import vectors

NOTHING = nullcontext()  # made once: steps enter it


class Host:
    """The processor. A device of a rank is used alike (mpiml.devices.device.Device).

    Attributes:
        kind: as --device has it; name: the type of the device; number: of those that the rank sees.
        alone: whether no other rank uses it; ranks: how many do.
        there: whether it has memory of its own.
        vectors: functions on flat vectors that lie there (mpiml.vectors).
        torch: PyTorch's name for it.
        tf32: whether products of float32 may round their factors to TF32; None: as the process has it.
        boundary: bytes on a multiple of which tensors begin between modules, so that all grids compute the same.
    """

    kind, name, number = "cpu", "", 0
    alone, ranks, there = True, 1, False
    vectors: Any = vectors
    torch: Any = "cpu"
    tf32: bool | None = None
    boundary = vectors.ALIGNMENT

    def array(self, array: Any) -> Any:
        """What lies there, as an array on the host that nothing changes."""
        return array

    @contextmanager
    def lent(self, module: Any) -> Iterator[None]:
        """Within the block the module is there."""
        yield

    def checked_indices(self) -> AbstractContextManager[object]:
        """Within the block, an index out of range is an IndexError of PyTorch's, which leaves the device as it is. For
        code that is tried; it takes time."""
        return NOTHING

    def check_memory(self, needed: int, what: str) -> None:
        """Raise ConfigError unless each rank that uses it can have so many bytes there, for `what`."""

    def fix_arithmetic(self) -> None:
        """Let it compute the same bits in each call, whatever a user's code has set."""

    def wait(self) -> None:
        """Return when all that has been computed and copied is there; for measurements."""

    def unlock(self, *arrays: Any) -> None:
        """Let go of memory of the host that is locked for the device."""

    def free(self) -> None:
        """Give back what the device holds of the host. It is not used any more."""

    def named_memory(self, what: str) -> AbstractContextManager[object]:
        """Within the block, errors of too little memory on the device say `what` needs it."""
        return NOTHING


HOST = Host()

"""Constants: arrays of a layer that training does not change."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ARRAY = "array"  # the entry of a constant that is an array of the checkpoint
CHUNK = 1 << 18  # bytes that are compared at once


class Constant(NamedTuple):
    """A layer's array that training does not change; it has a name, as a parameter has.

    Attributes:
        array: a view of the layer's own memory: to write to it changes the layer.
        saved: whether checkpoints hold the array; else they hold its checksum.
    """

    array: NDArray[Any]
    saved: bool

    @property
    def checksum(self) -> str:
        """CRC-32 of the values."""
        return f"{zlib.crc32(_bytes(self.array).data):08x}"

    @property
    def entry(self) -> str:
        """The text for it in a checkpoint's metadata: ARRAY, or its checksum."""
        return ARRAY if self.saved else self.checksum

    def equals(self, other: NDArray[Any]) -> bool:
        """Whether an array of the same shape and dtype has the same bits."""
        one, two = _bytes(self.array), _bytes(other)
        return all(np.array_equal(one[a : a + CHUNK], two[a : a + CHUNK]) for a in range(0, one.size, CHUNK))


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)

"""Digests of arrays: trees of SHA-256, whose blocks are hashed by the ranks that hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.vectors import BLOCK

Kind = tuple[str, tuple[int, ...]]  # an array's dtype and shape
SIZE = 32  # bytes of a SHA-256


def little(array: NDArray[Any]) -> NDArray[Any]:
    """The array, contiguous and little-endian."""
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")


def content(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def blocks_in(elements: int) -> int:
    """How many blocks so many elements have, from the beginning of a block on."""
    return -(-elements // BLOCK)


def of_blocks(elements: NDArray[Any]) -> bytes:
    """The SHA-256 of each block of an array's elements, one after another: those of a 1-D array that begins with a
    block, contiguous and little-endian."""
    step = BLOCK * elements.dtype.itemsize
    whole = content(elements)
    return b"".join(hashlib.sha256(whole[a : a + step]).digest() for a in range(0, len(whole), step))


def of_array(name: str, kind: Kind, blocks: bytes) -> bytes:
    """The digest of an array: SHA-256 of its name, shape and dtype and the digests of its blocks."""
    dtype, shape = kind
    return hashlib.sha256(f"{name} {list(shape)} {dtype}\n".encode() + blocks).digest()


def of_arrays(digests: Mapping[str, bytes]) -> str:
    """SHA-256 of the digests of arrays in the order of their names, in hexadecimal."""
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()

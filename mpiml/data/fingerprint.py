"""What tells one data set from another at a glance: sizes, and a hash of samples of every file, or of every array."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.errors import DataError

BLOCK = 1 << 14  # bytes of a sample
BLOCKS = 16  # samples of a file, evenly spaced from its first byte to its last

ARRAY = 1 << 22  # bytes of an array in memory that are sampled at most

Fingerprint = list[list[str]]  # [what, its properties]: the same on all ranks, and in a run and the one that it goes on


def of_files(files: Sequence[Path]) -> Fingerprint:
    """Of each file its name below what they all have in common, its size, and a hash of its samples."""
    root = os.path.commonpath([path.parent for path in files]) if files else ""
    return [[os.path.relpath(path, root), _of_file(path)] for path in files]


def _of_file(path: Path) -> str:
    try:
        size = path.stat().st_size
        sampled = hashlib.blake2b(digest_size=16)
        with open(path, "rb", buffering=0) as file:
            for block in range(BLOCKS if size > BLOCK else 1):
                file.seek(max(size - BLOCK, 0) * block // (BLOCKS - 1))
                sampled.update(file.read(BLOCK))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    return f"{size:,} bytes, samples {sampled.hexdigest()}"


def of_array(array: NDArray[Any]) -> str:
    """A hash of samples of an array in memory: runs of rows, evenly spaced from the first to the last."""
    row_bytes = max(array[:1].nbytes, 1)
    rows = max(BLOCK // row_bytes, 1)
    samples = max(min(-(-len(array) // rows), ARRAY // (rows * row_bytes)), 2)
    sampled = hashlib.blake2b(digest_size=16)
    for sample in range(samples):
        first = max(len(array) - rows, 0) * sample // (samples - 1)
        sampled.update(np.ascontiguousarray(array[first : first + rows]).data)
    return f"samples {sampled.hexdigest()}"


def difference(mine: Fingerprint, theirs: Fingerprint, whose: str) -> str | None:
    """The first difference in words, `whose` saying where the other data are; None if they are the same."""
    for (name, its), (other_name, others) in zip(mine, theirs, strict=False):
        if name != other_name:
            return f"{name} here, but {other_name} {whose}"
        if its != others:
            return f"{name} has {its} here, but {others} {whose}"
    return f"{len(mine)} files and columns here, but {len(theirs)} {whose}" if len(mine) != len(theirs) else None

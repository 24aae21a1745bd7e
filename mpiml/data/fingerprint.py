"""Fingerprints of data sets, quick to compute: sizes, and a hash of samples of every file, or of every array."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.data.inputs import Packed
from mpiml.data.items import ItemSource
from mpiml.data.sources import ArraySource, Source
from mpiml.errors import DataError

SAMPLE = 1 << 14  # bytes of a sample
SAMPLES = 16  # samples of a file, evenly spaced from its first byte to its last
ARRAY = 1 << 22  # bytes of an array in memory that are sampled at most
SIZED = " bytes, samples"  # in the properties of files alone

Fingerprint = list[list[str]]  # of each file or column [name, properties]; equal on all ranks and after a resumption
Identity = tuple[int, ...]  # of a file on a node: device, inode, size, time of its last change
Properties = Mapping[Identity, str]  # of files


def of_files(files: Sequence[Path], known: Properties = MappingProxyType({})) -> Fingerprint:
    """For each file its path below their common directory, its size, and a hash of its samples, which are read unless
    the file's properties are `known` from other ranks of the node."""
    root = os.path.commonpath([path.parent for path in files]) if files else ""
    return [[os.path.relpath(path, root), _of_file(path, known)[1]] for path in files]


def properties(files: Sequence[Path]) -> Properties:
    """The properties of files, for `of_files` on other ranks of the node."""
    return dict(_of_file(path) for path in files)


def _of_file(path: Path, known: Properties = MappingProxyType({})) -> tuple[Identity, str]:
    try:
        status = path.stat()
        identity, size = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns), status.st_size
        if identity in known:
            return identity, known[identity]
        sampled = hashlib.blake2b(digest_size=16)
        with open(path, "rb", buffering=0) as file:
            for sample in range(SAMPLES if size > SAMPLE else 1):
                file.seek(max(size - SAMPLE, 0) * sample // (SAMPLES - 1))
                sampled.update(file.read(SAMPLE))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    return identity, f"{size:,}{SIZED} {sampled.hexdigest()}"


def of_array(array: NDArray[Any]) -> str:
    """A hash of samples of an array in memory: runs of rows, evenly spaced from the first to the last."""
    row_bytes = max(array[:1].nbytes, 1)
    rows = max(SAMPLE // row_bytes, 1)
    samples = max(min(-(-len(array) // rows), ARRAY // (rows * row_bytes)), 2)
    sampled = hashlib.blake2b(digest_size=16)
    for sample in range(samples):
        first = max(len(array) - rows, 0) * sample // (samples - 1)
        sampled.update(np.ascontiguousarray(array[first : first + rows]).data)
    return f"samples {sampled.hexdigest()}"


def of_values(source: Source) -> str:
    """Of a source in memory, or of items, a hash of samples, as the end of a text; empty for others."""
    if isinstance(source, Packed):
        return "".join(map(of_values, source.parts))
    if isinstance(source, ItemSource):
        return f", {of_array(source.samples())}"
    return f", {of_array(source.array)}" if isinstance(source, ArraySource) else ""


def difference(here: Fingerprint, other: Fingerprint, where: str, this: str = "here") -> str | None:
    """The first difference in words, in which `this` and `where` say where the data are; None if there is none. The
    name of a file does not count if there is only one."""
    alone = [sum(SIZED in properties for _, properties in data) == 1 for data in (here, other)]
    for (name, properties), (other_name, other_properties) in zip(here, other, strict=False):
        if name != other_name and not (all(alone) and SIZED in properties and SIZED in other_properties):
            return f"{name} {this}, but {other_name} {where}"
        if properties != other_properties:
            return f"{name} has {properties} {this}, but {other_properties} {where}"
    return f"{len(here)} files and columns {this}, but {len(other)} {where}" if len(here) != len(other) else None

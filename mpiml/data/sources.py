"""Sources of rows: what they have in common, and those in memory, mapped into it or streamed."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpiml.errors import DataError

Rows = NDArray[np.generic]
Indices = NDArray[np.integer]
CHUNK = 1 << 22  # bytes of a stream that are read at once


class Source(Protocol):
    """A column of a data set: what `len` gives many rows, each of `shape` and `dtype`.

    `rows(indices)` returns a fresh array of those rows; `hold(rows)` says beforehand, with their numbers in rising
    order, that no others will be asked for, so that a source that cannot be read at random keeps just these.
    Reading ahead calls `rows` in a thread of its own, at the same time as others read other sources.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int: ...

    def hold(self, rows: Indices) -> None: ...

    def rows(self, indices: Indices) -> Rows: ...


class ArraySource:
    """An array in memory, or mapped into it."""

    def __init__(self, array: ArrayLike, name: str = "array"):
        self.array = np.asanyarray(array)
        self.name = name
        check_rows(self.array.shape, self.array.dtype, name)
        self.shape, self.dtype = self.array.shape[1:], self.array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def hold(self, rows: Indices) -> None:
        pass

    def rows(self, indices: Indices) -> Rows:
        check_whole(self.array, self.name)
        return rows_of(np.asarray(self.array), indices)  # no memmap, of which all that is computed would be one


class LabelSource:
    """A source of labels with -1 in place of those that are `ignore`: what losses and metrics leave out."""

    def __init__(self, source: Source, ignore: int):
        self.source, self.ignore = source, ignore
        self.name, self.shape, self.dtype = source.name, source.shape, np.dtype(np.intp)

    def __len__(self) -> int:
        return len(self.source)

    def hold(self, rows: Indices) -> None:
        self.source.hold(rows)

    def rows(self, indices: Indices) -> Rows:
        labels: Rows = self.source.rows(indices).astype(np.intp)
        labels[labels == self.ignore] = -1
        return labels


class HeldSource(ABC):
    """A source that can only be read from its start: it is read once, and of it the held rows stay in memory.

    Subclasses say how in `read(rows)`, which returns those rows.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype):
        check_rows(shape, dtype, name)
        self.name, self.length, self.shape, self.dtype = name, shape[0], shape[1:], dtype
        self._rows, self._held = np.empty(0, np.int64), np.empty((0, *self.shape), dtype)

    def __len__(self) -> int:
        return self.length

    @abstractmethod
    def read(self, rows: Indices) -> Rows:
        """Those rows, whose numbers increase."""

    def hold(self, rows: Indices) -> None:
        self._held = self.read(rows)
        self._rows = np.array(rows)

    def rows(self, indices: Indices) -> Rows:
        places = np.searchsorted(self._rows, indices)
        missing = places == len(self._rows)
        missing |= self._rows[np.where(missing, 0, places)] != indices if len(self._rows) else True
        if missing.any():
            raise IndexError(f"{self.name}: row {indices[missing][0]} is not one of the rows that are held")
        return rows_of(self._held, places)


class StreamedSource(HeldSource):
    """Rows of fixed size, one after the other in a stream of bytes that `open_stream` opens at the first of them."""

    @abstractmethod
    def open_stream(self) -> IO[bytes]:
        """The bytes of all rows, from the first on."""

    def read(self, rows: Indices) -> Rows:
        row_bytes, at = math.prod(self.shape) * self.dtype.itemsize, 0
        held = np.empty((len(rows), *self.shape), self.dtype)
        with self.open_stream() as stream:
            for first, last in runs(rows):
                _skip(stream, (int(rows[first]) - at) * row_bytes, self.name)
                _fill(stream, held[first:last].reshape(-1).view(np.uint8), self.name)
                at = int(rows[last - 1]) + 1
            if at == self.length and _read(stream, 1, self.name, at_end=True):  # also checks the whole stream's sum
                raise DataError(f"{self.name}: goes on after its last row")
        return held


def rows_of(array: Rows, indices: Indices) -> Rows:
    """Some rows of an array, fresh and in C order. They cost what these rows cost, however the array lies in memory."""
    if array.flags.c_contiguous and array.flags.aligned:
        return array.take(indices, axis=0)
    return np.ascontiguousarray(array[indices])  # take would copy all of it first: of one mapped from a .npz file, say


def mapped(
    path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, offset: int, holds: int, order: str = "C"
) -> ArraySource:
    """An array in a file by memory map: only rows that are asked for are read.

    Args:
        offset: where in the file it begins, in bytes.
        holds: how many bytes of it the file holds.
    """
    declared = check_size(shape, dtype, name, holds)
    array = np.memmap(path, dtype, "r", offset, shape, order) if declared else np.empty(shape, dtype)  # type: ignore[call-overload]
    return ArraySource(array, name)


def check_whole(array: Rows, name: str) -> None:
    """Raise DataError if an array is mapped from a file that has been cut short since: to read what is gone would end
    the process without a word (SIGBUS)."""
    mapping = array._mmap if isinstance(array, np.memmap) else None  # type: ignore[attr-defined]
    if mapping is not None and mapping.size() < (needed := array.offset + array.nbytes):  # type: ignore[attr-defined]
        raise DataError(f"{name} was cut short while it was read: it holds {mapping.size():,} of {needed:,} bytes")


def check_rows(shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
    """Raise DataError unless these are rows of real numbers."""
    if dtype.kind not in "biuf":
        raise DataError(f"{name} has dtype {dtype}; real numbers are needed (pickled objects are never read)")
    if not shape:
        raise DataError(f"{name} is a single number; a data set needs rows")


def check_size(shape: tuple[int, ...], dtype: np.dtype, name: str, holds: int) -> int:
    """The bytes of an array. Raises DataError if they are not as many as the file holds: headers may lie."""
    check_rows(shape, dtype, name)
    declared = math.prod(shape) * dtype.itemsize
    if declared != holds or min(shape) < 0:
        raise DataError(f"{name}: its header declares {declared:,} bytes, but the file holds {holds:,}")
    return declared


def file_size(path: Path) -> int:
    """The bytes of a file. Raises DataError if it is no regular file (a pipe would never end) or cannot be read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            what = "Is a directory" if stat.S_ISDIR(status.st_mode) else "is no regular file"
            raise DataError(f"cannot read {path}: {what}")
        with open(path, "rb"):
            return status.st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def runs(rows: Indices) -> Iterator[tuple[int, int]]:
    """Where in `rows` runs of consecutive numbers begin and end, as (first, last + 1)."""
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return itertools.pairwise(edges) if len(rows) else iter(())


def extra(module: str, name: str, why: str) -> ModuleType:
    """Import what an extra of this package brings. Raises DataError, naming the extra, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f'{why} needs {package}: pip install "mpiml[{name}]" ({error})') from None


def read_all(stream: IO[bytes], name: str) -> None:
    """Read to the end, where a stream checks its sum. Raises DataError if it is damaged."""
    while _read(stream, CHUNK, name, at_end=True):
        pass


def _skip(stream: IO[bytes], count: int, name: str) -> None:
    while count:
        count -= len(_read(stream, min(count, CHUNK), name))


def _fill(stream: IO[bytes], target: NDArray[np.uint8], name: str) -> None:
    done = 0
    while done < len(target):
        chunk = _read(stream, min(len(target) - done, CHUNK), name)
        target[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
        done += len(chunk)


def _read(stream: IO[bytes], count: int, name: str, at_end: bool = False) -> bytes:
    try:
        chunk = stream.read(count)
    except EOFError as error:
        raise DataError(f"{name} is cut short: {error}") from None
    except Exception as error:  # zlib, bz2, lzma, zipfile and gzip each raise classes of their own
        raise DataError(f"{name}: damaged: {error}") from None
    if not chunk and not at_end:
        raise DataError(f"{name}: ends too early")
    return chunk

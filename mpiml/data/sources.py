"""Sources of rows: their interface, and sources in memory, mapped into memory, or streamed."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import stat
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Protocol

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from mpiml.errors import DataError

Rows = NDArray[np.generic]
Indices = NDArray[np.integer]
CHUNK = 1 << 22  # bytes of a stream that are read at once


class Source(Protocol):
    """A column of a data set: `len(source)` rows, each of `shape` and `dtype`.

    `rows(indices)` returns these rows in a new array. `hold(rows)` is called before, with the numbers, in rising order,
    of all rows that will be read, so that a source without random access can keep these in memory. `rows` may be
    called from another thread, while the rank's own thread reads other sources.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int: ...

    def hold(self, rows: Indices) -> None:
        return

    def rows(self, indices: Indices) -> Rows: ...


class ArraySource(Source):
    """An array in memory, or mapped into it."""

    def __init__(self, array: ArrayLike, name: str = "array"):
        self.array = np.asanyarray(array)
        self.name = name
        check_rows(self.array.shape, self.array.dtype, name)
        self.shape, self.dtype = self.array.shape[1:], self.array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def rows(self, indices: Indices) -> Rows:
        check_whole(self.array, self.name)
        return rows_of(np.asarray(self.array), indices)  # not a memmap: all results of it would be of that class


class Zeros(Source):
    """A column of zeros: the labels of rows that have none."""

    def __init__(self, length: int, name: str, shape: tuple[int, ...] = (), dtype: DTypeLike = np.int64):
        self.length, self.name, self.shape, self.dtype = length, name, shape, np.dtype(dtype)

    def __len__(self) -> int:
        return self.length

    def rows(self, indices: Indices) -> Rows:
        return np.zeros((len(indices), *self.shape), self.dtype)


class WrappedSource(Source):
    """The base of sources that change the rows of another source, and their dtype."""

    def __init__(self, source: Source, dtype: DTypeLike):
        self.source, self.name, self.shape, self.dtype = source, source.name, source.shape, np.dtype(dtype)

    def __len__(self) -> int:
        return len(self.source)

    def hold(self, rows: Indices) -> None:
        self.source.hold(rows)


class LabelSource(WrappedSource):
    """A source of labels with -1, which losses and metrics leave out, in place of the label `ignore`."""

    def __init__(self, source: Source, ignore: int):
        super().__init__(source, np.intp)
        self.ignore = ignore

    def rows(self, indices: Indices) -> Rows:
        labels: Rows = self.source.rows(indices).astype(np.intp)
        labels[labels == self.ignore] = -1
        return labels


class HeldSource(Source):
    """A source that can only be read from start to end: `hold` reads it once and keeps the held rows in memory."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype):
        check_rows(shape, dtype, name)
        self.name, self.length, self.shape, self.dtype = name, shape[0], shape[1:], dtype
        self._rows, self._held = np.empty(0, np.int64), np.empty((0, *self.shape), dtype)

    def __len__(self) -> int:
        return self.length

    @abstractmethod
    def read(self, rows: Indices) -> Rows:
        """These rows; their numbers are in rising order."""

    def hold(self, rows: Indices) -> None:
        self._held = self.read(rows)
        self._rows = np.array(rows)

    def rows(self, indices: Indices) -> Rows:
        positions = np.searchsorted(self._rows, indices)
        missing = positions == len(self._rows)
        missing |= self._rows[np.where(missing, 0, positions)] != indices if len(self._rows) else True
        if missing.any():
            raise IndexError(f"{self.name}: row {indices[missing][0]} is not one of the rows that are held")
        return rows_of(self._held, positions)


class StreamedSource(HeldSource):
    """Rows of fixed size, one after the other in a stream of bytes."""

    @abstractmethod
    def open_stream(self) -> IO[bytes]:
        """A stream that begins at the first byte of row 0."""

    def read(self, rows: Indices) -> Rows:
        row_bytes, at = math.prod(self.shape) * self.dtype.itemsize, 0
        held = np.empty((len(rows), *self.shape), self.dtype)
        with self.open_stream() as stream:
            for first, last in runs(rows):
                _skip(stream, (int(rows[first]) - at) * row_bytes, self.name)
                _fill(stream, held[first:last].reshape(-1).view(np.uint8), self.name)
                at = int(rows[last - 1]) + 1
            if at == self.length and _read(stream, 1, self.name, at_end=True):  # at its end a stream verifies its sum
                raise DataError(f"{self.name}: goes on after its last row")
        return held


def rows_of(array: Rows, indices: Indices) -> Rows:
    """These rows of an array in a new array, in C order. The cost depends on these rows only."""
    if array.flags.c_contiguous and array.flags.aligned:
        return array.take(indices, axis=0)
    # `take` would first copy the whole array if it is not aligned, as arrays mapped from a .npz file often are not.
    return np.ascontiguousarray(array[indices])


def mapped(
    path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, offset: int, holds: int, order: str = "C"
) -> ArraySource:
    """An array in a file, by memory map: only the rows that are used are read.

    Args:
        offset: the byte of the file at which the array begins.
        holds: the number of its bytes that the file really holds.
    """
    declared = check_size(shape, dtype, name, holds)
    array = np.memmap(path, dtype, "r", offset, shape, order) if declared else np.empty(shape, dtype)  # type: ignore[call-overload]
    return ArraySource(array, name)


def check_whole(array: Rows, name: str) -> None:
    """Raise DataError if an array is mapped from a file that has become shorter since. Reading beyond its end would
    kill the process without a message (SIGBUS)."""
    mapping = array._mmap if isinstance(array, np.memmap) else None  # type: ignore[attr-defined]
    if mapping is not None and mapping.size() < (needed := array.offset + array.nbytes):  # type: ignore[attr-defined]
        raise DataError(f"{name} was cut short while it was read: it holds {mapping.size():,} of {needed:,} bytes")


def check_rows(shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
    """Raise DataError unless an array of this shape and dtype holds rows of real numbers."""
    if dtype.kind not in "biuf":
        wrong = f"{name} has dtype {dtype}; real numbers are needed"
        if dtype.kind in "SUOT":
            wrong += "; if labels are words, store np.unique(labels, return_inverse=True)[1]"
        raise DataError(f"{wrong}{' (pickled objects are never read)' if dtype.kind == 'O' else ''}")
    if not shape:
        raise DataError(f"{name} is a single number; a data set needs rows")


def check_size(shape: tuple[int, ...], dtype: np.dtype, name: str, holds: int) -> int:
    """The number of bytes of an array. Raises DataError if the file holds more or fewer: headers may be wrong."""
    check_rows(shape, dtype, name)
    declared = math.prod(shape) * dtype.itemsize
    if declared != holds or min(shape) < 0:
        raise DataError(f"{name}: its header declares {declared:,} bytes, but the file holds {holds:,}")
    return declared


def file_size(path: Path) -> int:
    """The number of bytes of a file. Raises DataError if it cannot be read or is not a regular file (reading a pipe
    could take for ever)."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            what = "Is a directory" if stat.S_ISDIR(status.st_mode) else "is not a regular file"
            raise DataError(f"cannot read {path}: {what}")
        with open(path, "rb"):
            return status.st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def runs(rows: Indices) -> Iterator[tuple[int, int]]:
    """The runs of consecutive numbers in `rows`: (first, stop) positions in `rows` of each."""
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return itertools.pairwise(edges) if len(rows) else iter(())


def extra(module: str, name: str, why: str) -> ModuleType:
    """Import a module that the extra `name` of this package installs. Raises DataError if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f'{why} needs {package}: pip install "mpiml[{name}]" ({error})') from None


def read_all(stream: IO[bytes], name: str) -> None:
    """Read a stream to its end, where it verifies its checksum. Raises DataError if it is damaged."""
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

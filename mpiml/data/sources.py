"""Sources of rows: arrays in memory and the members of .npz files, read no further than asked."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpiml.errors import DataError

Rows = NDArray[np.generic]
CHUNK = 1 << 22  # bytes that are read at once from a compressed member


class Source(Protocol):
    """A column of a data set: what `len` gives many rows, each of `shape` and `dtype`.

    `rows(indices)` returns a fresh array of those rows; `hold(start, stop)` says beforehand that no others will
    be asked for, so that a source that cannot be read at random keeps just these.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int: ...

    def hold(self, start: int, stop: int) -> None: ...

    def rows(self, indices: NDArray[np.integer]) -> Rows: ...


def check_dtype(dtype: np.dtype, name: str) -> None:
    """Raise DataError unless `dtype` is of real numbers."""
    if dtype.kind not in "biuf":
        raise DataError(f"{name} has dtype {dtype}; real numbers are needed (pickled objects are never read)")


class ArraySource:
    """An array in memory, or mapped into it."""

    def __init__(self, array: ArrayLike, name: str = "array"):
        self.array = np.asarray(array)
        self.name = name
        if self.array.ndim == 0:
            raise DataError(f"{name} is a single number; a data set needs rows")
        check_dtype(self.array.dtype, name)
        self.shape, self.dtype = self.array.shape[1:], self.array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def hold(self, start: int, stop: int) -> None:
        pass

    def rows(self, indices: NDArray[np.integer]) -> Rows:
        return np.take(self.array, indices, axis=0)


class CompressedSource:
    """A compressed member of a zip file: streamed once, of which the held rows stay in memory."""

    def __init__(self, path: Path, member: str, name: str, shape: tuple[int, ...], dtype: np.dtype):
        self.path, self.member, self.name = path, member, name
        self.length, self.shape, self.dtype = shape[0], shape[1:], dtype
        self._start, self._held = 0, np.empty((0, *self.shape), dtype)

    def __len__(self) -> int:
        return self.length

    def hold(self, start: int, stop: int) -> None:
        row_bytes = math.prod(self.shape) * self.dtype.itemsize
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
            _read_header(stream, self.name)
            _skip(stream, start * row_bytes, self.name)
            held = np.empty((stop - start, *self.shape), self.dtype)
            _fill(stream, held.reshape(-1).view(np.uint8), self.name)
        self._start, self._held = start, held

    def rows(self, indices: NDArray[np.integer]) -> Rows:
        places = indices - self._start
        if places.size and places.min() < 0:
            raise IndexError(f"{self.name}: row {indices.min()} is before the rows that are held")
        return np.take(self._held, places, axis=0)


def npz_member(path: Path, key: str) -> Source:
    """The array `key` of a .npz file as a source; of its contents only the header is read.

    Raises DataError for a file or a member that is missing, damaged, pickled or not an array.
    """
    name, member = f"{path}: {key}", f"{key}.npy"
    try:
        with zipfile.ZipFile(path) as archive:
            if member not in archive.namelist():
                there = ", ".join(sorted(n.removesuffix(".npy") for n in archive.namelist())) or "nothing"
                raise DataError(f"{path} has no array {key}; it holds {there}")
            info = archive.getinfo(member)
            with archive.open(member) as stream:
                shape, fortran, dtype = _read_header(stream, name)
                header = stream.tell()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is no .npz file: {error}") from None
    except (RuntimeError, NotImplementedError, zlib.error) as error:  # encrypted, unknown method, damaged
        raise DataError(f"{name}: damaged: {error}") from None
    if not shape:
        raise DataError(f"{name} is a single number; a data set needs rows")
    size = math.prod(shape) * dtype.itemsize
    if info.file_size != header + size:
        raise DataError(f"{name}: its header declares {size:,} bytes, but the file holds {info.file_size - header:,}")
    if info.compress_type == zipfile.ZIP_STORED:
        offset = _stored_offset(path, info) + header
        mapped = np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C") if size else np.empty(shape, dtype)
        return ArraySource(mapped, name)
    if fortran:
        raise DataError(f"{name} is compressed in column order, which cannot be streamed by rows: save it in C order")
    return CompressedSource(path, member, name, shape, dtype)


def _read_header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:
        raise DataError(f"{name} is no array in .npy format: {error}") from None
    check_dtype(dtype, name)
    return shape, fortran, dtype


def _stored_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its local header, whose name and extra field have own lengths."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        lengths: tuple[int, int] = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + sum(lengths)


def _skip(stream: IO[bytes], count: int, name: str) -> None:
    while count:
        chunk = len(_read(stream, min(count, CHUNK), name))
        count -= chunk


def _fill(stream: IO[bytes], target: NDArray[np.uint8], name: str) -> None:
    done = 0
    while done < len(target):
        chunk = _read(stream, min(len(target) - done, CHUNK), name)
        target[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
        done += len(chunk)


def _read(stream: IO[bytes], count: int, name: str) -> bytes:
    try:
        chunk = stream.read(count)
    except (OSError, zipfile.BadZipFile, EOFError, ValueError) as error:
        raise DataError(f"{name}: damaged: {error}") from None
    except Exception as error:  # zlib, bz2 and lzma each raise an error class of their own
        raise DataError(f"{name}: damaged: {error}") from None
    if not chunk:
        raise DataError(f"{name}: ends too early")
    return chunk

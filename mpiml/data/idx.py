"""IDX files, plain or gzipped: MNIST's format and file names (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

import numpy as np

from mpiml.data.sources import Source, StreamedSource, check_size, file_size, mapped, read_all
from mpiml.errors import DataError

DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def find(directory: Path, key: str) -> Path | None:
    """MNIST's file for a column, gzipped as distributed or unpacked. Some copies have ".idx" for "-idx" in the name."""
    name = NAMES[key]
    for candidate in (name, f"{name}.gz", dotted := name.replace("-idx", ".idx"), f"{dotted}.gz"):
        if (directory / candidate).exists():
            return directory / candidate
    return None


def idx_file(path: Path) -> Source:
    """The array of an IDX file: by memory map, or if it is gzipped, streamed."""
    size = file_size(path)
    if path.suffix != ".gz":
        with open(path, "rb") as stream:
            shape, dtype = _read_header(stream, str(path))
            offset = stream.tell()
        return mapped(path, str(path), shape, dtype, offset, size - offset)
    with _open_gzip(path) as stream:
        shape, dtype = _read_header(stream, str(path))
        offset = stream.tell()
    # A gzip file ends with its unpacked size modulo 2^32, so the size can be compared without unpacking. If it differs
    # from the header's, the file is unpacked to find out whether it was cut short, which is reported first.
    with open(path, "rb") as file:
        file.seek(-4, 2)
        (unpacked,) = struct.unpack("<I", file.read(4))
    declared = int(np.prod(shape, dtype=object)) * dtype.itemsize
    wrong = (unpacked - offset - declared) % (1 << 32)
    if wrong:
        with _open_gzip(path) as stream:
            read_all(stream, str(path))
        check_size(shape, dtype, str(path), unpacked - offset)
    return GzipSource(path, shape, dtype)


class GzipSource(StreamedSource):
    """The array of a gzipped IDX file."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype):
        super().__init__(str(path), shape, dtype)
        self.path = path

    def open_stream(self) -> IO[bytes]:
        stream = _open_gzip(self.path)
        _read_header(stream, self.name)
        return stream


def _open_gzip(path: Path) -> IO[bytes]:
    import gzip

    return gzip.open(path, "rb")  # type: ignore[return-value]


def _read_header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype]:
    """The magic number (two zeros, the dtype, the number of axes), then the length of each axis, big-endian."""
    try:
        magic = stream.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in DTYPES or not magic[3]:
            raise DataError(f"{name} is not an IDX file: it begins with {magic.hex(' ') or 'nothing'}")
        axes = stream.read(4 * magic[3])
    except DataError:
        raise
    except Exception as error:  # from gzip or zlib, which raise classes of their own
        raise DataError(f"{name}: damaged: {error}") from None
    if len(axes) < 4 * magic[3]:
        raise DataError(f"{name}: ends within its header, at byte {4 + len(axes)}")
    return struct.unpack(f">{magic[3]}I", axes), np.dtype(DTYPES[magic[2]])

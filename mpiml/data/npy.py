"""NumPy's own files: .npy files and members of .npz archives. Opening one reads only its header."""

from __future__ import annotations

import struct
import tokenize
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from mpiml.data.sources import Source, StreamedSource, check_size, file_size, mapped, read_all
from mpiml.errors import DataError

if TYPE_CHECKING:
    import zipfile

Header = tuple[tuple[int, ...], bool, np.dtype]  # shape, whether in column (Fortran) order, dtype
CHECKED = 1 << 30  # bytes of the largest member whose checksum is verified: one rank reads that in about a second
LONGEST_HEADER = 10_000  # bytes; NumPy refuses longer ones too, but only after reading them


def npy_file(path: Path) -> Source:
    """The array of a .npy file, by memory map. Raises DataError for a file that is missing, damaged or pickled."""
    size = file_size(path)
    with open(path, "rb") as stream:
        shape, columns, dtype = _read_header(stream, str(path))
        offset = stream.tell()
    return mapped(path, str(path), shape, dtype, offset, size - offset, "F" if columns else "C")


class CompressedSource(StreamedSource):
    """A compressed member of a .npz file."""

    def __init__(self, path: Path, member: str, name: str, shape: tuple[int, ...], dtype: np.dtype):
        super().__init__(name, shape, dtype)
        self.path, self.member = path, member

    def open_stream(self) -> IO[bytes]:
        import zipfile

        with zipfile.ZipFile(self.path) as archive:  # the file stays open until the member is closed too
            stream = archive.open(self.member)
            _read_header(stream, self.name)
            return stream


def npz_names(path: Path) -> list[str]:
    """The names of the arrays in a .npz file. Raises DataError if it is missing or damaged."""
    import zipfile

    file_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not an .npz file: {error}") from None


def npz_member(path: Path, key: str) -> Source:
    """The array `key` of a .npz file: by memory map if it is stored, else streamed.

    Raises DataError for a file or a member that is missing, damaged, pickled or not an array.
    """
    import zipfile

    name, member = f"{path}: {key}", f"{key}.npy"
    file_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if member not in archive.namelist():
                names = ", ".join(sorted(n.removesuffix(".npy") for n in archive.namelist())) or "nothing"
                raise DataError(f"{path} has no array {key}; it holds {names}")
            info = archive.getinfo(member)
            with archive.open(member) as stream:
                shape, columns, dtype = _read_header(stream, name)
                header = stream.tell()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not an .npz file: {error}") from None
    except zlib.error as error:
        raise DataError(f"{name}: damaged: {error}") from None
    except RuntimeError as error:  # encrypted, or compressed in a way that Python does not know
        how = "save it with numpy.savez or numpy.savez_compressed"
        raise DataError(f"{name} cannot be read: {error}; {how}") from None
    if info.compress_type == zipfile.ZIP_STORED:
        offset = _stored_offset(path, info) + header
        return mapped(path, name, shape, dtype, offset, info.file_size - header, "F" if columns else "C")
    check_size(shape, dtype, name, info.file_size - header)
    if columns:
        raise DataError(f"{name} is compressed in column order, which cannot be streamed by rows: save it in C order")
    return CompressedSource(path, member, name, shape, dtype)


def check_sums(path: Path, keys: Sequence[str]) -> None:
    """Verify the checksums of a .npz file's uncompressed members, except those above CHECKED bytes; mapping them into
    memory does not. Raises DataError if one is damaged."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        for key in keys:
            info = archive.getinfo(f"{key}.npy")
            if info.compress_type == zipfile.ZIP_STORED and info.file_size <= CHECKED:
                with archive.open(info) as stream:
                    read_all(stream, f"{path}: {key}")


def _read_header(stream: IO[bytes], name: str) -> Header:
    try:
        version = np.lib.format.read_magic(stream)
        if version > (1, 0):
            (length,) = struct.unpack("<I", stream.read(4).ljust(4, b"\0"))
            if length > LONGEST_HEADER:
                raise ValueError(f"its header claims {length:,} bytes")
            stream.seek(-4, 1)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(stream)
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name} is not an array in .npy format: {reason}") from None


def _stored_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """The offset of a stored member's bytes: after its local header, whose two last fields vary in length."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        lengths: tuple[int, int] = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + sum(lengths)

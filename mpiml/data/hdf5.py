"""HDF5 files with one data set per column, mapped into memory or read in runs of rows. Every rank opens the file on its
own and reads only its rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mpiml.data.sources import Indices, Rows, Source, check_rows, extra, file_size, mapped, runs
from mpiml.errors import DataError

CACHE = 1 << 24  # bytes of a data set's chunks that HDF5 keeps unpacked: the rows of one are mostly read step by step
MOST_NAMES = 1000  # that a file is searched for


def open_hdf5(path: Path) -> Any:
    """The open file. Raises DataError if it is damaged or not an HDF5 file."""
    h5py = extra("h5py", "hdf5", f"--data {path}")
    file_size(path)
    try:
        return h5py.File(
            path, "r", locking=False, rdcc_nbytes=CACHE
        )  # parallel file systems often lack locks, and nobody writes
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None


def hdf5_names(file: Any) -> list[str]:
    """The names of what an open file holds, "group/name" for data sets in groups; of many only the first."""
    names = [*file]

    def visit(name: str, member: Any) -> bool | None:
        if "/" in name and hasattr(member, "dtype"):
            names.append(name)
        return len(names) >= MOST_NAMES or None  # None: the visit goes on

    file.visititems(visit)
    return names


def hdf5_column(file: Any, path: Path, key: str) -> Source:
    """The data set `key` of an open file: by memory map if its values lie in one piece and in NumPy's own format, else
    read by HDF5. Raises DataError if it is missing, not an array of numbers, or was never written."""
    h5t = extra("h5py.h5t", "hdf5", f"--data {path}")
    source = HDF5Source(file, path, key)
    values = source.values
    offset = values.id.get_offset()  # None unless the values lie in one piece in the file itself
    if offset is None or not values.id.get_type().equal(h5t.py_create(values.dtype, logical=True)):
        return source
    actual = Path(values.file.filename)  # another file if the key is a link
    return mapped(actual, source.name, values.shape, values.dtype, offset, values.id.get_storage_size())


class HDF5Source(Source):
    """The data set `key` of an open file, read in runs of consecutive rows."""

    def __init__(self, file: Any, path: Path, key: str):
        self.name = f"{path}: {key}"
        try:
            self.values = file[key]
        except (KeyError, OSError):
            if key in [*file]:
                raise DataError(f"{self.name} is a link to what is not there") from None
            names = ", ".join(sorted(file)) or "nothing"
            raise DataError(f"{path} has no data set {key}; it holds {names}") from None
        if not hasattr(self.values, "dtype"):
            raise DataError(f"{self.name} is a group, not a data set")
        if self.values.shape is None:
            raise DataError(f"{self.name} is empty: it has no rows")
        check_rows(self.values.shape, self.values.dtype, self.name)
        self.shape, self.dtype = self.values.shape[1:], self.values.dtype
        self._check_written()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def chunk_rows(self) -> int:
        """How many rows are read, and unpacked, together, whichever of them is asked for; 1 where they are not, or
        where HDF5 keeps all that it has unpacked."""
        chunked = self.values.chunks and self.values.nbytes > CACHE
        return min(self.values.chunks[0], len(self)) if chunked else 1

    def rows(self, indices: Indices) -> Rows:
        order = np.argsort(indices, kind="stable")
        ordered = indices[order]
        rows = np.empty((len(indices), *self.shape), self.dtype)
        try:
            for first, last in runs(ordered):
                rows[order[first:last]] = self.values[ordered[first] : ordered[last - 1] + 1]
        except OSError as error:
            raise DataError(f"{self.name}: damaged at row {ordered[first]} or after it: {error}") from None
        return rows

    def _check_written(self) -> None:
        """Raise DataError if values were declared but never written: HDF5 would return zeros, so that a writer that
        died would go unnoticed."""
        values = self.values
        declared = math.prod(values.shape) * values.dtype.itemsize
        if values.chunks:
            needed = math.prod(-(-n // c) for n, c in zip(values.shape, values.chunks, strict=True))
            written = values.id.get_num_chunks()
            if written < needed:
                raise DataError(f"{self.name}: its header declares {needed:,} chunks, but the file holds {written:,}")
        elif not values.is_virtual and not values.external and values.id.get_storage_size() < declared:
            holds = values.id.get_storage_size()
            raise DataError(f"{self.name}: its header declares {declared:,} bytes, but the file holds {holds:,}")

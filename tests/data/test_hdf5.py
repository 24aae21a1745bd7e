"""HDF5: what a file holds in one piece is mapped, all else is read by HDF5; the rows are those that were saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.data.hdf5 import HDF5Source, hdf5_column, open_hdf5
from mpiml.data.sources import ArraySource

h5py = pytest.importorskip("h5py")

X = np.random.default_rng(0).random((30, 4, 3), dtype=np.float32)
WHOLE = np.arange(-15, 15, dtype=np.int32)


def stored(array: np.ndarray, **how: Any) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        with h5py.File(path, "w", userblock_size=how.pop("userblock_size", 0)) as file:
            file.create_dataset("x", data=array, **how)
        return array

    return write


def compact(path: Path) -> np.ndarray:
    """Within the header of the data set."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.COMPACT)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple(WHOLE.shape)
        made = h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_INT32, space, layout)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, WHOLE)
    return WHOLE


def of_20_bits(path: Path) -> np.ndarray:
    """Integers of which only some bits count: NumPy has no such type."""
    kind = h5py.h5t.STD_I32LE.copy()
    kind.set_precision(20)
    with h5py.File(path, "w") as file:
        made = h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple(WHOLE.shape))
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, WHOLE)
    return WHOLE


def external(path: Path) -> np.ndarray:
    """In a file of its own, that HDF5 is told of."""
    path.with_name("raw").write_bytes(b"before" + X.tobytes())
    with h5py.File(path, "w") as file:
        file.create_dataset("x", X.shape, X.dtype, external=[(str(path.with_name("raw")), 6, X.nbytes)])
    return X


def virtual(path: Path) -> np.ndarray:
    """Put together from others' rows."""
    stored(X)(path.with_name("part.h5"))
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout(X.shape, X.dtype)
        layout[:] = h5py.VirtualSource(str(path.with_name("part.h5")), "x", X.shape)
        file.create_virtual_dataset("x", layout)
    return X


def link(path: Path) -> np.ndarray:
    """In another file, at another place than a data set of that name in this one would be."""
    with h5py.File(path.with_name("there.h5"), "w") as file:
        file["before"] = WHOLE
        file["group/x"] = X
    with h5py.File(path, "w") as file:
        file["x"] = h5py.ExternalLink("there.h5", "group/x")
    return X


FILES: dict[str, tuple[Callable[[Path], np.ndarray], bool]] = {
    "one piece": (stored(X), True),
    "after a user block": (stored(X, userblock_size=512), True),
    "other byte order": (stored(X.astype(">f4")), True),
    "half precision": (stored(X.astype(np.float16)), True),
    "booleans": (stored(X > 0.5), True),
    "a link": (link, True),
    "no rows": (stored(X[:0]), False),
    "chunks": (stored(X, chunks=(7, 4, 3)), False),
    "compressed": (stored(X, compression="gzip"), False),
    "compact": (compact, False),
    "20 bits": (of_20_bits, False),
    "external": (external, False),
    "virtual": (virtual, False),
}


@pytest.mark.parametrize("kind", FILES)
def test_rows_are_those_that_were_saved(tmp_path: Path, kind: str) -> None:
    write, in_one_piece = FILES[kind]
    expected = write(tmp_path / "d.h5")
    source = hdf5_column(open_hdf5(tmp_path / "d.h5"), tmp_path / "d.h5", "x")
    assert isinstance(source, ArraySource if in_one_piece else HDF5Source)
    assert (len(source), source.shape, source.dtype) == (len(expected), expected.shape[1:], expected.dtype)
    some = np.random.default_rng(1).integers(0, max(len(expected), 1), 50 if len(expected) else 0)
    for indices in (some, np.arange(len(expected)), np.arange(0)):
        np.testing.assert_array_equal(source.rows(indices), expected[indices])
        assert source.rows(indices).dtype == expected.dtype
    rows = source.rows(some)
    rows[...] = 1  # fresh: neither the file nor what is mapped changes
    np.testing.assert_array_equal(source.rows(some), expected[some])

"""Rows of an array are those rows, and take their own memory alone, however the array lies in memory or in its file."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.data import sources
from mpiml.data.dataset import open_dataset
from mpiml.data.formats import Options
from mpiml.data.npy import npy_file, npz_member
from mpiml.data.sources import ArraySource, Indices, Source
from mpiml.errors import DataError
from tests.data.samples import OPTIONS, hdf5, parquet

ROWS = 4096
PLAIN = np.random.default_rng(0).random((ROWS, 16, 12), dtype=np.float32)  # 3 MB
LABELS = np.arange(ROWS * 100) % 10
SOME = np.random.default_rng(1).integers(0, ROWS, 64)


def misaligned(array: np.ndarray) -> np.ndarray:
    """The same values at an odd address."""
    unaligned = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    assert not unaligned.flags.aligned
    return unaligned


def mapped(array: np.ndarray, path: Path) -> np.ndarray:
    np.save(path / "a.npy", array)
    return npy_file(path / "a.npy").array  # type: ignore[union-attr]


def member(array: np.ndarray, path: Path) -> np.ndarray:
    np.savez(path / "a.npz", x=array)
    return npz_member(path / "a.npz", "x").array  # type: ignore[union-attr]


LAYOUTS: dict[str, Callable[[Path], np.ndarray]] = {
    "plain": lambda path: PLAIN,
    "misaligned": lambda path: misaligned(PLAIN),
    "columns": lambda path: np.asfortranarray(PLAIN),
    "other byte order": lambda path: PLAIN.astype(">f4"),
    "every second row": lambda path: np.repeat(PLAIN, 2, axis=0)[::2],
    "rows from the last": lambda path: PLAIN[::-1].copy()[::-1],
    "columns turned": lambda path: PLAIN.transpose(0, 2, 1).copy().transpose(0, 2, 1),
    "npy": lambda path: mapped(PLAIN, path),
    "npy, columns": lambda path: mapped(np.asfortranarray(PLAIN), path),
    "npz": lambda path: member(PLAIN, path),
    "npz, columns": lambda path: member(np.asfortranarray(PLAIN), path),
    "npz, other byte order": lambda path: member(PLAIN.astype(">f4"), path),
    "bytes": lambda path: (PLAIN * 255).astype(np.uint8),
    "labels": lambda path: LABELS,
    "npz, labels": lambda path: member(LABELS, path),
}


def peak(source: Source, indices: Indices) -> int:
    """The most bytes that taking rows needs at once."""
    tracemalloc.start()
    source.rows(indices)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_cost_what_the_rows_cost(tmp_path: Path, layout: str) -> None:
    array = LAYOUTS[layout](tmp_path)
    source = ArraySource(array)
    rows = source.rows(SOME)
    assert peak(source, SOME) < 3 * rows.nbytes + 20_000 < array.nbytes / 4
    np.testing.assert_array_equal(rows, np.array(array)[SOME])
    assert (rows.dtype, type(rows)) == (array.dtype, np.ndarray)
    assert rows.flags.c_contiguous
    assert rows.flags.aligned
    assert not np.shares_memory(rows, array)


@pytest.mark.parametrize("layout", ["plain", "columns", "npz"])
def test_no_rows_and_rows_that_are_not_there(tmp_path: Path, layout: str) -> None:
    source = ArraySource(LAYOUTS[layout](tmp_path))
    assert source.rows(SOME[:0]).shape == (0, 16, 12)
    with pytest.raises(IndexError):
        source.rows(np.array([ROWS]))


@pytest.mark.parametrize(("module", "write", "extra"), [("h5py", hdf5, "hdf5"), ("pyarrow", parquet, "parquet")])
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, write: Any, extra: str
) -> None:
    path = write(tmp_path)
    for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf'needs {module}: pip install "mpiml\[{extra}\]"'):
        open_dataset(str(path), OPTIONS)


def test_runs() -> None:
    for rows, expected in (([], []), ([4], [(0, 1)]), ([1, 2, 3, 7, 8, 8, 9], [(0, 3), (3, 5), (5, 7)])):
        assert list(sources.runs(np.array(rows, int))) == expected


def test_windows_of_a_text_are_taken_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpiml.data.text import Tokens

    tokens = np.random.default_rng(0).integers(0, 256, 90_000).astype(np.uint8)
    for number, piece in enumerate(np.split(tokens, [30_004, 30_004, 60_008])):  # the second is empty
        (tmp_path / f"{number}.txt").write_bytes(piece.tobytes())
    source = open_dataset(str(tmp_path), Options(context=10, held_out=0.1)).train.y
    one_by_one: list[int] = []
    read = Tokens.read
    monkeypatch.setattr(Tokens, "read", lambda self, a, b, out: one_by_one.append(a) or read(self, a, b, out))
    order = np.random.default_rng(1).permutation(len(source))
    np.testing.assert_array_equal(source.rows(order), tokens[1 : len(source) * 10 + 1].reshape(-1, 10)[order])
    assert sorted(one_by_one) == [30_001, 60_001]  # windows over the ends of files
    assert peak(source, order[:50]) < 30_000
    for outside in (-1, len(source)):
        with pytest.raises(IndexError, match=f"y_train has no row {outside}"):
            source.rows(np.array([0, outside]))

"""HDF5: what a file holds in one piece is mapped, all else is read by HDF5; the rows are those that were saved."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.data import hdf5
from mpiml.data.dataset import Split
from mpiml.data.hdf5 import HDF5Source, hdf5_column, open_hdf5
from mpiml.data.normalize import Normalization, NormalizedSource
from mpiml.data.shards import Shards, rereads
from mpiml.data.sources import ArraySource
from tests.data import samples
from tests.data.damage import cut, of_text, refusal, rewrite
from tests.data.samples import ARRAYS

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


def in_hdf5(change: Callable[..., None], *, chunks: bool = False) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import h5py

        samples.hdf5(path.parent, chunks)
        with h5py.File(path, "r+") as file:
            change(file)

    return write


def instead(key: str, **new: object) -> Callable[..., None]:
    def change(file) -> None:
        del file[key]
        file.create_dataset(key, **new)

    return change


def group(file) -> None:
    del file["y_test"]
    file.create_group("y_test")


def nothing(file) -> None:
    import h5py

    del file["y_test"]
    file["y_test"] = h5py.Empty("f")


def lost(file) -> None:
    import h5py

    del file["y_test"]
    file["y_test"] = h5py.ExternalLink("nowhere.h5", "/y")


def half_written(file) -> None:
    instead("x_train", shape=(23, 4, 3), dtype="u1", chunks=(4, 4, 3))(file)
    file["x_train"][:12] = 1


def checked_sum(file) -> None:
    instead("x_train", data=ARRAYS["x_train"], chunks=(4, 4, 3), fletcher32=True)(file)


def flip_in_the_middle(path: Path) -> None:
    """Change a byte of an image in the third chunk."""
    in_hdf5(checked_sum)(path)
    row = ARRAYS["x_train"][9].tobytes()
    rewrite(path, lambda raw: raw.replace(row, bytes([row[0] ^ 1]) + row[1:]))


def hdf5_cut(path: Path) -> None:
    samples.hdf5(path.parent)
    cut(-10)(path)


HDF5: dict[str, tuple[Callable[[Path], None], str]] = {
    "no HDF5": (of_text("hello"), "file signature not found"),
    "empty": (of_text(""), "cannot read"),
    "truncated": (hdf5_cut, "truncated file"),
    "missing": (lambda path: None, "No such file"),
    "no labels": (
        in_hdf5(lambda file: file.pop("y_train")),
        "has no data set y_train; it holds x_test, x_train, y_test",
    ),
    "group": (in_hdf5(group), "y_test is a group, not a data set"),
    "link to nothing": (in_hdf5(lost), "y_test is a link to what is not there"),
    "no space": (in_hdf5(nothing), "y_test is empty"),
    "a number": (in_hdf5(instead("y_test", data=3)), "y_test is a single number"),
    "strings": (in_hdf5(instead("y_test", data=np.full(7, b"cat"))), "y_test has dtype |S3"),
    "objects": (in_hdf5(instead("y_test", data=["cat"] * 7)), "y_test has dtype object"),
    "never written": (
        in_hdf5(instead("x_train", shape=(23, 4, 3), dtype="f4")),
        "x_train: its header declares 1,104 bytes, but the file holds 0",
    ),
    "terabytes declared": (in_hdf5(instead("x_train", shape=(1 << 40, 4), dtype="f4")), "but the file holds 0"),
    "half written": (in_hdf5(half_written), "x_train: its header declares 6 chunks, but the file holds 3"),
    "a chunk is damaged": (flip_in_the_middle, "x_train: damaged at row 0 or after it"),
    "nan": (in_hdf5(instead("x_test", data=np.full((7, 4, 3), np.nan))), "x_test: 7 rows hold values"),
    "label": (
        in_hdf5(instead("y_train", data=np.arange(23) - 2)),
        "y_train: label -2 is below 0",
    ),
    "images != labels": (in_hdf5(instead("y_train", data=np.arange(9))), "x_train has 23 rows, but y_train has 9"),
}


@pytest.mark.parametrize("what", HDF5)
def test_a_bad_hdf5_file_is_refused_in_a_line(tmp_path: Path, what: str) -> None:
    damage, words = HDF5[what]
    damage(tmp_path / "d.h5")
    message = refusal(tmp_path / "d.h5")
    assert words in message
    assert "d.h5" in message or message.startswith("d: x_train has")


@pytest.mark.parametrize(
    ("how", "cache", "shuffle", "strided", "words"),
    [
        (
            {"chunks": (10, 4, 3), "compression": "gzip"},
            64,
            "rows",
            False,
            "up to 10 times .*; --shuffle blocks --block",
        ),
        (
            {"chunks": (90, 4, 3), "maxshape": (None, 4, 3)},
            64,
            "rows",
            False,
            "each chunk of 30 rows .* --block-rows 30 ",
        ),
        (
            {"chunks": (10, 4, 3)},
            64,
            "rows",
            True,
            "; --shards contiguous --shuffle blocks --block-rows 10 reads it once",
        ),
        ({"chunks": (10, 4, 3)}, X.nbytes, "rows", False, ""),  # all of it is kept
        ({"chunks": (10, 4, 3)}, 64, "blocks", False, ""),
        ({"chunks": (10, 4, 3)}, 64, "none", False, ""),
        ({"chunks": (8, 4, 3)}, 64, "rows", False, ""),
        ({}, 64, "rows", False, ""),
    ],
)
def test_chunks_that_are_read_again_and_again(
    tmp_path: Path, monkeypatch: Any, how: Any, cache: int, shuffle: str, strided: bool, words: str
) -> None:
    monkeypatch.setattr(hdf5, "CACHE", cache)
    stored(X, **how)(tmp_path / "d.h5")
    x = hdf5_column(open_hdf5(tmp_path / "d.h5"), tmp_path / "d.h5", "x")
    split = Split(NormalizedSource(x, Normalization(np.zeros(1), np.ones(1)), "float32"), ArraySource(np.arange(30)))
    lines = rereads(Shards(split, 2, 5, 0, 0, 2, "float32", shuffle, 5, strided))
    assert [bool(re.search(words, line)) for line in lines] == [True] * bool(words)

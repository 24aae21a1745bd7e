"""Sources: stored and compressed members give the same rows, and a bad file is a DataError that names it."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpiml.data.npy import CompressedSource, npz_member
from mpiml.data.sources import CHUNK, ArraySource, Source
from mpiml.errors import DataError

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "float64": RANDOM.random((20, 3)),
    "float16 images": RANDOM.random((20, 4, 5)).astype(np.float16),
    "labels": RANDOM.integers(0, 9, 20),
    "bytes": RANDOM.integers(0, 256, (20, 2), np.uint8),
    "booleans": RANDOM.random((20, 2)) < 0.5,
    "other byte order": RANDOM.random((20, 3)).astype(">f4"),
    "rows without values": np.empty((20, 0)),
    "no rows": np.empty((0, 3)),
}
save_either = pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])


def opened(path: Path, save: Callable, array: np.ndarray) -> Source:
    save(path, before=np.arange(5), x=array)
    return npz_member(path, "x")


@save_either
@pytest.mark.parametrize("kind", ARRAYS)
def test_rows_are_those_that_were_saved(tmp_path: Path, save: Callable, kind: str) -> None:
    array = ARRAYS[kind]
    source = opened(tmp_path / "a.npz", save, array)
    assert (len(source), source.shape, source.dtype) == (len(array), array.shape[1:], array.dtype)
    source.hold(np.arange(len(array)))
    indices = np.array([7, 0, 19, 7]) if len(array) else np.arange(0)
    np.testing.assert_array_equal(source.rows(indices), array[indices])


@save_either
def test_rows_are_fresh(tmp_path: Path, save: Callable) -> None:
    source = opened(tmp_path / "a.npz", save, ARRAYS["float64"])
    source.hold(np.arange(20))
    rows = source.rows(np.arange(20))
    rows += 1
    np.testing.assert_array_equal(source.rows(np.arange(20)), ARRAYS["float64"])


@save_either
@pytest.mark.parametrize("span", [(0, 5), (7, 13), (15, 20), (4, 4), (0, 20)])
def test_held_rows_keep_their_numbers(tmp_path: Path, save: Callable, span: tuple[int, int]) -> None:
    source = opened(tmp_path / "a.npz", save, ARRAYS["float16 images"])
    source.hold(np.arange(*span))
    np.testing.assert_array_equal(source.rows(np.arange(*span)), ARRAYS["float16 images"][slice(*span)])


def test_a_compressed_source_keeps_only_what_it_holds(tmp_path: Path) -> None:
    array = np.arange(3 * CHUNK // 16).reshape(-1, 2)  # longer than is read at once
    source = opened(tmp_path / "a.npz", np.savez_compressed, array)
    assert isinstance(source, CompressedSource)
    assert len(source._held) == 0
    for start, stop in ((len(array) - 9, len(array)), (100, len(array) - 100)):
        source.hold(np.arange(start, stop))
        assert len(source._held) == stop - start
        np.testing.assert_array_equal(source.rows(np.arange(start, stop)), array[start:stop])


def test_a_stored_source_is_mapped_not_read(tmp_path: Path) -> None:
    source = opened(tmp_path / "a.npz", np.savez, ARRAYS["float64"])
    assert isinstance(source.array.base, np.memmap) or isinstance(source.array, np.memmap)
    assert not source.array.flags.writeable


def test_a_stored_array_may_be_in_column_order(tmp_path: Path) -> None:
    array = np.asfortranarray(ARRAYS["float64"])
    np.testing.assert_array_equal(opened(tmp_path / "a.npz", np.savez, array).rows(np.arange(20)), array)


def read(path: Path) -> np.ndarray:
    """All rows of the array x of a file."""
    source = npz_member(path, "x")
    source.hold(np.arange(len(source)))
    return source.rows(np.arange(len(source)))


def npy(shape: tuple[int, ...], values: int) -> bytes:
    """A .npy file whose header declares `shape` and which holds that many random float64 values."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + np.random.default_rng(1).random(values).tobytes()


def archive(member: bytes, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        made.writestr("x.npy", member)
    return file.getvalue()


def saved(array: object, save: Callable = np.savez) -> bytes:
    file = io.BytesIO()
    save(file, x=array)
    return file.getvalue()


def flipped(raw: bytes, where: int) -> bytes:
    return raw[:where] + bytes([raw[where] ^ 0xFF]) + raw[where + 1 :]


def misstated(raw: bytes, field: int, change: int) -> bytes:
    """The directory of the archive gives its member's checksum (field 16), or its size in the file (20) or
    out of it (24), wrongly."""
    at = raw.rindex(b"PK\x01\x02") + field
    (value,) = struct.unpack_from("<I", raw, at)
    return raw[:at] + struct.pack("<I", value + change) + raw[at + 4 :]


LONG = 50_000  # values: far more than the header's read takes in, so that damage behind it is met only by hold()
WHOLE = archive(npy((LONG,), LONG))
BAD = {
    "no zip": (b"x_train = 1, 2, 3\n" * 10, "is not an .npz file"),
    "empty": (b"", "is not an .npz file"),
    "cut short": (WHOLE[:-200], "is not an .npz file"),
    "another key": (saved(1).replace(b"x.npy", b"z.npy"), "no array x; it holds z"),
    "nothing in it": (b"PK\x05\x06" + bytes(18), "it holds nothing"),
    "pickled": (saved(np.array([{}, None], object)), "object"),
    "complex": (saved(np.ones(3, complex)), "complex128"),
    "text": (saved(np.array(["a", "b"])), "<U1"),
    "dates": (saved(np.zeros(3, "M8[s]")), "datetime64"),
    "records": (saved(np.zeros(3, "f8,i4")), "dtype"),
    "a number": (saved(3.0), "single number"),
    "a compressed number": (saved(3.0, np.savez_compressed), "single number"),
    "no array": (archive(b"hello, world" * 9), "is not an array in .npy format"),
    "an empty member": (archive(b""), "is not an array in .npy format"),
    "more declared, compressed": (archive(npy((10, 3), 20)), "240 bytes, but the file holds 160"),
    "more declared, stored": (archive(npy((10, 3), 20), zipfile.ZIP_STORED), "240 bytes, but the file holds 160"),
    "less declared": (archive(npy((10,), 20)), "80 bytes, but the file holds 160"),
    "columns, compressed": (saved(np.asfortranarray(np.ones((4, 3))), np.savez_compressed), "column order"),
    "stream too short": (misstated(WHOLE, 20, -LONG), "x: damaged"),
    "less than the directory says": (misstated(archive(npy((LONG,), LONG - 9)), 24, 72), "x: ends too early"),
    "stream damaged": (flipped(WHOLE, LONG), "x: damaged"),
    "checksum": (misstated(WHOLE, 16, -1), "x: damaged: Bad CRC-32"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_an_error_that_names_it(tmp_path: Path, what: str) -> None:
    path = tmp_path / "mine.npz"
    content, message = BAD[what]
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.npz: No such file"):
        npz_member(tmp_path / "none.npz", "x")
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        npz_member(tmp_path, "x")


@pytest.mark.filterwarnings("ignore")  # zipfile's and NumPy's own, about what they find
@pytest.mark.parametrize("array", [ARRAYS["float64"], np.zeros((500, 3))], ids=["random", "zeros"])
def test_no_damaged_byte_is_a_crash_or_a_wrong_row(tmp_path: Path, array: np.ndarray) -> None:
    path, raw = tmp_path / "a.npz", saved(array, np.savez_compressed)
    refusals = []
    for where in range(len(raw)):
        path.write_bytes(flipped(raw, where))
        try:
            np.testing.assert_array_equal(read(path), array)  # a time stamp, say, does no harm
        except DataError as error:
            refusals.append(str(error))
    assert len(raw) / 2 < len(refusals) < len(raw)
    assert all(str(path) in refusal for refusal in refusals)


def test_an_array_of_one_number_has_no_rows() -> None:
    with pytest.raises(DataError, match="y_test is a single number"):
        ArraySource(3, "y_test")

"""NumPy's files: stored and compressed members give the same rows, and a bad file is a DataError that names it."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpiml.data.dataset import open_dataset
from mpiml.data.npy import CompressedSource, npz_member
from mpiml.data.sources import CHUNK, ArraySource, Source
from mpiml.errors import DataError
from tests.data import samples
from tests.data.damage import cut, longer, of_text, refusal, replaced_by, rewrite

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
    """The directory of the archive gives its member's flags (field 8), compression (10), checksum (16), or its size in
    the file (20) or out of it (24), wrongly."""
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
    "text": (
        saved(np.array(["a", "b"])),
        "<U1; real numbers are needed; if labels are words, store",
    ),
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
    "encrypted": (misstated(WHOLE, 8, 1), "x cannot be read: .*is encrypted.*; save it with numpy.savez"),
    "compressed otherwise": (misstated(WHOLE, 10, 89), "x cannot be read: .*compression.*; save it with numpy.savez"),
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


def another(array: object) -> Callable[[Path], None]:
    """Put another array in place of a .npy file."""
    return lambda path: np.save(path, np.asarray(array), allow_pickle=True)


def header(shape: str, values: int = 276, version: int = 1, length: int | None = None) -> Callable[[Path], None]:
    """Put a .npy file of bytes in place of another, whose header says what it likes."""

    def change(path: Path) -> None:
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        size = struct.pack("<H" if version == 1 else "<I", len(text) if length is None else length)
        path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + size + text + bytes(values))

    return change


def with_value(key: str, row: int, value: float, dtype: str = "float32") -> Callable[[Path], None]:
    changed = samples.ARRAYS[key].astype(dtype)
    changed[row] = value
    return another(changed)


NPY: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": ("x_test.npy", Path.unlink, "has no array x_test; it holds "),
    "truncated": ("x_train.npy", cut(-5), "x_train.npy: its header declares 276 bytes, but the file holds 271"),
    "oversized": ("x_test.npy", longer, "x_test.npy: its header declares 84 bytes, but the file holds 92"),
    "header cut": ("x_train.npy", cut(40), "x_train.npy is not an array in .npy format"),
    "empty file": ("x_train.npy", cut(0), "x_train.npy is not an array in .npy format"),
    "magic": ("y_train.npy", lambda p: rewrite(p, lambda r: b"\x93NUMPX" + r[6:]), "y_train.npy is not an array"),
    "version": ("y_train.npy", lambda p: rewrite(p, lambda r: r[:6] + b"\x09" + r[7:]), "y_train.npy is not an array"),
    "text": ("y_train.npy", of_text("1\n2\n3\n"), "y_train.npy is not an array in .npy format"),
    "pickled": ("x_train.npy", another(np.array([{}, None], object)), "pickled objects are never read"),
    "complex": ("x_train.npy", another(np.ones((23, 4, 3), complex)), "x_train.npy has dtype complex128"),
    "strings": ("y_train.npy", another(np.full(23, "cat")), "y_train.npy has dtype <U3"),
    "dates": ("y_test.npy", another(np.zeros(7, "M8[s]")), "y_test.npy has dtype datetime64"),
    "one number": ("y_test.npy", another(3), "y_test.npy is a single number"),
    "more rows declared than any disk has": ("x_train.npy", header("(10**15, 4, 3)"), "x_train.npy is not an array"),
    "more declared": ("x_train.npy", header("(1000000000000000, 4, 3)"), "declares 12,000,000,000,000,000 bytes"),
    "negative": ("x_train.npy", header("(-23, -4, 3)"), "x_train.npy: its header declares 276 bytes"),
    "huge header": ("x_train.npy", header("(23, 4, 3)", 276, 2, 0xFFFFFFFF), "header claims 4,294,967,295 bytes"),
    "images != labels": ("y_train.npy", another(np.zeros(22, int)), "x_train has 23 rows, but y_train has 22"),
    "no rows": ("x_test.npy", another(np.zeros((0, 4, 3))), "x_test has 0 rows, but y_test has 7"),
    "no values": ("x_test.npy", another(np.zeros((7, 4, 0))), "rows of x_test are (4, 0)"),
    "other rows": ("x_test.npy", another(np.zeros((7, 12))), "rows of x_train are (4, 3), of x_test (12,)"),
    "labels of two kinds": ("y_test.npy", another(np.zeros(7)), "y_train is uint8, but y_test is float64"),
    "two labels a row": ("y_train.npy", another(np.zeros((23, 2), int)), "rows of y_train are (2,), of y_test ()"),
    "nan": ("x_train.npy", with_value("x_train", 17, np.nan), "x_train.npy: 1 rows hold values that are not finite"),
    "nan's row": ("x_train.npy", with_value("x_train", 17, np.nan), "the first is row 17"),
    "infinite": ("x_test.npy", with_value("x_test", 2, -np.inf, "float16"), "but not infinity), the first is row 2"),
    "negative label": (
        "y_train.npy",
        with_value("y_train", 4, -2, "int8"),
        "label -2 is below 0",
    ),
    "its row": ("y_train.npy", with_value("y_train", 4, -2, "int8"), "in row 4"),
    "label beyond all rows": ("y_test.npy", with_value("y_test", 5, 60, "int8"), "y_test.npy: label 60 makes more"),
    "directory": ("x_test.npy", replaced_by(Path.mkdir), "cannot read"),
    "pipe": ("x_test.npy", replaced_by(os.mkfifo), "x_test.npy: is not a regular file"),
    "link to nowhere": ("x_test.npy", replaced_by(lambda p: p.symlink_to("gone")), "x_test.npy: No such file"),
    "not ours": ("x_test.npy", lambda p: p.chmod(0), "x_test.npy: Permission denied"),
}


@pytest.mark.parametrize("what", NPY)
def test_a_bad_npy_file_is_refused_in_a_line(tmp_path: Path, what: str) -> None:
    if what == "not ours" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    file, damage, words = NPY[what]
    damage(samples.npy(tmp_path) / file)
    assert words in refusal(tmp_path)


def test_npy_in_column_order(tmp_path: Path) -> None:
    for key, array in samples.ARRAYS.items():
        np.save(tmp_path / f"{key}.npy", np.asfortranarray(array))
    rows = open_dataset(str(tmp_path)).train.x.rows(np.array([4, 2]))
    np.testing.assert_array_equal(rows, samples.ARRAYS["x_train"][[4, 2]])

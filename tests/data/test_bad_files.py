"""Bad files of every format are refused before a run begins, with what is wrong, and where."""

from __future__ import annotations

import gzip
import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpiml.data.dataset import open_dataset
from mpiml.data.formats import Options
from mpiml.data.inspection import inspect, problem
from mpiml.errors import DataError
from tests.data import samples
from tests.data.samples import ARRAYS, idx

Change = Callable[[bytes], bytes]


def look_at(spec: Path, options: Options) -> None:
    """Open a data set and look at all its values, as a run of one rank would."""
    data = open_dataset(str(spec), options)
    for split in (data.train, data.test):
        for column, source in (("x", split.x), ("y", split.y)):
            source.hold(np.arange(len(source)))
            if wrong := problem(data, column, inspect(source, np.arange(len(source)))):
                raise DataError(f"{source.name}: {wrong[0]} {wrong[1]}")


def refusal(spec: Path, options: Options = samples.OPTIONS) -> str:
    """Why a data set cannot be used, in one line."""
    with pytest.raises(DataError) as error:
        look_at(spec, options)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(path: Path, change: Change) -> None:
    path.write_bytes(change(path.read_bytes()))


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def npy(array: object) -> Callable[[Path], None]:
    """Put another array in place of a .npy file."""
    return lambda path: np.save(path, np.asarray(array), allow_pickle=True)


def header(shape: str, values: int = 276, version: int = 1, length: int | None = None) -> Callable[[Path], None]:
    """Put a .npy file of bytes in place of another, whose header says what it likes."""

    def change(path: Path) -> None:
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        size = struct.pack("<H" if version == 1 else "<I", len(text) if length is None else length)
        path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + size + text + bytes(values))

    return change


def cut(count: int) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda raw: raw[:count])


def longer(path: Path) -> None:
    rewrite(path, lambda raw: raw + b"and more")


def of_text(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text)


def with_value(key: str, row: int, value: float, dtype: str = "float32") -> Callable[[Path], None]:
    changed = ARRAYS[key].astype(dtype)
    changed[row] = value
    return npy(changed)


NPY: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": ("x_test.npy", Path.unlink, "x_test.npy: No such file"),
    "truncated": ("x_train.npy", cut(-5), "x_train.npy: its header declares 276 bytes, but the file holds 271"),
    "oversized": ("x_test.npy", longer, "x_test.npy: its header declares 84 bytes, but the file holds 92"),
    "header cut": ("x_train.npy", cut(40), "x_train.npy is not an array in .npy format"),
    "empty file": ("x_train.npy", cut(0), "x_train.npy is not an array in .npy format"),
    "magic": ("y_train.npy", lambda p: rewrite(p, lambda r: b"\x93NUMPX" + r[6:]), "y_train.npy is not an array"),
    "version": ("y_train.npy", lambda p: rewrite(p, lambda r: r[:6] + b"\x09" + r[7:]), "y_train.npy is not an array"),
    "text": ("y_train.npy", of_text("1\n2\n3\n"), "y_train.npy is not an array in .npy format"),
    "pickled": ("x_train.npy", npy(np.array([{}, None], object)), "pickled objects are never read"),
    "complex": ("x_train.npy", npy(np.ones((23, 4, 3), complex)), "x_train.npy has dtype complex128"),
    "strings": ("y_train.npy", npy(np.full(23, "cat")), "y_train.npy has dtype <U3"),
    "dates": ("y_test.npy", npy(np.zeros(7, "M8[s]")), "y_test.npy has dtype datetime64"),
    "one number": ("y_test.npy", npy(3), "y_test.npy is a single number"),
    "more rows declared than any disk has": ("x_train.npy", header("(10**15, 4, 3)"), "x_train.npy is not an array"),
    "more declared": ("x_train.npy", header("(1000000000000000, 4, 3)"), "declares 12,000,000,000,000,000 bytes"),
    "negative": ("x_train.npy", header("(-23, -4, 3)"), "x_train.npy: its header declares 276 bytes"),
    "huge header": ("x_train.npy", header("(23, 4, 3)", 276, 2, 0xFFFFFFFF), "header claims 4,294,967,295 bytes"),
    "images != labels": ("y_train.npy", npy(np.zeros(22, int)), "x_train has 23 rows, but y_train has 22"),
    "no rows": ("x_test.npy", npy(np.zeros((0, 4, 3))), "x_test has 0 rows, but y_test has 7"),
    "no values": ("x_test.npy", npy(np.zeros((7, 4, 0))), "rows of x_test are (4, 0)"),
    "other rows": ("x_test.npy", npy(np.zeros((7, 12))), "rows of x_train are (4, 3), of x_test (12,)"),
    "labels of two kinds": ("y_test.npy", npy(np.zeros(7)), "y_train is uint8, but y_test is float64"),
    "two labels a row": ("y_train.npy", npy(np.zeros((23, 2), int)), "rows of y_train are (2,), of y_test ()"),
    "nan": ("x_train.npy", with_value("x_train", 17, np.nan), "x_train.npy: 1 rows hold values that are not finite"),
    "nan's row": ("x_train.npy", with_value("x_train", 17, np.nan), "the first is row 17"),
    "infinite": ("x_test.npy", with_value("x_test", 2, -np.inf, "float16"), "not finite, the first is row 2"),
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
def test_npy(tmp_path: Path, what: str) -> None:
    if what == "not ours" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    file, damage, words = NPY[what]
    damage(samples.npy(tmp_path) / file)
    assert words in refusal(tmp_path)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
IDX: dict[str, tuple[str, Change, str]] = {
    "magic": (IMAGES, lambda raw: b"\1" + raw[1:], " is not an IDX file: it begins with 01 00 08 03"),
    "type": (IMAGES, lambda raw: raw[:2] + b"\x0a" + raw[3:], " is not an IDX file: it begins with 00 00 0a 03"),
    "no axes": (LABELS, lambda raw: raw[:3] + b"\0", "is not an IDX file"),
    "empty": (IMAGES, lambda raw: b"", "is not an IDX file: it begins with nothing"),
    "header cut": (IMAGES, lambda raw: raw[:9], "ends within its header, at byte 9"),
    "truncated": (IMAGES, lambda raw: raw[:-1], "declares 276 bytes, but the file holds 275"),
    "oversized": (LABELS, lambda raw: raw + b"\0", "declares 23 bytes, but the file holds 24"),
    "more declared": (IMAGES, lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "but the file holds 276"),
    "images != labels": (LABELS, lambda raw: idx(ARRAYS["y_test"]), "x_train has 23 rows, but y_train has 7"),
    "images as labels": (LABELS, lambda raw: idx(ARRAYS["x_train"]), "rows of y_train are (4, 3), of y_test ()"),
    "no images": (IMAGES, lambda raw: idx(ARRAYS["x_train"][:0]), "x_train has 0 rows, but y_train has 23"),
    "nan": (IMAGES, lambda raw: idx(np.full((23, 4, 3), np.nan), 13, ">f4"), "23 rows hold values that are not finite"),
}
GZIP: dict[str, tuple[str, Change, str]] = {
    "not gzipped": (IMAGES, gzip.decompress, "damaged: Not a gzipped file"),
    "empty": (IMAGES, lambda raw: b"", "is not an IDX file: it begins with nothing"),
    "truncated": (IMAGES, lambda raw: raw[:-30], "-ubyte.gz is cut short: Compressed file ended before the end"),
    "end of it lost": (IMAGES, lambda raw: raw[:-28] + raw[-4:], "-ubyte.gz is cut short: "),
    "more declared": (
        IMAGES,
        lambda raw: gzip.compress(gzip.decompress(raw)[:-1]),
        "declares 276 bytes, but the file holds 275",
    ),
    "less declared": (LABELS, lambda raw: gzip.compress(gzip.decompress(raw) + b"\0"), "but the file holds 24"),
    "checksum": (IMAGES, lambda raw: raw[:-8] + bytes([raw[-8] ^ 1]) + raw[-7:], "damaged: CRC check failed"),
    "damaged": (IMAGES, lambda raw: raw[:40] + bytes(30) + raw[70:], "damaged"),
}


@pytest.mark.parametrize(
    ("what", "gzipped"), [*((what, False) for what in IDX), *((what, True) for what in {**IDX, **GZIP})]
)
def test_idx(tmp_path: Path, what: str, gzipped: bool) -> None:
    file, change, words = IDX[what] if not gzipped or what not in GZIP else GZIP[what]
    if not gzipped:
        rewrite(samples.plain_idx(tmp_path) / file, change)
    elif what in GZIP:
        rewrite(samples.gzipped_idx(tmp_path) / f"{file}.gz", change)
    else:
        zipped = samples.gzipped_idx(tmp_path) / f"{file}.gz"
        rewrite(zipped, lambda raw: gzip.compress(change(gzip.decompress(raw))))
    message = refusal(tmp_path)
    assert words in message
    assert file in message or "x_train has" in message or "rows of" in message


def test_idx_file_that_is_missing(tmp_path: Path) -> None:
    (samples.gzipped_idx(tmp_path) / f"{LABELS}.gz").unlink()
    assert f"{LABELS}: No such file" in refusal(tmp_path)


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
def test_hdf5(tmp_path: Path, what: str) -> None:
    damage, words = HDF5[what]
    damage(tmp_path / "d.h5")
    message = refusal(tmp_path / "d.h5")
    assert words in message
    assert "d.h5" in message or message.startswith("d: x_train has")


def line(number: int, text: str) -> Callable[[Path], None]:
    """Put another line in place of one of train.csv."""

    def change(path: Path) -> None:
        lines = path.read_text().splitlines(keepends=True)
        path.write_bytes(
            b"".join(
                [
                    *(x.encode() for x in lines[: number - 1]),
                    text.encode("latin-1") + b"\n",
                    *(x.encode() for x in lines[number:]),
                ]
            )
        )

    return change


GOOD = "0,0,1,2,3,4,5,6,7,8,9,10,11"
CSV: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (of_text(""), "train.csv is empty"),
    "empty first line": (of_text("\n1,2\n"), "has no column kind"),
    "names alone": (of_text("a,kind\n"), "x_train has no rows"),
    "no label column": (line(1, "a,b,c"), "has no column kind; there are a, b, c"),
    "two label columns": (line(1, "a,kind,kind"), "has 2 columns kind"),
    "labels alone": (of_text("kind\n1\n"), "has labels and nothing else"),
    "value missing": (line(5, GOOD[2:]), "line 5: has 12 values, but there are 13 columns"),
    "value too many": (line(6, GOOD + ",7"), "line 6: has 14 values, but there are 13 columns"),
    "empty value": (line(7, GOOD.replace("5", "")), "line 7: could not convert string '' to float64"),
    "word": (line(24, GOOD.replace("5", "five")), "line 24: could not convert string 'five' to float64"),
    "empty line": (line(3, ""), "line 3: has 0 values"),
    "empty lines": (of_text("a,kind\n1,2.0\n\n\n"), "line 3: has 0 values"),
    "nothing but empty lines": (of_text("a,kind\n\n\n"), "line 2: has 0 values"),
    "comment": (line(3, "# no data"), "line 3: has 1 values"),
    "quote not closed": (line(4, GOOD.replace("5", '"5')), "line 4"),
    "not UTF-8": (line(4, "\xe9" + GOOD), "line 4: not in UTF-8"),
    "binary": (line(4, "\0\1\2"), "line 4"),
    "name not UTF-8": (line(1, "\xe9,kind"), "line 1: not in UTF-8"),
    "fraction as label": (line(9, GOOD.replace("1,2,3", "1.5,2,3")), "line 9: the label 1.5 is not an integer"),
    "nan as label": (line(9, GOOD.replace("1,2,3", "nan,2,3")), "line 9: the label nan is not an integer"),
    "word as label": (line(9, GOOD.replace("1,2,3", "cat,2,3")), "line 9: could not convert string 'cat'"),
    "nan": (line(9, GOOD.replace("9", "nan")), "1 rows hold values that are not finite, the first is row 7"),
    "infinite": (line(2, GOOD.replace("9", "1e999")), "1 rows hold values that are not finite, the first is row 0"),
    "negative label": (
        line(9, GOOD.replace("1,2,3", "-2,2,3")),
        "labels: label -2 is below 0",
    ),
    "cut": (cut(-8), "line 24: has"),
    "other columns": (of_text("kind,x\n1,2\n"), "has columns kind, x,"),
    "missing": (Path.unlink, "train.csv: No such file"),
}


@pytest.mark.filterwarnings("error")  # no words but ours
@pytest.mark.parametrize("what", CSV)
def test_csv(tmp_path: Path, what: str) -> None:
    damage, words = CSV[what]
    damage(samples.csv(tmp_path) / "train.csv")
    if what in ("names alone", "empty lines", "nothing but empty lines"):
        of_text("a,kind\n1,2\n" if what == "names alone" else "a,kind\n\n")(tmp_path / "test.csv")
    message = refusal(tmp_path)
    assert words in message
    assert "train.csv" in message or "x_train" in message


@pytest.mark.parametrize("write", [samples.csv, samples.parquet])
def test_label_column_must_be_said(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    assert "with --label; there are " in refusal(write(tmp_path), Options())


def rows(**columns: object) -> Callable[[Path], None]:
    """Put another table in place of a Parquet file."""

    def write(path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet as pq

        pq.write_table(pa.table(columns), path, row_group_size=3, compression="none", write_page_checksum=True)

    return write


def damaged_group(path: Path) -> None:
    rows(a=np.arange(10) * 1.5, kind=[1] * 10)(path)
    rewrite(path, lambda raw: raw[:300] + bytes(60) + raw[360:])


PARQUET: dict[str, tuple[Callable[[Path], None], str]] = {
    "no Parquet": (of_text("a,kind\n1,2\n"), "cannot read"),
    "empty": (of_text(""), "cannot read"),
    "truncated": (cut(-20), "cannot read"),
    "missing": (Path.unlink, "train.parquet: No such file"),
    "no rows": (rows(a=np.zeros(0), kind=np.zeros(0, int)), "x_train has no rows"),
    "no value": (rows(a=[1.0, 2.0, 3.0, 4.0, None], kind=[1] * 5), "a has 1 rows without a value, first row 4"),
    "no label": (rows(a=[1.0] * 5, kind=[1, 2, None, None, 0]), "kind has 1 rows without a value, first row 2"),
    "words": (rows(a=["cat", "dog"], kind=[0, 1]), "column a is string; real numbers are needed"),
    "lists": (rows(a=[[1, 2], [3]], kind=[0, 1]), "column a is list<"),
    "dates": (rows(a=np.zeros(2, "M8[s]"), kind=[0, 1]), "column a is timestamp"),
    "no column of labels": (rows(a=[1], b=[2]), "has no column kind; there are a, b"),
    "labels alone": (rows(kind=[1]), "has labels and nothing else"),
    "nan": (rows(a=[1.0] * 5 + [np.nan], kind=[1] * 6), "1 rows hold values that are not finite, the first is row 5"),
    "negative label": (
        rows(a=[1.0] * 5, kind=[1, 1, 1, 1, -3]),
        "labels: label -3 is below 0",
    ),
    "damaged": (damaged_group, "damaged in row group"),
}


@pytest.mark.parametrize("what", PARQUET)
def test_parquet(tmp_path: Path, what: str) -> None:
    damage, words = PARQUET[what]
    damage(samples.parquet(tmp_path) / "train.parquet")
    if what not in ("no Parquet", "empty", "truncated", "missing"):
        rows(a=[1.0], kind=[1])(tmp_path / "test.parquet")
    message = refusal(tmp_path)
    assert words in message
    assert "train.parquet" in message or "x_train" in message


def saved(array: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


TOKENS: dict[str, tuple[str, bytes, str]] = {
    "text too short": ("t.txt", b"hello", "5 tokens to train on are too few: a row needs 8 + 1"),
    "too short to test on": ("t.txt", b"hello, wide world", "2 tokens to test on are too few"),
    "empty": ("t.txt", b"", "0 tokens to train on"),
    "half a token": ("t.bin", bytes(401), "t.bin: its 401 bytes are not a whole number of uint16 tokens"),
    "floats": ("t.npy", saved(np.zeros(400)), "t.npy is float64"),
    "a table": ("t.npy", saved(np.zeros((400, 2), int)), "t.npy is int64 in rows of (2,)"),
    "pickled": ("t.npy", saved(np.array([{}], object)), "pickled objects are never read"),
    "truncated": ("t.npy", saved(np.zeros(400, int))[:-8], "t.npy: its header declares 3,200 bytes, but"),
    "negative": ("t.npy", saved(np.r_[np.arange(300) % 9, -5, np.zeros(99, int)]), "token -5 is below 0"),
    "its row": ("t.npy", saved(np.r_[np.arange(300) % 9, -5, np.zeros(99, int)]), "in row 37"),
}


@pytest.mark.parametrize("what", TOKENS)
def test_text_and_tokens(tmp_path: Path, what: str) -> None:
    name, content, words = TOKENS[what]
    (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path / name, Options(context=8))


def test_no_text_at_all(tmp_path: Path) -> None:
    assert "there are no files" in refusal(tmp_path, Options(context=8))
    assert "there are no files" in refusal(tmp_path / "*.py", Options(context=8))
    assert "none.txt: No such file" in refusal(tmp_path / "none.txt", Options(context=8))
    for name, dtype in (("a.npy", int), ("b.npy", np.uint16)):
        np.save(tmp_path / name, np.zeros(100, dtype))
    assert f"b.npy is uint16, but {tmp_path}/a.npy is int64" in refusal(tmp_path, Options(context=8))

"""Formats: each gives the rows that were saved, to every rank its own; text and tokens give windows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.data import sources
from mpiml.data.dataset import Dataset, open_dataset
from mpiml.data.formats import KEYS, Options
from mpiml.errors import ConfigError, DataError
from tests.data.samples import ARRAYS, FORMATS, OPTIONS, TABLES, TEST, TRAIN, csv, hdf5, idx, npy, parquet, values

every_format = pytest.mark.parametrize("name", FORMATS)


def columns(data: Dataset) -> dict[str, Any]:
    return dict(zip(KEYS, (data.train.x, data.train.y, data.test.x, data.test.y), strict=True))


@every_format
def test_rows_are_those_that_were_saved(tmp_path: Path, name: str) -> None:
    data = open_dataset(str(FORMATS[name](tmp_path)), OPTIONS)
    assert (len(data.train), len(data.test), data.classification) == (TRAIN, TEST, True)
    for key, source in columns(data).items():
        expected = values(name, key)
        assert source.shape == expected.shape[1:]
        source.hold(np.arange(len(source)))
        order = np.random.default_rng(1).integers(0, len(source), 40)
        for indices in (np.arange(len(source)), order, np.arange(0)):
            rows = source.rows(indices)
            assert rows.dtype == source.dtype
            np.testing.assert_array_equal(rows, expected[indices])
        before = source.rows(order)
        before += 1  # a fresh array, not a view of what is held or mapped
        np.testing.assert_array_equal(source.rows(order), expected[order])


@every_format
@pytest.mark.parametrize("mine", [np.arange(5, 9), np.arange(1, 23, 4), np.array([3]), np.arange(0)])
def test_a_rank_may_hold_any_rows(tmp_path: Path, name: str, mine: np.ndarray) -> None:
    data = open_dataset(str(FORMATS[name](tmp_path)), OPTIONS)
    for key in ("x_train", "y_train"):
        source = columns(data)[key]
        source.hold(mine)
        np.testing.assert_array_equal(source.rows(mine[::-1]), values(name, key)[mine[::-1]])


@pytest.mark.parametrize("name", ["compressed_npz", "gzipped_idx", "csv", "parquet"])
def test_a_row_that_is_not_held_is_refused(tmp_path: Path, name: str) -> None:
    source = open_dataset(str(FORMATS[name](tmp_path)), OPTIONS).train.x
    for wrong in (4, 6, 0, 22):
        with pytest.raises(IndexError, match=f"row {wrong} is not one of the rows that are held"):
            source.rows(np.array([wrong]))
        source.hold(np.array([3, 5, 9]))
    np.testing.assert_array_equal(source.rows(np.array([9, 3])), values(name, "x_train")[[9, 3]])


@pytest.mark.parametrize("name", TABLES)
def test_both_halves_of_a_table_are_read_at_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpiml.data import tables

    reads = []
    kind = tables.CSV if name == "csv" else tables.Parquet
    read = kind.read
    monkeypatch.setattr(kind, "read", lambda self, rows: reads.append(len(rows)) or read(self, rows))
    data = open_dataset(str(FORMATS[name](tmp_path)), OPTIONS)
    for rows in (np.arange(5), np.arange(3, 9)):
        data.train.x.hold(rows)
        data.train.y.hold(rows)
        assert not data.train.x.table._left  # nothing is kept twice
    assert reads == [5, 6]
    data.train.x.hold(np.arange(5))
    data.train.y.hold(np.arange(3, 9))
    np.testing.assert_array_equal(data.train.y.rows(np.arange(3, 9)), ARRAYS["y_train"][3:9])


def test_row_groups_of_others_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpiml.data import tables

    read = []
    columns_of = tables.Parquet._columns
    monkeypatch.setattr(tables.Parquet, "_columns", lambda self, g, at: read.append(g) or columns_of(self, g, at))
    open_dataset(str(parquet(tmp_path)), OPTIONS).train.x.hold(np.array([9, 10, 17]))
    assert read == [2, 4]


@pytest.mark.parametrize("shape", ["{0}", "{0}.gz"])
def test_other_spellings_of_idx_names(tmp_path: Path, shape: str) -> None:
    import gzip

    for name, key in zip(
        ("train-images.idx3", "train-labels.idx1", "t10k-images.idx3", "t10k-labels.idx1"), KEYS, strict=True
    ):
        content = idx(ARRAYS[key])
        (tmp_path / shape.format(f"{name}-ubyte")).write_bytes(
            gzip.compress(content) if shape.endswith("gz") else content
        )
    assert len(open_dataset(str(tmp_path)).train) == TRAIN


@pytest.mark.parametrize(("kind", "dtype"), [(8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")])
def test_idx_of_any_type(tmp_path: Path, kind: int, dtype: str) -> None:
    from mpiml.data.idx import idx_file

    array = np.array([[1, 2], [100, 3], [5, 6]])
    (tmp_path / "a").write_bytes(idx(array, kind, dtype))
    np.testing.assert_array_equal(idx_file(tmp_path / "a").rows(np.array([2, 1])), array[[2, 1]])


def table(tmp_path: Path, text: str, label: str = "y") -> Dataset:
    for which in ("train", "test"):
        (tmp_path / f"{which}.csv").write_bytes(text.encode())
    return open_dataset(str(tmp_path), Options(label=label))


@pytest.mark.parametrize(
    "text",
    [
        "a,y\n1.5,2\n-3e2,0\n",
        "a,y\n1.5,2\n-3e2,0",
        "a,y\r\n1.5,2\r\n-3e2,0\r\n",
        "\ufeffa,y\n1.5,2\n-3e2,0\n",
        '"a","y"\n"1.5",2\n-3e2,"0"\n',
        " a , y \n 1.5 , 2 \n -3e2, 0\n",
    ],
    ids=["plain", "no last newline", "Windows", "byte order mark", "quotes", "spaces"],
)
def test_csv_as_others_write_it(tmp_path: Path, text: str) -> None:
    data = table(tmp_path, text)
    data.train.x.hold(np.arange(2))
    data.train.y.hold(np.arange(2))
    np.testing.assert_array_equal(data.train.x.rows(np.arange(2)), [[1.5], [-300]])
    assert data.classification
    np.testing.assert_array_equal(data.train.y.rows(np.arange(2)), [2, 0])


def test_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    assert len(table(tmp_path, "\ufeffy,a\n1,2\n").train) == 1


def test_npy_in_column_order(tmp_path: Path) -> None:
    for key, array in ARRAYS.items():
        np.save(tmp_path / f"{key}.npy", np.asfortranarray(array))
    rows = open_dataset(str(tmp_path)).train.x.rows(np.array([4, 2]))
    np.testing.assert_array_equal(rows, ARRAYS["x_train"][[4, 2]])


def test_first_label_says_what_is_learned(tmp_path: Path) -> None:
    assert not table(tmp_path, "a,y\n1,2.0\n2,3\n").classification
    assert table(tmp_path, "a,y\n1,-2\n2,3\n").classification


def test_a_csv_file_of_many_lines(tmp_path: Path) -> None:
    rows = 3 * 4096 + 5
    data = table(tmp_path, "a,y\n" + "".join(f"{i},{i % 7}\n" for i in range(rows)))
    assert len(data.train) == rows
    mine = np.r_[5:7, 4000:9000, rows - 1]
    data.train.x.hold(mine)
    np.testing.assert_array_equal(data.train.x.rows(mine)[:, 0], mine)


def test_a_function_gives_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["from mpiml.data.dataset import Dataset", "import numpy as np", "x = np.eye(4)"]
    lines += ["def mine(): return Dataset.from_arrays(x, [0, 1, 0, 1], x, [0, 1, 0, 1])", "def other(): return x"]
    (tmp_path / "my_rows.py").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert len(open_dataset("my_rows:mine").train) == 4
    with pytest.raises(DataError, match="my_rows:other: must return a Dataset, but returns ndarray"):
        open_dataset("my_rows:other")
    with pytest.raises(ConfigError, match="my_rows:none: module 'my_rows' has no attribute 'none'"):
        open_dataset("my_rows:none")
    with pytest.raises(ConfigError, match="no_rows:mine: no module no_rows"):
        open_dataset("no_rows:mine")
    (tmp_path / "needs_more.py").write_text("import no_such_thing\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):  # with a traceback: it is the module's own mistake
        open_dataset("needs_more:mine")


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


TEXT = bytes(range(32, 127)) * 3


def windows(data: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    count = (len(data) - 1) // context
    x, y = data[: count * context], data[1 : count * context + 1]
    return x.reshape(count, context), y.reshape(count, context)


def check(data: Dataset, train: np.ndarray, test: np.ndarray, context: int) -> None:
    for split, expected in ((data.train, train), (data.test, test)):
        x, y = windows(expected, context)
        everything = np.arange(len(split))
        np.testing.assert_array_equal(split.x.rows(everything), x)
        np.testing.assert_array_equal(split.y.rows(everything[::-1]), y[::-1])
    assert data.language_model


@pytest.mark.parametrize("context", [1, 7, 20])
def test_text_in_windows(tmp_path: Path, context: int) -> None:
    (tmp_path / "book.txt").write_bytes(TEXT)
    data = open_dataset(str(tmp_path / "book.txt"), Options(context=context, held_out=0.2))
    assert (data.classes, data.name) == (256, "book")
    text = np.frombuffer(TEXT, np.uint8)
    check(data, text[: -len(text) // 5], text[-len(text) // 5 :], context)


def test_files_of_a_text_follow_each_other(tmp_path: Path) -> None:
    pieces = {
        "b/2.py": TEXT[50:90],
        "a.py": TEXT[:50],
        "b/3.py": b"",
        "c.py": TEXT[90:],
        ".hidden.py": b"no",
        "d.o": b"no",
    }
    for name, content in pieces.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    text = np.frombuffer(TEXT, np.uint8)
    data = open_dataset(f"{tmp_path}/**/*.py", Options(context=9))
    check(data, text[: len(text) - round(len(text) / 10)], text[len(text) - round(len(text) / 10) :], 9)
    (tmp_path / "d.o").unlink()
    assert [file.name for file in open_dataset(str(tmp_path), Options(context=9)).files] == [
        "a.py",
        "2.py",
        "3.py",
        "c.py",
    ]


@pytest.mark.parametrize("kind", ["txt", "dir", "val"])
def test_a_text_of_its_own_to_test_on(tmp_path: Path, kind: str) -> None:
    if kind == "dir":
        (tmp_path / "train").mkdir()
        (tmp_path / "test").mkdir()
    suffix, other = {"txt": (".txt", "test"), "dir": ("/1", "test"), "val": (".bin", "val")}[kind]
    train, test = np.arange(200, dtype="<u2"), np.arange(100, dtype="<u2")
    dtype = "<u2" if kind == "val" else "u1"
    (tmp_path / f"train{suffix}").write_bytes(train.astype(dtype).tobytes())
    (tmp_path / f"{other}{suffix}").write_bytes(test.astype(dtype).tobytes())
    check(open_dataset(str(tmp_path), Options(context=8)), train, test, 8)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".bin", "uint16"), (".bin", "uint32"), (".npy", "uint16"), (".npy", "int64")]
)
def test_tokens(tmp_path: Path, suffix: str, dtype: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, 500).astype(dtype)
    path = tmp_path / f"tokens{suffix}"
    np.save(path, tokens) if suffix == ".npy" else path.write_bytes(tokens.tobytes())
    data = open_dataset(str(path), Options(context=16, tokens="uint32" if dtype == "uint32" else "uint16"))
    assert (data.train.x.dtype, data.classes) == (np.dtype(dtype), None)
    check(data, tokens[:450], tokens[450:], 16)


@pytest.mark.parametrize("write", [npy, csv])
def test_context_is_for_text(tmp_path: Path, write: Any) -> None:
    with pytest.raises(DataError, match=r"--context 8: .* is neither text nor tokens"):
        open_dataset(str(write(tmp_path)), Options(label="kind", context=8))


def test_text_needs_a_context(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(TEXT)
    with pytest.raises(DataError, match="text and tokens need --context T"):
        open_dataset(str(tmp_path / "book.txt"))


def test_runs() -> None:
    for rows, expected in (([], []), ([4], [(0, 1)]), ([1, 2, 3, 7, 8, 8, 9], [(0, 3), (3, 5), (5, 7)])):
        assert list(sources.runs(np.array(rows, int))) == expected

"""Data sets: what does not fit together is refused, values are looked at, and the built-in digits are as described."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import pytest

import mpiml.data
from mpiml.data import npy
from mpiml.data.batch import Batch
from mpiml.data.dataset import DIGITS, Dataset, Split, open_dataset
from mpiml.data.formats import Options
from mpiml.data.objects import WANTED
from mpiml.data.prefetch import in_memory
from mpiml.data.sources import ArraySource
from mpiml.errors import ConfigError, DataError

KEYS = ("x_train", "y_train", "x_test", "y_test")
GOOD = {
    "x_train": np.zeros((6, 3), np.float32),
    "y_train": np.arange(6) % 2,
    "x_test": np.zeros((2, 3), np.float32),
    "y_test": np.array([1, 0]),
}
BAD = {
    "train length": ({"y_train": np.arange(5)}, ["x_train has 6 rows", "y_train has 5"]),
    "test length": ({"y_test": np.arange(3)}, ["x_test has 2 rows", "y_test has 3"]),
    "no training rows": ({"x_train": np.zeros((0, 3)), "y_train": np.arange(0)}, ["x_train has no rows"]),
    "no test rows": ({"x_test": np.zeros((0, 3)), "y_test": np.arange(0)}, ["x_test has no rows"]),
    "input shapes": ({"x_test": np.zeros((2, 4))}, ["x_train", "(3,)", "x_test", "(4,)"]),
    "label shapes": ({"y_train": np.zeros((6, 2)), "y_test": np.zeros(2)}, ["y_train", "(2,)", "y_test", "()"]),
    "classes and values": ({"y_test": np.zeros(2)}, ["y_train is int64", "y_test is float64"]),
    "rows without values": ({"x_train": np.zeros((6, 0)), "x_test": np.zeros((2, 0))}, ["x_train", "no values"]),
    "labels without values": ({"y_train": np.zeros((6, 0)), "y_test": np.zeros((2, 0))}, ["y_train", "no values"]),
}


def source(values: object) -> ArraySource:
    return ArraySource(np.asarray(values), "x")


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("saved", [False, True], ids=["arrays", "file"])
def test_what_does_not_fit_is_refused(tmp_path: Path, what: str, saved: bool) -> None:
    changes, words = BAD[what]
    arrays = GOOD | changes
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError) as error:
        open_dataset(str(path)) if saved else Dataset.from_arrays(*(arrays[key] for key in KEYS))
    assert str(error.value).startswith("mine: " if saved else "arrays: ")
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_array_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, **{name: array for name, array in GOOD.items() if name != key})
    with pytest.raises(DataError, match=f"{path} has no array {key}; it holds "):
        open_dataset(str(path))


@pytest.mark.parametrize(
    ("file", "label", "words"),
    [
        ("", None, "there is no such file or directory; choose digits, "),
        ("mydata.py", None, "of a Python file, name a function that returns the data: --data mydata:FUNCTION"),
        ("mine.txt", None, "text and tokens need --context T, .*; a table must end in .csv or .tsv"),
        ("mine.txt", "y", "the name of a table must end in .csv, .tsv, .parquet; rename the file"),
        ("mine.csv.gz", "y", "unpack it first; mine.csv is read as it is"),
        ("mine.npy", None, "a single array has no labels: put x_train.npy and y_train.npy into a directory"),
        ("mine.mat", None, "this format is read by a function of yours: --data mydata:load"),
        ("mine/cats/1.JPG", None, "it holds cats/1.JPG, ...; images are read by a function of yours"),
        ("mine/2020.csv", None, "it holds 2020.csv, ...; choose digits, "),
    ],
)
def test_a_data_set_of_unknown_kind(tmp_path: Path, file: str, label: str | None, words: str) -> None:
    path = tmp_path / file if file else tmp_path / "digit"
    path.parent.mkdir(parents=True, exist_ok=True)
    if file:
        path.write_bytes(b"a")
    spec = tmp_path / (file.partition("/")[0] or "digit")
    with pytest.raises(DataError, match=f"--data {spec}: {words}"):
        open_dataset(str(spec), Options(label=label))


def test_functions_that_give_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["five = 5", "def of(name): pass", "def number(): return 5", "def file(): open('/nowhere/file')"]
    (tmp_path / "rows_of_a_test.py").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, kind, words in (
        ("five", ConfigError, "five: must be a function, but is int; it is called with ()"),
        ("of", ConfigError, "of(name): missing a required argument: 'name'; it is called with ()"),
        ("number", DataError, f"number: must return {WANTED}, but returns int"),
        ("file", DataError, "file: [Errno 2] No such file or directory: '/nowhere/file'"),
    ):
        with pytest.raises(kind) as error:
            open_dataset(f"rows_of_a_test:{name}")
        assert str(error.value) == f"--data rows_of_a_test:{words}"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_gives_what_was_saved(tmp_path: Path, save) -> None:
    save(tmp_path / "mine.npz", **GOOD)
    data = open_dataset(str(tmp_path / "mine.npz"))
    assert (data.name, len(data.train), len(data.test), data.classification) == ("mine", 6, 2, True)
    for split, which in ((data.train, "train"), (data.test, "test")):
        for column in ("x", "y"):
            rows = getattr(split, column)
            rows.hold(np.arange(len(split)))
            np.testing.assert_array_equal(rows.rows(np.arange(len(split))), GOOD[f"{column}_{which}"])


@pytest.mark.parametrize(
    ("x", "y", "tokens", "ignored"),
    [
        (np.zeros((6, 9), int), np.zeros((6, 9), int), True, -1),
        (np.zeros((6, 9)), np.zeros((6, 9), int), False, -1),  # rows of numbers, each with a class
        (np.zeros((6, 9), np.uint8), np.zeros((6, 4), int), False, -1),
        (np.zeros((6, 9, 9), np.uint8), np.zeros((6, 9, 9), np.uint8), False, -1),  # images and masks
        (np.zeros((6, 1), int), np.zeros((6, 1), int), False, None),
        (np.zeros((6, 9), np.uint8), np.zeros((6, 1), int), False, None),
        (np.zeros((6, 9), int), np.zeros(6, int), False, None),
        (np.zeros((6, 9), int), np.zeros((6, 9)), False, None),
    ],
)
def test_what_are_tokens_and_where_minus_one_is_no_label(
    x: np.ndarray, y: np.ndarray, tokens: bool, ignored: int | None
) -> None:
    data = Dataset.from_arrays(x, y, x, y)
    assert (data.language_model, data.ignored(None), data.ignored(7)) == (tokens, ignored, 7)


def test_labels_as_values_and_as_probabilities_leave_the_fingerprint() -> None:
    data = Dataset.from_arrays(*(GOOD[key] for key in KEYS), w_train=np.ones(6))
    for other in (data.with_values(), data.with_probabilities()):
        assert not other.classification
        assert other.fingerprint == data.fingerprint
        assert other.train.w is data.train.w
        np.testing.assert_array_equal(other.test.y.rows(np.arange(2)), [1.0, 0.0])
    assert data.with_values().with_values().train.y.source is data.train.y
    assert [name for name, _ in data.fingerprint] == ["x_train", "y_train", "w_train", "x_test", "y_test"]
    heavy = Dataset.from_arrays(*(GOOD[key] for key in KEYS), w_train=np.full(6, 2.0))
    assert heavy.fingerprint != data.fingerprint


def test_weights_are_one_a_row() -> None:
    for weights in (np.arange(6), np.arange(6.0)[:, None]):
        data = Dataset.from_arrays(*(GOOD[key] for key in KEYS), w_train=weights)
        batch = Batch(0, 2, data.train, lambda: np.array([4, 1]), "float32", lambda x, y: (x, y))
        assert batch.w().dtype == np.float32
        np.testing.assert_array_equal(batch.w(), [4, 1])
        assert Batch(0, 2, data.test, lambda: np.arange(2), "float32").w() is None
    for weights, words in ((np.ones(5), "x_train has 6 rows, but w_train has 5"), (np.ones((6, 2)), "are \\(2,\\)")):
        with pytest.raises(DataError, match=words):
            Dataset.from_arrays(*(GOOD[key] for key in KEYS), w_train=weights)


@pytest.mark.parametrize(("dtype", "classes"), [("int32", True), ("uint8", True), ("bool", True), ("float32", False)])
def test_labels_say_what_is_learned(dtype: str, classes: bool) -> None:
    arrays = GOOD | {key: GOOD[key].astype(dtype) for key in ("y_train", "y_test")}
    assert Dataset.from_arrays(*(arrays[key] for key in KEYS)).classification is classes


def test_digits_are_what_their_description_says() -> None:
    data = open_dataset("digits")
    assert (data.name, data.classification) == ("digits", True)
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.train.x.shape == (8, 8)
    for split in (data.train, data.test):
        split.x.hold(np.arange(len(split)))
        split.y.hold(np.arange(len(split)))
        x, y = split.x.rows(np.arange(len(split))), split.y.rows(np.arange(len(split)))
        assert set(y.tolist()) == set(range(10))
        assert (x.min(), x.max()) == (0, 1)
        assert np.array_equal(x * 16, np.round(x * 16))


def test_digits_are_small_and_say_whose_they_are() -> None:
    assert DIGITS.stat().st_size < 100_000
    about = Path(mpiml.data.__file__).with_name("DIGITS.txt").read_text()
    for word in ("Alpaydin", "Kaynak", "UCI", "10.24432/C50P49", "CC BY 4.0", "Changes made"):
        assert word in about


@pytest.mark.parametrize("kind", ["npy", "npz", "tokens"])
def test_a_mapped_file_that_is_cut_short_is_an_error_and_no_crash(tmp_path: Path, kind: str) -> None:
    values, path = np.arange(40_000).reshape(-1, 4), tmp_path / "x_train.npy"
    arrays = dict.fromkeys(KEYS, values) | dict.fromkeys(("y_train", "y_test"), values[:, 0])
    if kind == "npz":
        np.savez(path := tmp_path / "d.npz", **arrays)
    for key, array in arrays.items() if kind == "npy" else ():
        np.save(tmp_path / f"{key}.npy", array)
    if kind == "tokens":
        (path := tmp_path / "t.bin").write_bytes(values.astype("<u2").tobytes())
    spec, options = str(tmp_path if kind == "npy" else path), Options(context=4 if kind == "tokens" else None)
    source = open_dataset(spec, options).train.x
    assert len(source.rows(np.arange(10))) == 10
    os.truncate(path, path.stat().st_size // 8)
    with pytest.raises(DataError, match=rf"{path.name}.* was cut short while it was read: it holds [\d,]+ of"):
        source.rows(np.arange(len(source) - 10, len(source)))


def test_stored_archive_is_compared_with_its_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {key: np.zeros((500, 4)) if key[0] == "x" else np.zeros(500) for key in KEYS}
    np.savez(tmp_path / "d.npz", **arrays)
    data = open_dataset(str(tmp_path / "d.npz"))
    data.check()
    raw = bytearray((tmp_path / "d.npz").read_bytes())
    raw[9_000] ^= 1  # a value of x_train
    (tmp_path / "d.npz").write_bytes(raw)
    with pytest.raises(DataError, match=r"d.npz: x_train: damaged: Bad CRC-32"):
        data.check()
    monkeypatch.setattr(npy, "CHECKED", 8 * 500)
    data.check()


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_labels_that_are_ignored_are_minus_one_to_losses_and_metrics(dtype: str) -> None:
    """One's own among them."""
    y = np.array([[3, 255], [0, 1], [255, 255]], dtype)
    given = Split(source(np.zeros((3, 4))), source(y))
    split = given.ignoring(255)
    batch = Batch(0, 3, split, lambda: np.array([2, 0, 1]), np.float32)
    np.testing.assert_array_equal(batch.y(), [[-1, -1], [3, -1], [0, 1]])
    assert batch.y().dtype == np.intp
    assert in_memory(split)
    assert (len(split), split.y.shape, y.max()) == (3, (2,), 255)
    assert given.ignoring(None) is given.ignoring(-1) is given  # nothing to be done


@pytest.mark.parametrize(
    ("y", "said", "ignored"),
    [
        (np.zeros((4, 3), int), None, -1),
        (np.zeros((4, 3), int), 255, 255),
        (np.zeros(4, int), None, None),
        (np.zeros(4, int), -1, -1),
        (np.zeros((4, 3)), None, None),
    ],
)
def test_minus_one_is_no_label_where_a_row_has_several(y: np.ndarray, said: int | None, ignored: int | None) -> None:
    assert Dataset.from_arrays(np.zeros((4, 2)), y, np.zeros((4, 2)), y).ignored(said) == ignored


def test_a_function_gives_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["from mpiml.data.dataset import Dataset", "import numpy as np", "x = np.eye(4)"]
    lines += ["def mine(): return Dataset.from_arrays(x, [0, 1, 0, 1], x, [0, 1, 0, 1])", "def other(): return x"]
    (tmp_path / "my_rows.py").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert len(open_dataset("my_rows:mine").train) == 4
    with pytest.raises(DataError, match=r"my_rows:other: must return a Dataset, .* but returns ndarray"):
        open_dataset("my_rows:other")
    with pytest.raises(ConfigError, match="my_rows:none: module 'my_rows' has no attribute 'none'"):
        open_dataset("my_rows:none")
    with pytest.raises(ConfigError, match="no_rows:mine: no module no_rows"):
        open_dataset("no_rows:mine")
    (tmp_path / "needs_more.py").write_text("import no_such_thing\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):  # with a traceback: it is the module's own mistake
        open_dataset("needs_more:mine")


def test_a_copy_with_changes_is_known_by_the_same_fingerprint() -> None:
    """And so is a copy of the copy, whichever fingerprint is asked for first."""
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6) % 3
    data = Dataset.from_arrays(x, y, x, y)
    other = data.replace(train=data.train.subset(np.arange(3)))
    assert other.replace(name="third").fingerprint == other.fingerprint == data.fingerprint
    assert Dataset.from_arrays(x[:3], y[:3], x, y).fingerprint != data.fingerprint

"""What a function for --data may return, and a program may pass in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mpiml.data.dataset import Dataset, Split
from mpiml.data.formats import Options
from mpiml.data.objects import dataset_of
from mpiml.data.sources import ArraySource
from mpiml.errors import DataError

X, Y = np.arange(12.0).reshape(6, 2), np.arange(6) % 2
TESTS = Options(tests_only=True)


class Rows:
    def __init__(self, *columns: Any):
        self.columns = columns

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return tuple(column[index] for column in self.columns)


class Stream:
    def __iter__(self) -> Iterator[Any]:
        yield X[0], Y[0]


class IterableDataset(Rows):
    """PyTorch's has [number] as well, which raises."""

    def __iter__(self) -> Iterator[Any]:
        yield X[0], Y[0]


class Loader(Stream):
    dataset = Rows(X, Y)

    def __len__(self) -> int:
        return 3


class DatasetDict(dict[str, Any]):
    """As Hugging Face's."""


def made(what: Any, options: Options = Options()) -> Dataset:  # noqa: B008
    return dataset_of(what, "--data f: must return", options)


TWO = Dataset.from_arrays(X, Y, X[:2], Y[:2])
ROWS = Rows(X, Y)


@pytest.mark.parametrize(
    ("what", "train", "test"),
    [
        (TWO, 6, 2),
        (Dataset.from_arrays(X, Y), 6, 0),
        ((ROWS, ROWS), 6, 6),
        ([ROWS, ROWS], 6, 6),
        (ROWS, 6, 0),
        ([(x, y) for x, y in zip(X, Y, strict=True)], 6, 0),
        ([[x, y] for x, y in zip(X, Y, strict=True)], 6, 0),
        (([[x, y] for x, y in zip(X, Y, strict=True)], ROWS), 6, 6),
        (DatasetDict(train=ROWS, test=ROWS), 6, 6),
        (DatasetDict(train=ROWS, validation=ROWS), 6, 6),
        ({"train": ROWS}, 6, 0),
        ({"x_train": X, "y_train": Y}, 6, 0),
        ({"X_train": X, "Y_train": Y, "x_test": X[:2], "y_test": Y[:2]}, 6, 2),
        ({"x": {"a": X, "b": X}, "y": Y}, 6, 0),
        (((X, Y), (X[:2], Y[:2])), 6, 2),
    ],
)
def test_data_sets_of_many_kinds(what: Any, train: int, test: int) -> None:
    data = made(what)
    assert (len(data.train), len(data.test)) == (train, test)
    np.testing.assert_array_equal(data.train.y.rows(np.arange(6)), Y)


@pytest.mark.parametrize(
    ("what", "rows", "labelled"),
    [
        (TWO, 2, True),
        (ROWS, 6, True),
        (Rows(X), 6, False),
        ((Rows(X), ROWS), 6, True),
        ({"test": Rows(X)}, 6, False),
        ({"x_test": X, "x_train": X}, 6, False),
        ({"x": X, "y": Y}, 6, True),
        (X, 6, False),
    ],
)
def test_rows_to_test_on_alone(what: Any, rows: int, labelled: bool) -> None:
    data = made(what, TESTS)
    assert (len(data.test), data.test.labelled) == (rows, labelled)
    np.testing.assert_array_equal(data.test.x.rows(np.arange(rows)), X[:rows])


WANTED = "--data f: must return a Dataset, a dict of arrays x_train, y_train and so on, or one or two data sets"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (5, f"{WANTED} .*, but returns int"),
        (None, f"{WANTED} .*, but returns NoneType"),
        ("rows", f"{WANTED} .*, but returns str"),
        (X, f"{WANTED} .*, but returns ndarray"),
        ((X, Y), f"{WANTED} .*, but returns a tuple of ndarray, ndarray"),
        ({"train": X}, f"{WANTED} .*, but returns ndarray"),
        ([ROWS] * 3, "--data f: must return one data set, or two, to train on and to test on, but there are 3"),
        ({1, 2}, f"{WANTED} .*, but returns set"),
        ({"images": X}, "--data f has no array x_train or y_train; it holds images"),
        ({}, "--data f has no array x_train or y_train; it holds nothing"),
        ({"test": ROWS}, "--data f: there are no rows to train on; it holds test"),
        (Stream(), "--data f returns a stream, Stream, whose rows have no numbers, .*; give a data set with len and"),
        ((Stream(), Stream()), "--data f returns a stream, Stream, "),
        (IterableDataset(X, Y), "--data f returns a stream, IterableDataset, "),
        ({"train": iter([])}, "--data f returns a stream, list_iterator, "),
        (Loader(), r"--data f returns a stream, Loader, .* \(of a DataLoader, its .dataset\)"),
    ],
)
def test_anything_else_is_one_line(what: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"^{words}") as error:
        made(what)
    assert "\n" not in str(error.value)


def test_test_rows_that_are_wanted_must_be_there() -> None:
    for what in (Dataset.from_arrays(X, Y), {"train": ROWS}):
        with pytest.raises(DataError, match="--data f: there are no test rows"):
            made(what, TESTS)
    with pytest.raises(DataError, match="has no array x_test or x; it holds x_train"):
        made({"x_train": X}, TESTS)


def test_names_of_arrays_are_told_by_the_map() -> None:
    data = made({"images": X, "kinds": Y}, Options(arrays={"x_train": "images", "y_train": "kinds"}))
    np.testing.assert_array_equal(data.train.x.rows(np.arange(6)), X)


def test_what_items_draw_is_said_and_changed_items_have_another_fingerprint() -> None:
    class Noisy(Rows):
        def __getitem__(self, index: int) -> Any:
            return X[index] + np.random.normal(), Y[index]

    (note,) = made(Noisy()).notes
    assert note.startswith("x_train: items draw from the generators of NumPy: a row gets the same random numbers in ")
    assert list(made(ROWS).notes) == []
    assert made(ROWS).fingerprint == made(Rows(X, Y)).fingerprint != made(Rows(X + 1, Y)).fingerprint


def test_from_arrays_takes_both_test_arrays_or_neither() -> None:
    with pytest.raises(DataError, match="x_test and y_test must both be given, or neither"):
        Dataset.from_arrays(X, Y, X)
    data = Dataset.from_arrays(X, Y, X, Y, w_train=Y, w_test=Y)
    assert data.train.w is not None
    assert data.test.w is not None
    assert Dataset(Split(ArraySource(X), ArraySource(Y))).test.w is None

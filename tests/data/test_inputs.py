"""Several inputs of a row: packed into one flat row and back, in any kind of data set."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.data.batch import Batch
from mpiml.data.dataset import Dataset, Split
from mpiml.data.inputs import inputs_of, pack, shapes, source_of, unpack
from mpiml.data.inspection import inspect
from mpiml.data.sources import ArraySource
from mpiml.errors import DataError

IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 3, 2, 2)
NUMBERS = np.linspace(0, 1, 8, dtype=np.float32).reshape(4, 2)
MASK = np.array([True, False, True, True])
Y = np.array([0, 1, 0, 1])


def test_a_dict_is_packed_in_the_order_of_its_names() -> None:
    source = source_of({"numbers": NUMBERS, "image": IMAGE, "mask": MASK}, "x")
    assert (len(source), source.shape, source.dtype) == (4, (15,), np.float32)
    inputs = inputs_of(source)
    assert inputs == (("image", (3, 2, 2), "u"), ("mask", (), "b"), ("numbers", (2,), "f"))
    assert shapes(inputs) == {"image": (3, 2, 2), "mask": (), "numbers": (2,)}
    rows = np.array([2, 0])
    parts = unpack(source.rows(rows), inputs)
    for name, array in (("image", IMAGE), ("mask", MASK), ("numbers", NUMBERS)):
        np.testing.assert_array_equal(parts[name], array[rows])
    np.testing.assert_array_equal(pack(parts, inputs, 2, "f"), source.rows(rows))


def test_a_tuple_keeps_its_order_and_integers_stay_integers() -> None:
    source = source_of((IMAGE, ArraySource(Y)), "x")
    inputs = inputs_of(source)
    assert inputs is not None
    assert (source.dtype.kind, shapes(inputs)) == ("i", ((3, 2, 2), ()))
    image, y = unpack(source.rows(np.arange(4)), inputs)
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(pack((image, y), inputs, 4, "f"), source.rows(np.arange(4)))


@pytest.mark.parametrize("one", [IMAGE, IMAGE.tolist(), (1.0, 2.0, 3.0)])
def test_one_input_stays_one(one: object) -> None:
    assert inputs_of(source_of(one, "x")) is None


def test_splits_of_a_dict_or_a_tuple_of_sources() -> None:
    for x in ({"a": ArraySource(IMAGE), "b": ArraySource(NUMBERS)}, (ArraySource(IMAGE), ArraySource(NUMBERS))):
        split = Split(x, ArraySource(Y))  # type: ignore[arg-type]
        assert split.x.shape == (14,)
        assert Dataset(split).with_tests(0.5, 0, said=False, evaluated=True).test.x.shape == (14,)


def test_two_dicts_filled_in_another_order_are_of_one_kind() -> None:
    first, second = {"a": IMAGE, "b": NUMBERS}, {"b": NUMBERS, "a": IMAGE}
    data = Dataset.from_arrays(first, Y, second, Y)
    np.testing.assert_array_equal(data.train.x.rows(np.arange(4)), data.test.x.rows(np.arange(4)))
    other = Dataset.from_arrays({"a": IMAGE, "b": NUMBERS + 1}, Y, second, Y)
    texts = [dict(map(tuple, one.fingerprint)) for one in (data, other)]
    assert texts[0]["x_test"] == texts[1]["x_test"]
    assert texts[0]["x_train"] != texts[1]["x_train"]


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ({"a": IMAGE, "b": NUMBERS[:3]}, None, "x_train: b has 3 rows, but x_train: a 4"),
        ({1: IMAGE}, None, "several inputs are a dict of names and arrays, but its keys are [1]"),
        ({}, None, "its keys are []"),
        ([IMAGE, NUMBERS], None, "x_train: no array can be made of this list ("),
        ({"a": np.array(["x"] * 4), "b": IMAGE}, None, "x_train: a has dtype <U1; real numbers are needed"),
        (
            {"a": NUMBERS, "b": MASK},
            {"a": NUMBERS, "c": MASK},
            "x_train and x_test have inputs of other names or kinds",
        ),
        ((NUMBERS, MASK), np.zeros((4, 3)), "inputs of other names or kinds"),
    ],
)
def test_inputs_that_do_not_fit_are_one_line(train: object, test: object, words: str) -> None:
    with pytest.raises(DataError) as error:
        Dataset.from_arrays(train, Y, test, None if test is None else Y)
    assert words in str(error.value)


def test_a_look_shows_the_highest_integer_of_each() -> None:
    source = source_of({"a": IMAGE, "b": NUMBERS, "c": MASK, "d": -Y}, "x")
    assert [inspect(source, np.arange(rows)).bounds for rows in (4, 1, 0)] == [
        (0, 47, 0, 0, 0, 0, -1, 0),
        (0, 11, 0, 0, 0, 0, 0, 0),
        (),
    ]
    parts = [inspect(source, np.arange(*rows)) for rows in ((0, 2), (2, 4), (0, 0))]
    assert (parts[0] | parts[1] | parts[2]).bounds == (parts[2] | parts[1]).bounds == (0, 47, 0, 0, 0, 0, -1, 0)


def test_a_transform_gets_inputs_by_name_and_gives_them_back() -> None:
    split = Split(source_of({"a": NUMBERS, "b": MASK}, "x"), ArraySource(Y))

    def batch(transform) -> Batch:
        return Batch(0, 2, split, lambda: np.array([1, 3]), "float32", transform)

    x = batch(lambda x, y: ({"b": x["b"], "a": x["a"] + 1}, y)).x()
    np.testing.assert_array_equal(x, np.column_stack([NUMBERS[[1, 3]] + 1, MASK[[1, 3]]]))
    for wrong, words in (
        (lambda x, y: ({"a": x["a"]}, y), "--transform gave x of shapes a dict; {'a': (2, 2), 'b': (2,)} is needed"),
        (lambda x, y: ({"a": x["a"][:, :1], "b": x["b"]}, y), "gave x of shapes {'a': (2, 1), 'b': (2,)}"),
        (lambda x, y: (x["a"], y), "gave x of shapes a ndarray"),
    ):
        with pytest.raises(DataError) as error:
            batch(wrong).x()
        assert words in str(error.value)

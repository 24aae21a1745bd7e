"""Rows that are items of an object: what they may be, how often they are made, and what they draw."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpiml.data import items as module
from mpiml.data.dataset import Dataset, Split
from mpiml.data.inputs import shapes
from mpiml.data.items import Items
from mpiml.data.prefetch import steps_ahead
from mpiml.data.shards import Shards
from mpiml.errors import DataError


class Rows:
    """Items of a function; the numbers of those that were asked for are kept."""

    def __init__(self, item: Callable[[int], Any], length: int = 9):
        self.item, self.length, self.made = item, length, list[int]()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        self.made.append(index)
        return self.item(index)


class Tensor:
    """What np.asarray makes an array of, as it does of PyTorch's tensors on the CPU and of images."""

    def __init__(self, *values: float):
        self.values = values

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        return np.array(self.values)


def of(item: Callable[[int], Any], labelled: bool = True) -> Items:
    return Items(Rows(item), "train", labelled, seed=3)


ALL = np.arange(9)
KINDS: dict[str, Callable[[int], Any]] = {
    "pair": lambda i: (np.full(2, i), i % 3),
    "list": lambda i: [[float(i), 0.0], i],
    "tensors": lambda i: (Tensor(i, 1), Tensor(i)),
    "dict": lambda i: {"pixels": [i, i], "labels": i},
    "target": lambda i: {"target": i, "x": (i, 1.5)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_input_and_a_label(kind: str) -> None:
    items = of(KINDS[kind])
    assert (items.inputs, items.x.shape, len(items.x), items.x.name) == (None, (2,), 9, "x_train")
    assert items.y is not None
    assert items.x.rows(ALL)[4, 0] == 4
    assert len(items.y.rows(ALL)) == 9


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (lambda i: {"label": 1, "b": np.float32(i), "a": np.full((2, 2), i)}, {"a": (2, 2), "b": ()}),
        (lambda i: ({"b": np.float32(i), "a": np.full((2, 2), i)}, 1), {"a": (2, 2), "b": ()}),
        (lambda i: ((np.full((2, 2), i), np.float32(i)), 1), ((2, 2), ())),
    ],
)
def test_several_inputs(item: Callable[[int], Any], expected: Any) -> None:
    items = of(item)
    assert items.inputs is not None
    assert (shapes(items.inputs), items.x.shape) == (expected, (5,))
    np.testing.assert_array_equal(items.x.rows(np.array([7, 2])), [[7] * 5, [2] * 5])


def test_items_without_labels_where_none_are_needed() -> None:
    for item in (lambda i: np.arange(3), lambda i: (np.arange(3),), lambda i: {"x": [1, 2, 3]}):
        items = of(item, labelled=False)
        assert (items.y, items.x.shape) == (None, (3,))
    assert of(KINDS["pair"], labelled=False).y is not None


def late(good: Any, bad: Any) -> Callable[[int], Any]:
    return lambda i: bad if i == 5 else good


def broken(i: int) -> Any:
    if i == 5:
        raise OSError("image file\nis truncated")
    return [i], i


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (lambda i: [1, 2, 3], "row 0 is a list of 3, but must be (x, y), or a dict with a label; several inputs"),
        (lambda i: np.zeros(3), "row 0 is a ndarray, but must be (x, y)"),
        (
            lambda i: {"image": [1], "class": 1},
            "row 0 is a dict of image, class; one entry must be the label, na",
        ),
        (lambda i: {"label": 0, "y": 1, "x": 2}, "row 0 is a dict of label, y, x; one entry must be the label"),
        (
            lambda i: {"label": 0},
            "row 0 is a dict of label; one entry must be the label, named label or lab",
        ),
        (lambda i: ("words", 1), "row 0 is a str, not numbers"),
        (lambda i: {"x": [1], "id": "a", "y": 1}, "row 0: id is a str, not numbers; leave it out"),
        (lambda i: ([1], "cat"), "row 0: its label is a str, not numbers"),
        (lambda i: ([[1], [1, 2]], 0), "row 0 is a list of which no array can be made: "),
        (late(([1.0], 1), ([1.0, 2.0], 1)), "row 5 is x (2,) float64, label () int64, but row 0 is x (1,) float64"),
        (late(([1], 1), ([0.5], 1)), "row 5 is x (1,) float64, label () int64, but row 0 is x (1,) int64"),
        (late({"a": 1, "b": 2, "y": 0}, {"a": 1, "c": 2, "y": 0}), "row 5 is a () int64, c () int64, label"),
        (broken, "row 5: OSError: image file is truncated"),
    ],
)
def test_what_is_no_row_is_one_line_that_names_it(item: Callable[[int], Any], words: str) -> None:
    with pytest.raises(DataError) as error:
        of(item).x.rows(ALL)
    assert str(error.value).startswith(f"x_train: {words}")
    assert "\n" not in str(error.value)


def test_no_items() -> None:
    with pytest.raises(DataError, match="x_test has no rows"):
        Items([], "test", True, 0)


def test_an_item_is_made_once_for_its_inputs_and_its_label() -> None:
    rows = Rows(KINDS["pair"])
    items = Items(rows, "train", True, 0)
    rows.made.clear()
    assert items.y
    items.x.rows(ALL)
    items.y.rows(ALL[::-1])
    assert rows.made == ALL.tolist()


def test_labels_that_are_kept_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 3 * 8)
    rows = Rows(KINDS["pair"])
    items = Items(rows, "train", True, 0)
    assert items.y
    items.x.rows(ALL)
    rows.made.clear()
    np.testing.assert_array_equal(items.y.rows(ALL), ALL % 3)
    assert rows.made == [0, 1, 2, 3, 4, 5]


def drawing(i: int) -> Any:
    return np.random.normal(i, 0.1, 2) + random.random(), i % 2


def test_what_is_drawn_is_a_function_of_seed_and_row() -> None:
    state = np.random.get_state()[1].tolist()  # type: ignore[index]
    items, again, other = Items(Rows(drawing), "train", True, 3), of(drawing), Items(Rows(drawing), "train", True, 4)
    assert items.draws == {"NumPy", "Python"}
    first = items.x.rows(ALL)
    np.testing.assert_array_equal(again.x.rows(ALL[::-1]), first[::-1])
    np.testing.assert_array_equal(items.x.rows(ALL), first)
    assert (other.x.rows(ALL) != first).all()
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index]
    assert of(KINDS["pair"]).draws == frozenset()


def test_rows_that_draw_are_not_read_ahead() -> None:
    for item, expected in ((drawing, 0), (KINDS["pair"], 4)):
        items = of(item)
        assert items.y
        train = Dataset(Split(items.x, items.y)).with_tests(0.3, 0, said=False, evaluated=True).train
        assert steps_ahead(Shards(train, 2, 4, 0, 0, 2, "float32"), asked=4) == expected


def test_a_generator_of_ones_own_is_refused() -> None:
    own = np.random.default_rng(0)
    with pytest.raises(DataError, match=r"x_train: row 0 is another one when it is asked for again: .* --transform"):
        of(lambda i: (own.normal(size=2), 1))


def test_one_thread_at_a_time_makes_items() -> None:
    inside, most = 0, 0

    def item(i: int) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.001)
        inside -= 1
        return [i], i

    pair = of(item), of(item)
    threads = [threading.Thread(target=items.x.rows, args=(ALL,)) for items in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1

"""What a batch gives: rows in the dtype of the run, transformed if that is wanted."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.data.batch import Batch
from mpiml.data.dataset import Split
from mpiml.data.sources import ArraySource
from mpiml.errors import DataError


@pytest.mark.parametrize(
    ("labels", "expected", "kind"),
    [(np.array([3, 1], np.uint8), [3, 1], np.intp), (np.array([0.5, 1.5]), [0.5, 1.5], np.float32)],
)
def test_a_batch_is_in_the_dtype_of_the_run(labels: np.ndarray, expected: list, kind: type) -> None:
    batch = Batch(0, 2, Split(ArraySource([[1], [0]]), ArraySource(labels)), lambda: np.arange(2), "float32")
    assert batch.x().dtype == np.float32
    assert batch.y().dtype == kind
    np.testing.assert_array_equal(batch.y(), expected)


def test_rows_are_chosen_once() -> None:
    chosen = []

    def select() -> np.ndarray:
        chosen.append(1)
        return np.array([1])

    column = ArraySource(np.array([2.0, 3.0]))
    batch = Batch(0, 1, Split(column, column, column), select, "float32")
    assert (batch.x(), batch.y(), batch.w()) == (3.0, 3.0, 3.0)
    assert chosen == [1]


def test_a_transform_is_called_once_for_both_and_must_give_rows_as_before() -> None:
    calls = []

    def double(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, list[int]]:
        calls.append((x.dtype, y.dtype))
        return x * 2.0, [int(label) + 1 for label in y]

    split = Split(ArraySource(np.arange(6, dtype=np.uint8).reshape(3, 2)), ArraySource([4, 5, 6]))
    batch = Batch(0, 2, split, lambda: np.array([2, 0]), "float32", double)
    np.testing.assert_array_equal(batch.x(), np.array([[8, 10], [0, 2]], np.float32))
    np.testing.assert_array_equal(batch.y(), [7, 5])
    assert (batch.x().dtype, batch.y().dtype) == (np.float32, np.intp)
    assert calls == [(np.float32, np.intp)]
    for wrong, words in (
        (lambda x, y: (x[:1], y), r"x of shape \(1, 2\); \(2, 2\) is needed"),
        (lambda x, y: (x, y[:, None]), r"y of shape \(2, 1\); \(2,\) is needed"),
    ):
        with pytest.raises(DataError, match=words):
            Batch(0, 2, split, lambda: np.array([2, 0]), "float32", wrong).x()

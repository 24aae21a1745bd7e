"""Formats: each gives the rows that were saved, to every rank its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.data.dataset import Dataset, open_dataset
from mpiml.data.formats import KEYS
from tests.data.samples import FORMATS, OPTIONS, TEST, TRAIN, values

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
@pytest.mark.parametrize("held", [np.arange(5, 9), np.arange(1, 23, 4), np.array([3]), np.arange(0)])
def test_a_rank_may_hold_any_rows(tmp_path: Path, name: str, held: np.ndarray) -> None:
    data = open_dataset(str(FORMATS[name](tmp_path)), OPTIONS)
    for key in ("x_train", "y_train"):
        source = columns(data)[key]
        source.hold(held)
        np.testing.assert_array_equal(source.rows(held[::-1]), values(name, key)[held[::-1]])


@pytest.mark.parametrize("name", ["compressed_npz", "gzipped_idx", "csv", "parquet"])
def test_a_row_that_is_not_held_is_refused(tmp_path: Path, name: str) -> None:
    source = open_dataset(str(FORMATS[name](tmp_path)), OPTIONS).train.x
    for wrong in (4, 6, 0, 22):
        with pytest.raises(IndexError, match=f"row {wrong} is not one of the rows that are held"):
            source.rows(np.array([wrong]))
        source.hold(np.array([3, 5, 9]))
    np.testing.assert_array_equal(source.rows(np.array([9, 3])), values(name, "x_train")[[9, 3]])

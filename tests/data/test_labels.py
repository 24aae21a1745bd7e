"""Labels that are values although they are stored as integers, labels from 0 to 1, and weights of rows."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.data.labels import ProbabilitySource, ValueSource, WeightSource
from mpiml.data.sources import ArraySource
from mpiml.data.subsets import Subset
from mpiml.errors import DataError


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int32", "int64", "float32"])
def test_values_hold_every_integer(dtype: str) -> None:
    kind = np.dtype(dtype)
    ends = (
        [0, 1] if dtype == "bool" else [0, 1 << 20] if kind.itemsize == 8 or kind.kind == "f" else np.iinfo(dtype).max
    )
    labels = np.array(np.atleast_1d(ends), dtype)
    values = ValueSource(ArraySource(labels)).rows(np.arange(len(labels)))
    assert values.dtype.kind == "f"
    assert values.tolist() == labels.tolist()


@pytest.mark.parametrize("wrong", [2, -1, 1.001, np.nan])
def test_labels_from_0_to_1_and_no_others(wrong: float) -> None:
    labels = np.array([[0, 1], [0.5, 1], [1, wrong], [wrong, 0]])
    source = ProbabilitySource(ArraySource(labels, "y_train"))
    np.testing.assert_array_equal(source.rows(np.array([1, 0])), [[0.5, 1], [0, 1]])
    with pytest.raises(DataError) as error:
        source.rows(np.array([0, 2, 3]))
    assert str(error.value) == f"y_train: label {wrong:g} is not from 0 to 1, in row 2"
    with pytest.raises(DataError, match=r"in row 2$"):  # of the file, where row 1 is held out
        ProbabilitySource(Subset(ArraySource(labels, "y_train"), np.array([0, 2]))).rows(np.array([1]))


@pytest.mark.parametrize("wrong", [-0.5, np.inf, np.nan])
def test_weights_are_finite_and_not_negative(wrong: float) -> None:
    source = WeightSource(ArraySource(np.array([[0], [2], [wrong]]), "w_train"))
    np.testing.assert_array_equal(source.rows(np.array([1, 0])), [2, 0])
    with pytest.raises(DataError) as error:
        source.rows(np.array([1, 2]))
    assert str(error.value) == f"w_train: weight {wrong:g} is not a finite number of at least 0, in row 2"

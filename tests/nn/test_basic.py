"""Linear, dropout: values by hand, and masks that are a function of their place in the run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mpiml.nn import layers as nn
from mpiml.nn.layers import (
    At,
    Dropout,
    Linear,
)
from tests.nn.cases import AT


def test_linear_by_hand() -> None:
    layer = Linear(2, 3)
    layer.weight.value, layer.bias.value = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), np.array([10.0, 20.0, 30.0])
    np.testing.assert_array_equal(layer(np.array([[1.0, 10.0]]), AT)[0], [[51, 72, 93]])


def dropped(at: At = AT, path: str = "layers.0", rate: float = 0.3, rows: int = 400) -> np.ndarray:
    layer = Dropout(rate)
    layer.path = path
    return layer(np.ones((rows, 50)), at)[0]


def test_dropout_is_a_function_of_its_place_in_the_run() -> None:
    np.testing.assert_array_equal(dropped(), dropped())
    others = [dropped(dataclasses.replace(AT, **{key: 9})) for key in ("seed", "step", "microbatch")]
    for other in [*others, dropped(path="layers.1")]:
        assert 0.3 < np.mean(other != dropped()) < 0.5  # independent masks differ in 2 x 0.3 x 0.7 = 0.42


def test_dropout_keeps_the_mean() -> None:
    y = dropped()
    assert set(np.unique(y)) == {0.0, 1 / 0.7}
    assert y.mean() == pytest.approx(1, abs=0.02)  # four standard deviations


def test_dropout_is_off_in_evaluation_and_at_rate_0() -> None:
    np.testing.assert_array_equal(dropped(nn.At(training=False)), np.ones((400, 50)))
    np.testing.assert_array_equal(dropped(rate=0.0), np.ones((400, 50)))


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_rate_is_a_probability_below_1(rate: float) -> None:
    with pytest.raises(ValueError, match="dropout rate"):
        Dropout(rate)

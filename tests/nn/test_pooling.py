"""Pooling: which of equal values gets the gradient."""

from __future__ import annotations

import numpy as np

from mpiml.nn.layers import (
    MaxPool2d,
)
from tests.nn.cases import AT


def test_equal_values_in_a_window_share_no_gradient() -> None:
    x = np.zeros((1, 2, 2, 1))
    x[0, 1, :] = 5
    _, backward = MaxPool2d()(x, AT)
    np.testing.assert_array_equal(backward(np.full((1, 1, 1, 1), 3.0), None)[0, :, :, 0], [[0, 0], [3, 0]])

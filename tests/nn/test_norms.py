"""Norms: as exact as float32 allows."""

from __future__ import annotations

import numpy as np

from mpiml.nn import layers as nn
from mpiml.nn.layers import (
    GroupNorm,
)
from mpiml.nn.parameters import Layout
from tests.nn.cases import AT


def test_group_norm_of_large_images_far_from_zero_is_as_exact_as_float32_allows() -> None:
    """Whose mean is 100 deviations: half a unit in the last place of an input is 4e-6 of a deviation."""
    x = np.random.default_rng(0).normal(100, 1, (1, 150, 150, 4)).astype(np.float32)
    (layer,) = layers = [GroupNorm(2, 4)]
    layout = Layout(nn.parameters(layers), "float32")
    layout.bind(layout.zeros())
    layer.gain.value[...] = 1
    exact = x.reshape(-1, 2, 2).astype(np.float64)
    exact = (exact - exact.mean(axis=(0, 2), keepdims=True)) / np.sqrt(exact.var(axis=(0, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(x, AT)[0], exact.reshape(x.shape), rtol=0, atol=1e-5)

"""Every layer as a PyTorch module computes what the layer does, in an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpiml.errors import ConfigError
from mpiml.nn import layers as nn
from mpiml.nn.parameters import Statistic
from tests.nn.cases import Bench, every_case

torch: Any = pytest.importorskip("torch")
from mpiml.nn.torch_equivalents import module_of, takes_ids  # noqa: E402 (needs PyTorch)


@every_case
def test_outputs_are_the_layers(case: str) -> None:
    bench = Bench(case)
    for parameter in bench.layout.parameters:
        if isinstance(parameter, Statistic):
            np.abs(parameter.value, out=parameter.value)  # a variance
    x = bench.rows(3)
    y, _ = bench.forward(x, nn.At(training=False))
    with torch.no_grad():
        theirs = module_of(bench.layers, bench.shape)(torch.from_numpy(x))
    np.testing.assert_allclose(theirs.numpy(), y, rtol=1e-11, atol=1e-11)
    assert takes_ids(bench.layers, bench.shape) == bench.tokens


def test_layers_that_are_computed_again_are_computed_once() -> None:
    layers = [nn.Recompute(nn.Linear(3, 3), nn.ReLU())]
    nn.name(layers)
    for parameter in nn.parameters(layers):
        parameter.value = np.full(parameter.shape, 0.5)
    module = module_of(layers, (3,))
    np.testing.assert_array_equal(module(torch.ones(1, 3, dtype=torch.float64)), [[2.0, 2.0, 2.0]])


def test_a_layer_of_ones_own_is_named() -> None:
    class Twice(nn.ReLU):
        pass

    layers = [nn.Residual(nn.Tanh(), Twice())]
    nn.name(layers)
    with pytest.raises(ConfigError, match=r"^layers\.0\.layers\.1, Twice, is a layer of your own, of which PyTorch"):
        module_of(layers, (3,))

"""A backward pass in two parts gives the same bits as a whole one, and leaves gradients by weights to its second."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.nn.deferred import DeferredGradients
from mpiml.nn.parameters import Gradients, Parameter
from tests.nn.cases import AT, CASES, GARBAGE, Bench


class Asked(DeferredGradients):
    """Notes whose gradients a layer asks for."""

    def __init__(self, gradients: Gradients):
        super().__init__(gradients)
        self.parameters: list[Parameter] = []

    def __getitem__(self, parameter: Parameter) -> np.ndarray:
        self.parameters.append(parameter)
        return super().__getitem__(parameter)


@pytest.mark.parametrize("case", CASES)
def test_deferred_gradients_are_the_same(case: str) -> None:
    bench = Bench(case)
    x = bench.rows(5)
    vectors = [np.full_like(bench.values, GARBAGE) for _ in range(2)]
    offsets: list[int] = []
    whole, parts = Gradients(bench.layout, vectors[0]), Gradients(bench.layout, vectors[1], offsets.append)
    y, backward = bench.forward(x, AT)
    dy = np.random.default_rng(9).standard_normal(y.shape)
    dx = backward(dy, whole)
    _, backward = bench.forward(x, AT)
    deferred = Asked(parts)
    split_dx = backward(dy, deferred)
    assert (vectors[1] == GARBAGE).all()
    assert not offsets
    assert not [p.name for p in deferred.parameters if len(p.shape) > 1]  # only vectors may be computed this early
    deferred.write()
    np.testing.assert_array_equal(split_dx, dx)
    np.testing.assert_array_equal(vectors[1], vectors[0])
    assert not bench.layout.parameters or offsets[-1] == 0

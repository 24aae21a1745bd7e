"""Layers in Recompute give the bits that they give without it, and keep nothing but their input."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from mpiml.errors import ConfigError
from mpiml.nn import base as nn
from mpiml.nn.layers import BatchNorm2d, Dropout, Flatten, Layer, Linear, Recompute, Residual, Tanh
from mpiml.nn.parameters import Gradients, Layout
from mpiml.nn.recompute import blocks, grouped, opened
from tests.nn.cases import AT, CASES, GARBAGE, TAKE_TOKENS, Bench


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_the_same(case: str, training: bool) -> None:
    bench, at = Bench(case, skip_dx=case in TAKE_TOKENS), nn.At(training, AT.seed, AT.step, AT.microbatch)
    x = bench.rows(5)
    results = []
    for layers in (bench.layers, [Recompute(*bench.layers)]):
        y, backward = nn.forward(layers, x, at)
        vector = np.full_like(bench.values, GARBAGE)
        dx = backward(np.random.default_rng(9).standard_normal(y.shape), Gradients(bench.layout, vector))
        results.append((y.tobytes(), vector.tobytes(), None if dx is None else dx.tobytes()))
    assert results[0] == results[1]


def model() -> list[Any]:
    return [Linear(4, 6), Recompute(Residual(Linear(6, 6), Recompute(Tanh(), Dropout(0.5))), Tanh()), Linear(6, 2)]


def test_layers_keep_their_names() -> None:
    layers = opened(model())
    nn.name(layers)
    flat = [Linear(4, 6), Residual(Linear(6, 6), Tanh(), Dropout(0.5)), Tanh(), Linear(6, 2)]
    nn.name(flat)
    names = [(type(layer), layer.path) for layer in nn.everything(layers) if not isinstance(layer, Recompute)]
    assert names == [(type(layer), layer.path) for layer in nn.everything(flat)]
    whole = model()
    nn.name(whole)
    assert [parameter.name for parameter in nn.parameters(whole)] == [p.name for p in nn.parameters(flat)]


def test_the_layers_of_a_block_are_called_as_one() -> None:
    given = model()
    layers = opened(given)
    for layer, block in zip(layers, blocks(given), strict=True):
        layer.block = block
    assert [type(layer) for layer in layers] == [Linear, Residual, Tanh, Linear]
    called = grouped(layers)
    assert [type(layer) for layer in called] == [Linear, Recompute, Linear]
    assert called[1].layers == layers[1:3]
    assert [type(layer) for layer in grouped(layers[:2])] == [Linear, Recompute]  # a stage may end within a block
    assert [type(layer) for layer in grouped(layers[2:])] == [Recompute, Linear]


@pytest.mark.parametrize("learned", [True, False])
def test_a_block_at_the_beginning_gives_a_gradient_only_where_one_is_needed(learned: bool) -> None:
    layers: list[Layer] = [Recompute(Tanh(), Linear(4, 3)), Linear(3, 2)]
    nn.name(layers)
    if not learned:
        nn.skip_first_dx(opened(layers))
    layout = Layout(nn.parameters(layers), np.float64)
    values = layout.zeros()
    layout.bind(values)
    layout.initialise(values, 0)
    _, backward = nn.forward(grouped([layers[0], layers[1]]), np.ones((2, 4)), AT, learned=learned)
    dx = backward(np.ones((2, 2)), Gradients(layout, layout.zeros()))
    assert (dx is not None) == learned


def test_a_block_after_running_averages_needs_no_gradient_for_them() -> None:
    averages, linear = BatchNorm2d(2), Linear(8, 3)
    layers: list[Layer] = [averages, Flatten(), linear]
    averages.gain.rate = averages.bias.rate = 0.0
    nn.name(layers)
    nn.skip_first_dx(layers)
    for layer in layers[1:]:
        layer.block = "a block"
    layout = Layout(nn.parameters(layers), np.float64)
    values = layout.zeros()
    layout.bind(values)
    layout.initialise(values, 0)
    gradients = []
    x = np.random.default_rng(0).standard_normal((3, 2, 2, 2))
    for called in (layers, grouped(layers)):
        vector = layout.zeros(gradients=True)
        _, backward = nn.forward(called, x, AT)
        backward(np.ones((3, 3)), Gradients(layout, vector))
        gradients.append(vector.tobytes())
    assert gradients[0] == gradients[1]


class Counting(Layer):
    """Returns something else at each call."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, x: Any, at: nn.At) -> Any:
        self._calls += 1
        return x + self._calls, lambda dy, grads: dy


def test_layers_that_keep_state_are_refused() -> None:
    layers = [Tanh(), Recompute(Counting())]
    nn.name(layers)
    assert layers[1].path == "layers.1"
    _, backward = nn.forward(layers, np.ones((2, 3)), AT)
    with pytest.raises(
        ConfigError, match=r"^layers\.1: another result when computed again from the same input; a layer"
    ):
        backward(np.ones((2, 3)), Gradients(Layout([], float), np.empty(0)))


def test_several_layers_are_named_from_the_first_to_the_last() -> None:
    layers = [Recompute(Tanh(), Counting())]
    nn.name(layers)
    _, backward = nn.forward(layers, np.ones((2, 3)), AT)
    with pytest.raises(ConfigError, match=r"^layers\.0 to layers\.1: another"):
        backward(np.ones((2, 3)), Gradients(Layout([], float), np.empty(0)))


def test_a_result_that_is_not_finite_is_the_same_result() -> None:
    layers = [Recompute(Tanh())]
    _, backward = nn.forward(layers, np.array([[np.nan, 1.0]]), AT)
    backward(np.ones((1, 2)), Gradients(Layout([], float), np.empty(0)))


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^Recompute\(\) is of no layers"):
        Recompute()


class Memory(Layer):
    """Notes how many bytes of arrays there are when its backward pass begins."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def __call__(self, x: Any, at: nn.At) -> Any:
        def backward(dy: Any, grads: Any) -> Any:
            traces = tracemalloc.take_snapshot().filter_traces(
                [tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)]
            )
            self.held.append(sum(trace.size for trace in traces.traces))
            return dy

        return x + 0.0, backward


@pytest.mark.parametrize("count", [1, 6])
def test_memory_is_that_of_the_inputs_and_one_block(count: int) -> None:
    """A block of four tanh keeps four outputs of 8,000 bytes; dy is one more, and so is the input of each block."""
    memories = [Memory() for _ in range(count)]
    layers = [Recompute(*(Tanh() for _ in range(4)), memory) for memory in memories]
    tracemalloc.start()
    try:
        x = np.ones((10, 100))
        _, backward = nn.forward(layers, x, AT, learned=True)
        backward(np.ones((10, 100)), Gradients(Layout([], float), np.empty(0)))
    finally:
        tracemalloc.stop()
    last, *_ = memories[-1].held
    assert last == pytest.approx(8000 * (count + 4 + 1 + 1), rel=0.02)  # and the output, which `_` above holds

"""What a pass keeps for the backward pass: by hand, as measured, and without running large models."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.nn import base as nn
from mpiml.nn.deferred import DeferredGradients
from mpiml.nn.layers import Conv2d, Flatten, Layer, Linear
from mpiml.nn.parameters import Gradients
from mpiml.nn.recompute import grouped
from mpiml.plan import activations
from mpiml.plan.sizing import plan
from mpiml.training.job import job_of
from tests.nn.cases import CASES


@pytest.mark.parametrize(
    ("layers", "shape", "numbers"),
    [
        ([Linear(8, 16), Linear(16, 4)], (8,), 8 + 16 + 4),  # inputs of both, gradient of the loss
        ([Flatten(), Linear(8, 4)], (2, 4), 8 + 4),
        ([Conv2d(2, 3), Flatten()], (5, 5, 2), 50 + 75 + 75),  # Flatten holds its input
    ],
)
def test_activations_by_hand(layers: list[Layer], shape: tuple[int, ...], numbers: int) -> None:
    assert activations.bytes_of_a_row(staged(layers, shape), last=True) == 4 * numbers


@pytest.mark.parametrize("name", [name for name in CASES if not nn.unsplit(CASES[name][0]())])
def test_what_waits_for_w_is_what_a_first_part_leaves(name: str) -> None:
    """By tracemalloc, as what passes keep. Arrays that two layers hold count twice, so it may be less."""
    make, shape = CASES[name]
    layers = make()
    nn.skip_first_dx(layers)
    stage = staged(layers, shape)
    counted = activations.of_a_row(stage, last=False).waiting
    few, many = (waiting(stage, rows) for rows in activations.ROWS)
    measured = (many - few) / (activations.ROWS[1] - activations.ROWS[0])
    assert 0.8 * counted <= measured <= counted + 1


def waiting(stage: Any, rows: int) -> int:
    """Bytes of arrays that are left between the two parts of a backward pass."""
    stage.layout.bind(np.zeros(stage.layout.size, np.float32))
    gradients = DeferredGradients(Gradients(stage.layout, stage.layout.zeros(gradients=True)))
    tracemalloc.start()
    try:
        x = np.zeros((rows, *stage.x_shape), np.float32)
        y, backward = nn.forward(stage.layers, x, nn.At(training=True, step=1))
        dx = backward(np.ones(y.shape, y.dtype), gradients)
        del x, y, backward, dx
        held = tracemalloc.take_snapshot().filter_traces(activations.ARRAYS)
        return sum(trace.size for trace in held.traces)
    finally:
        tracemalloc.stop()


def staged(layers: list[Layer], shape: tuple[int, ...]) -> Any:
    from mpiml.training.stages import cut

    return cut(Config(), layers, shape)[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("frozen", [False, True])
def test_activations_are_those_of_a_pass(name: str, frozen: bool) -> None:
    """What each kind of layer keeps, in the table, is what NumPy allocates; also where the first layer is frozen."""
    make, shape = CASES[name]
    layers = make()
    if frozen:
        for parameter in nn.parameters(layers[:1]):
            parameter.rate = 0.0
        nn.skip_first_dx(layers)
    stage = staged(layers, shape)
    assert activations.bytes_of_a_row(stage, last=False) == measured(stage)


def measured(stage: Any) -> float:
    return activations._measured(stage.layers, stage.x_shape, stage.learned, stage.layout)


@pytest.mark.parametrize("name", ["images", "tokens"])
def test_blocks_that_are_computed_again_keep_their_inputs(name: str) -> None:
    """Of all but the largest block no more than that is held, in the table as measured."""
    make, shape = CASES[name]
    layers = make()
    plain = activations.of_a_row(staged(layers, shape), last=False)
    for index, layer in enumerate(layers):
        layer.block = index // 2  # of two neighbours each
    stage = staged(layers, shape)
    again = activations.of_a_row(stage, last=False)
    called = grouped(stage.layers, stack=False)
    inputs = sum(math.prod(one) for one in nn.stack_shapes(called, shape)[:-1])
    assert again.in_flight == 4 * inputs
    assert again.in_flight == activations._measured(called, shape, stage.learned, stage.layout)
    assert 0 < again.again < plain.in_flight
    assert plain.again == 0


class Doubled(Flatten):
    """Keeps its input twice, unlike the class that it is derived from."""

    def __call__(self, x: Any, at: Any) -> Any:
        y, backward = super().__call__(x, at)
        twice = x.copy()
        return y, lambda dy, grads: backward(dy, grads) + 0 * twice


def test_activations_of_other_layers_are_measured() -> None:
    stage = staged([Doubled(), Linear(8, 4)], (2, 4))
    assert activations.bytes_of_a_row(stage, last=True) == 4 * (8 + 8 + 4)


def test_activations_are_arrays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other threads make meanwhile is counted for no layer."""
    stage, meanwhile = staged([Doubled(), Linear(8, 4)], (2, 4)), []
    forward = activations.nn.forward

    def busy(layers: list[Layer], x: np.ndarray, at: Any, learned: bool) -> Any:
        meanwhile.append(["of another thread"] * len(x) * 100)
        return forward(layers, x, at, learned)

    monkeypatch.setattr(activations.nn, "forward", busy)
    assert activations.bytes_of_a_row(stage, last=True) == 4 * (8 + 8 + 4)


def test_plan_of_a_large_model_runs_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gpt of 6.4 G parameters on rows of 2,048 tokens: a pass through it would take minutes and tens of GB."""
    monkeypatch.delattr(activations.nn, "forward")
    monkeypatch.setattr(activations.nn.Layer, "__call__", None)
    large = Config(model="gpt", width=4096, heads=32, blocks=32, context=2048, batch=1024, pipe=8, data="text")
    x = np.broadcast_to(np.arange(2048) % 200, (1024, 2048))
    made = plan(job_of(large, 1024, 64, Dataset.from_arrays(x, x, x[:1], x[:1])), "text")
    # A block keeps of each position: two norms' inputs and normal values; of attention input, Q, K, V and result; of
    # the perceptron its input, and four times as wide the slope of GELU and its output; a number per head and norm.
    block = (2 * 2 + 5 + 1 + 4 + 4) * 4096 + 32 + 2
    assert made.stages[1].activations == made.stages[1].in_flight * 4 * 2048 * 4 * block

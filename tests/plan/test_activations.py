"""What a pass keeps for the backward pass: by hand, as measured, and without running large models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.nn import base as nn
from mpiml.nn.layers import Conv2d, Flatten, Layer, Linear
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
    assert activations.bytes_of_a_row(stage, last=False) == activations._measured(stage)


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

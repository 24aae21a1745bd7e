"""Models in which several layers have one array: what a step does to it, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError
from mpiml.nn import base as nn
from mpiml.nn.layers import Embedding, Linear, Unembedding
from mpiml.training.run import Run, unsaved

SELF = MPI.COMM_SELF
FLAT: dict[str, Any] = {"optimizer": "sgd", "lr": 0.5, "batch": 6, "microbatches": 3, "dtype": "float64"}


def data() -> Dataset:
    x, y = np.random.default_rng(0).integers(0, 7, (2, 12, 4))
    y[0, 0] = x[0, 0] = 6
    return Dataset.from_arrays(x, y, x[:1], y[:1])


def step(tied: bool, **settings: Any) -> tuple[Run, list[nn.Layer], float | None]:
    """A step of an embedding and a head, of one array or of two that begin as one."""
    embedding = Embedding(7, 5)
    layers: list[nn.Layer] = [embedding, Linear(5, 5), Unembedding(embedding if tied else Embedding(7, 5))]
    run = unsaved(SELF, Config(**FLAT | settings), data(), layers)
    if not tied:
        layers[2].weight.value[...] = layers[0].weight.value
    from mpiml.training.calendar import Due

    done = run.step(1, Due(log=True))
    return run, layers, done.norm


def test_a_step_is_by_the_sum_of_both_gradients() -> None:
    """As from two arrays, each of which takes a step of its own."""
    (before,) = {layer.weight.value.tobytes() for layer in started()}
    first = np.frombuffer(before).reshape(7, 5)
    _, layers, _ = step(tied=True)
    _, apart, _ = step(tied=False)
    moved = (apart[0].weight.value - first) + (apart[2].weight.value - first)
    np.testing.assert_allclose(layers[0].weight.value - first, moved, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(layers[1].weight.value, apart[1].weight.value, rtol=1e-12)
    assert np.abs(moved).max() > 1e-4


def started() -> list[nn.Layer]:
    embedding = Embedding(7, 5)
    layers: list[nn.Layer] = [embedding, Linear(5, 5), Unembedding(embedding)]
    unsaved(SELF, Config(**FLAT), data(), layers)
    return [layers[0], layers[2]]


def test_it_counts_once_in_the_norm() -> None:
    """The root of the squares of the summed gradient: worked out from how far a step of SGD moves the values."""
    (before,) = {layer.weight.value.tobytes() for layer in started()}
    run, layers, norm = step(tied=True)
    first = np.frombuffer(before).reshape(7, 5)
    moved = np.sum((layers[0].weight.value - first) ** 2)
    others = [p for p in nn.parameters(layers) if p.first is p and p is not layers[0].weight]
    fresh = {p.name: p.value.copy() for p in nn.parameters(beginning())}
    moved += sum(np.sum((p.value - fresh[p.name]) ** 2) for p in others)
    assert norm == pytest.approx(math.sqrt(moved) / FLAT["lr"], rel=1e-12)
    assert {p.name for p in run.model.layouts[0].parameters} == {"layers.0.weight", "layers.1.weight", "layers.1.bias"}


def beginning() -> list[nn.Layer]:
    embedding = Embedding(7, 5)
    layers: list[nn.Layer] = [embedding, Linear(5, 5), Unembedding(embedding)]
    unsaved(SELF, Config(**FLAT), data(), layers)
    return layers


def test_the_noise_scale_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^--noise-scale: layers\.0\.weight stands in several layers, and a micro-batch"
    ):
        step(tied=True, noise_scale=True)


def test_the_rate_of_a_later_place_is_that_of_the_first() -> None:
    with pytest.raises(
        ConfigError, match=r"^--rates layers\.2=0: selects layers\.2\.weight, which is the array of layers\.0"
    ):
        step(tied=True, rates=("layers.2=0",))
    _, layers, _ = step(tied=True, rates=("layers.0=0",))
    np.testing.assert_array_equal(layers[0].weight.value, started()[0].weight.value)


def test_a_tied_gpt_takes_no_more_tokens_than_it_predicts() -> None:
    x = np.arange(48).reshape(12, 4) % 9
    uneven = Dataset.from_arrays(x, x % 7, x[:1], x[:1] % 7)
    settings: dict[str, Any] = {"model": "gpt", "width": 8, "heads": 2, "tie": True, "batch": 6}
    with pytest.raises(
        ConfigError, match=r"--tie: one array is to be for both, but rows hold 9 .* --classes 9 would work"
    ):
        unsaved(SELF, Config(**settings), uneven)
    run = unsaved(SELF, Config(**settings, classes=9), uneven)
    assert [p.shape for p in run.model.layouts[0].parameters if p.places] == [(9, 8)]


@pytest.mark.parametrize("model", ["mlp", "resnet", "own:model"])
def test_tie_is_of_gpt(model: str) -> None:
    with pytest.raises(ConfigError, match=f"^--tie --model {model}: is for gpt; layers of your own share a Parameter"):
        Config(tie=True, model=model)

"""What a checkpoint's arrays are called, and what comes back out of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.errors import OutputError
from mpiml.nn import base as nn
from mpiml.nn.layers import BatchNorm2d, Linear
from mpiml.nn.parameters import Layout
from mpiml.parallel.state import EMA, VALUES
from mpiml.training.arrays import needed_kinds, preparations, segments
from mpiml.vectors import BLOCK
from tests.forging import ARRAYS, loaded


def test_the_kinds_that_are_needed_are_those_of_parameters_under_the_names_of_a_vector() -> None:
    layers = [Linear(4, 3)]
    nn.name(layers)
    kinds = {"layers.0.weight": ("float32", (4, 3)), "layers.0.bias": ("float32", (3,))}
    states = {f"optimizer.mean.{name}": kind for name, kind in kinds.items()}
    assert needed_kinds([Layout(nn.parameters(layers), "float32")], (VALUES, "mean")) == kinds | states


def test_segments_are_what_a_rank_has_of_each_array_and_begin_with_blocks() -> None:
    layers = [Linear(200, 100), Linear(100, 3)]
    nn.name(layers)
    stages = [Layout(nn.parameters(layers), "float32")]
    vector = np.arange(stages[0].size, dtype="f")
    cuts = [0, *(block.stop for block in stages[0].blocks()[:-1]), stages[0].size]
    for held in ({(0, len(vector)): vector}, {(a, b): vector[a:b] for a, b in itertools.pairwise(cuts)}):
        back = {name: np.zeros(shape, dtype) for name, (dtype, shape) in needed_kinds(stages, ("mean",)).items()}
        for name, first, values, finite in segments(stages[0], "mean", held):
            assert finite
            assert first % BLOCK == 0
            assert values.base is not None, "a rank's own memory"
            back[name].reshape(-1)[first : first + values.size] += values
        expected = {f"optimizer.mean.{parameter.name}": view for parameter, view in stages[0].views(vector)}
        assert back.keys() == expected.keys()
        assert all((back[name] == array).all() for name, array in expected.items())
    (only,) = segments(stages[0], VALUES, {(0, 5): vector[:5]}, lambda name: f"ema.{name}")
    assert (only.name, only.first, only.values.tolist()) == ("ema.layers.0.bias", 0, [0, 1, 2, 3, 4])


def test_averages_are_of_parameters_alone_and_have_names_of_their_own() -> None:
    layers = [Linear(4, 3), BatchNorm2d(3)]
    nn.name(layers)
    stages = [Layout(nn.parameters(layers), "float32")]
    names = [f"ema.layers.{name}" for name in ("0.weight", "0.bias", "1.gain", "1.bias")]
    assert set(needed_kinds(stages, (EMA,))) == set(names)


@pytest.mark.parametrize(
    "changes",
    [{"data.mean": np.zeros(3)}, {"data.scale": np.zeros(4, "f")}, {"data.fill": np.zeros((4, 1))}],
    ids=["length", "dtype", "axes"],
)
def test_inputs_are_prepared_by_arrays_of_their_shape(changes: dict[str, np.ndarray]) -> None:
    good = {"data.mean": np.zeros(4), "data.scale": np.ones(4), "data.fill": np.arange(4.0)}
    config = Config(fill="mean", normalize=True)
    filling, normalization = preparations(loaded(ARRAYS | good), config, (4,))
    assert filling.arrays()["data.fill"].sum() == 6
    assert normalization.arrays()["data.scale"].sum() == 4
    assert preparations(loaded(ARRAYS), Config(), (4,)) == []
    for arrays in (ARRAYS | good | changes, ARRAYS):
        with pytest.raises(OutputError, match=r"data\.(mean|scale|fill)"):
            preparations(loaded(arrays), config, (4,))

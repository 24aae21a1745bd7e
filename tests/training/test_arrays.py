"""What a checkpoint's arrays are called, and what comes back out of them."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.errors import OutputError
from mpiml.nn import base as nn
from mpiml.nn.layers import BatchNorm2d, Linear
from mpiml.nn.parameters import Layout
from mpiml.parallel.state import EMA, VALUES
from mpiml.run import verified
from mpiml.run.checkpoint import Checkpoint
from mpiml.training.arrays import from_arrays, needed_kinds, preparations, to_arrays
from tests.forging import ARRAYS


def test_arrays_come_back_under_their_names() -> None:
    layers = [Linear(4, 3)]
    nn.name(layers)
    (layout,) = stages = [Layout(nn.parameters(layers), "float32")]
    values = [{VALUES: np.arange(layout.size, dtype="f"), "mean": np.ones(layout.size, "f")}]
    arrays = to_arrays(stages, values, VALUES, "mean")
    assert verified.kinds_of(arrays) == needed_kinds(stages, (VALUES, "mean"))
    (restored,) = from_arrays(stages, Checkpoint(1, "", arrays), (VALUES, "mean"))
    back = to_arrays(stages, [restored], VALUES, "mean")
    assert all((back[name] == array).all() for name, array in arrays.items())


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
    filling, normalization = preparations(Checkpoint(1, "", ARRAYS | good), config, (4,))
    assert filling.arrays()["data.fill"].sum() == 6
    assert normalization.arrays()["data.scale"].sum() == 4
    assert preparations(Checkpoint(1, "", ARRAYS), Config(), (4,)) == []
    for arrays in (ARRAYS | good | changes, ARRAYS):
        with pytest.raises(OutputError, match=r"data\.(mean|scale|fill)"):
            preparations(Checkpoint(1, "", arrays), config, (4,))

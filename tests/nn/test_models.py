"""All models alike: cuts between any two layers, first outputs, and sizes worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mpiml.nn import layers as nn
from mpiml.nn.base import skip_first_dx
from mpiml.nn.convnets import cnn, resnet
from mpiml.nn.parameters import Gradients, Layout
from mpiml.nn.perceptrons import mlp
from mpiml.nn.transformers import gpt

AT = nn.At(training=True, seed=3)
Build = Callable[[], list[nn.Layer]]
MODELS: dict[str, tuple[Build, tuple[int, ...], tuple[int, ...]]] = {
    "mlp": (lambda: mlp((3, 4), 5, (7, 6), "tanh", 0.1), (3, 4), (5,)),
    "cnn": (lambda: cnn((8, 9, 3), 5, channels=4, dropout=0.1), (8, 9, 3), (5,)),
    "cnn of flat rows": (lambda: cnn((64,), 5, channels=4), (64,), (5,)),
    "resnet": (lambda: resnet((9, 8), 5, channels=4, blocks=1, dropout=0.1), (9, 8), (5,)),
    "resnet with batch norm": (lambda: resnet((9, 8), 5, channels=4, blocks=1, norm="batch"), (9, 8), (5,)),
    "gpt": (lambda: gpt((6,), 5, width=8, heads=2, dropout=0.1), (6,), (6, 5)),
}
every_model = pytest.mark.parametrize("model", MODELS)


def inputs(model: str, rows: int = 4) -> np.ndarray:
    random, shape = np.random.default_rng(0), (rows, *MODELS[model][1])
    return random.integers(0, 5, shape).astype("float32") if model == "gpt" else random.random(shape, "float32")


def prepared(layers: list[nn.Layer]) -> Layout:
    layout = Layout(nn.parameters(layers), "float32")
    values = layout.zeros()
    layout.bind(values)
    layout.initialise(values, 0)
    return layout


@every_model
def test_any_cut_gives_the_same_bits(model: str) -> None:
    """As the stages of a pipeline do: forward and backward of the parts, one after the other."""
    build, shape, final = MODELS[model]
    layers = build()
    nn.name(layers)
    skip_first_dx(layers)
    layout, x = prepared(layers), inputs(model)
    assert nn.stack_shapes(layers, shape)[-1] == final
    y, backward = nn.forward(layers, x, AT)
    assert y.shape == (len(x), *final)
    dy = np.random.default_rng(1).standard_normal(y.shape).astype("float32")
    whole = Gradients(layout, layout.zeros())
    backward(dy, whole)
    for cut in range(1, len(layers)):
        middle, first_backward = nn.forward(layers[:cut], x, AT)
        last, last_backward = nn.forward(layers[cut:], middle.copy(), AT)
        np.testing.assert_array_equal(last, y)
        parts = Gradients(layout, layout.zeros())
        dmiddle = last_backward(dy, parts)
        if dmiddle is not None:
            first_backward(dmiddle.copy(), parts)
        np.testing.assert_array_equal(parts.vector, whole.vector)


@every_model
def test_every_parameter_matters(model: str) -> None:
    layers = MODELS[model][0]()
    nn.name(layers)
    layout, x = prepared(layers), inputs(model)
    y, backward = nn.forward(layers, x, AT)
    grads = Gradients(layout, layout.zeros())
    backward(np.random.default_rng(1).standard_normal(y.shape).astype("float32"), grads)
    assert [p.name for p in layout.parameters if not grads[p].any()] == []


@every_model
def test_first_outputs_are_of_moderate_size(model: str) -> None:
    layers = MODELS[model][0]()
    nn.name(layers)
    prepared(layers)
    y, _ = nn.forward(layers, inputs(model, 50), nn.At(training=False))
    assert 0.1 < y.std() < 3


def count(layers: list[nn.Layer]) -> int:
    return sum(parameter.size for parameter in nn.parameters(layers))


def test_sizes_by_hand() -> None:
    assert count(cnn((28, 28), 10)) == 32 * (9 + 1) + 64 * (9 * 32 + 1) + (7 * 7 * 64 + 1) * 10
    block = (2 * 16) + (16 + 1) * 48 + (16 + 1) * 16 + (2 * 16) + (16 + 1) * 64 + (64 + 1) * 16
    assert count(gpt((9,), 50, 70, 16, blocks=3)) == 70 * 16 + 9 * 16 + 3 * block + 2 * 16 + (16 + 1) * 50
    residual = [2 * (2 * c + (9 * c + 1) * c) for c in (8, 16, 32)]
    between = [(9 * a + 1) * b for a, b in ((3, 8), (8, 16), (16, 32))]
    assert count(resnet((16, 16, 3), 10, 8)) == 2 * sum(residual) + sum(between) + 2 * 32 + (32 + 1) * 10

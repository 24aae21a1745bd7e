"""Arrays that stand in several layers: a Parameter for each place, and where their values and gradients lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpiml.nn import base as nn
from mpiml.nn.layers import BatchNorm2d, Embedding, Layer, Linear, Residual, Tanh, Unembedding
from mpiml.nn.parameters import Gradients, Layout, Parameter


def three() -> tuple[list[Linear], Parameter]:
    """One array in three layers, of which the second is inside another."""
    layers = [Linear(3, 3) for _ in range(3)]
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    nn.name([layers[0], Residual(Tanh(), layers[1]), layers[2]])
    return layers, layers[0].weight


def test_each_place_has_a_parameter_of_its_own() -> None:
    layers, first = three()
    assert [layer.weight.name for layer in layers] == ["layers.0.weight", "layers.1.layers.1.weight", "layers.2.weight"]
    assert [layer.weight.first for layer in layers] == [first] * 3
    assert len({id(layer.weight) for layer in layers}) == 3
    assert list(first.places) == [layer.weight for layer in layers]
    assert layers[0].bias.first is layers[0].bias
    assert not layers[0].bias.places


def test_a_model_may_be_named_again() -> None:
    layers, _ = three()
    before = [layer.weight for layer in layers]
    nn.name([layers[0], layers[1], layers[2]])
    assert [layer.weight for layer in layers] == before
    assert layers[1].weight.name == "layers.1.weight"
    nn.name([layers[0], layers[2]])
    assert list(layers[0].weight.places) == [layers[0].weight, layers[2].weight]
    nn.name([layers[2]])
    assert not layers[2].weight.places


def test_values_are_one_and_gradients_are_several() -> None:
    layers, first = three()
    layout = Layout(nn.parameters(layers), np.float64)
    values = layout.zeros()
    layout.bind(values)
    layout.initialise(values, 0)
    assert all(np.shares_memory(layer.weight.value, first.value) for layer in layers)
    assert first.value.any()
    gradients = Gradients(layout, layout.zeros(gradients=True))
    for number, layer in enumerate(layers):
        gradients[layer.weight][...] = number
    assert [gradients[layer.weight].max() for layer in layers] == [0, 1, 2]
    assert (layout.size, layout.updated, layout.summed) == (16 + 24, 16 + 24, 16 + 24 + 2 * 16)  # in lines of 64 bytes
    assert [(blocks[0].start, blocks[0].array) for blocks in layout.further_blocks()] == [
        (40, "layers.0.weight"),
        (56, "layers.0.weight"),
    ]


def test_a_stage_with_later_places_draws_what_the_first_place_draws() -> None:
    layers, _ = three()
    drawn = []
    for some in (layers[:1], layers[1:]):
        layout = Layout(nn.parameters(some), np.float64)
        values = layout.zeros()
        layout.bind(values)
        layout.initialise(values, 7)
        drawn.append(some[0].weight.value.copy())
    np.testing.assert_array_equal(*drawn)
    assert [block.counted for block in layout.blocks() if block.array] == [False]


def test_frozen_arrays_have_no_gradient_at_any_place() -> None:
    layers, _ = three()
    for layer in layers:
        layer.weight.rate = 0.0
    layout = Layout(nn.parameters(layers), np.float64)
    assert layout.summed == layout.updated == 24
    assert layout.further_blocks() == []
    gradients = Gradients(layout, layout.zeros(gradients=True))
    for layer in layers:
        gradients[layer.weight][...] = 1.0
    assert not gradients.vector.any()


def test_a_running_average_cannot_stand_in_two_layers() -> None:
    layers = [BatchNorm2d(2), BatchNorm2d(2)]
    layers[1].running_mean = layers[0].running_mean
    with pytest.raises(
        ValueError, match=r"^running_mean of BatchNorm2d, which also stands in an earlier layer, is a runni"
    ):
        nn.name(layers)


class Fixed(Layer):
    """A parameter that cannot be set."""

    def __init__(self, weight: Parameter):
        self._weight = weight

    def own_parameters(self) -> Any:
        return {"weight": self._weight}


def test_an_attribute_that_cannot_be_set_is_refused() -> None:
    first = Linear(3, 3)
    with pytest.raises(
        ValueError, match=r"^weight of Fixed, which also stands in an earlier layer, must be an attribute "
    ):
        nn.name([first, Fixed(first.weight)])


def test_the_head_of_an_embedding() -> None:
    embedding = Embedding(5, 3)
    head = Unembedding(embedding)
    nn.name([embedding, head])
    assert head.weight.first is embedding.weight
    assert head.output_shape((7, 3)) == (7, 5)
    with pytest.raises(ValueError, match=r"^Unembedding\(5, 3\) takes rows whose last axis is 3, got \(7, 4\)$"):
        head.output_shape((7, 4))

"""PyTorch's names and axes of a model's arrays, there and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpiml.nn import layers as nn
from mpiml.nn.convnets import cnn, resnet
from mpiml.nn.export import Form, forms, to_torch
from mpiml.nn.perceptrons import mlp
from mpiml.nn.transformers import gpt

MODELS: dict[str, tuple[list[nn.Layer], tuple[int, ...]]] = {
    "mlp": (mlp((6, 7), 3, (5, 4)), (6, 7)),
    "cnn": (cnn((8, 12), 3, 2, norm="batch"), (8, 12)),
    "resnet": (resnet((8, 8, 2), 3, 2, 1), (8, 8, 2)),
    "resnet of batches": (resnet((8, 8, 2), 3, 2, 1, norm="batch"), (8, 8, 2)),
    "gpt": (gpt((5,), 7, width=6, heads=2, blocks=1), (5,)),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_goes_to_pytorch_comes_back(name: str) -> None:
    layers, shape = MODELS[name]
    nn.name(layers)
    random = np.random.default_rng(0)
    ours = {p.name: random.standard_normal(p.shape) for p in nn.parameters(layers)}
    theirs, of_model = to_torch(layers, ours, shape), forms(layers, shape)
    assert theirs.keys() == {form.names[0] for form in of_model.values()}
    for ours_name, form in of_model.items():
        assert theirs[form.names[0]].shape == form.torch_shape
        np.testing.assert_array_equal(form.from_torch(theirs[form.names[0]]), ours[ours_name])
    assert any(form.torch_shape != form.shape for form in of_model.values())


def test_layers_that_are_computed_again_are_exported_as_without() -> None:
    def model(*inside: nn.Layer) -> list[nn.Layer]:
        layers: list[nn.Layer] = [nn.Linear(4, 4), nn.Residual(*inside)]
        nn.name(layers)
        return layers

    plain = model(nn.Linear(4, 4), nn.Linear(4, 4))
    assert forms(model(nn.Recompute(nn.Linear(4, 4), nn.Linear(4, 4))), (4,)) == forms(plain, (4,))


def test_an_array_in_several_layers_is_under_all_their_names() -> None:
    layers = gpt((5,), 7, width=6, heads=2, blocks=1, tie=True)
    nn.name(layers)
    first, last = layers[0].weight, layers[-1].weight
    ours = {p.name: np.full(p.shape, number) for number, p in enumerate(nn.parameters(layers)) if p.first is p}
    theirs = to_torch(layers, ours, (5,))
    assert forms(layers, (5,))[first.name].names == ["0.weight", "5.weight"]
    assert last.name == "layers.5.weight"
    np.testing.assert_array_equal(theirs["5.weight"], ours[first.name])
    np.testing.assert_array_equal(theirs["0.weight"], ours[first.name])


def test_own_layers_keep_their_names_and_axes() -> None:
    class Scaled(nn.Layer):
        def __init__(self, inside: nn.Layer):
            self.gain, self.inside = nn.Linear(2, 3).weight, inside

        def inner(self) -> Any:
            return [self.inside]

    layers = [Scaled(nn.LayerNorm(3))]
    nn.name(layers)
    assert forms(layers, (2,)) == {
        "layers.0.gain": Form.same((2, 3), ["0.gain"]),
        "layers.0.layers.0.gain": Form.same((3,), ["0.layers.0.gain"]),
        "layers.0.layers.0.bias": Form.same((3,), ["0.layers.0.bias"]),
    }

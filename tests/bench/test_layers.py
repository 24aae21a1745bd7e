"""The benchmark of layers: both sides do the same arithmetic, from the same weights to the same weights."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.bench.layers import DUELS, Duel, products, transformer
from mpiml.nn.layers import Conv2d
from tests.nn.cases import named

torch = pytest.importorskip("torch")
SIDE = 28 // 4  # of an image after two poolings


def small(model: str) -> Duel:
    if model == "gpt":
        return transformer(width=16, blocks=2)
    return DUELS[model](*(["16", "8"] if model == "mlp" else []))


def in_torch(array: np.ndarray, model: str, name: str) -> np.ndarray:
    """A parameter as PyTorch's of that name: outputs first; images are (channels, height, width)."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if array.ndim == 1 or name in ("0.token.weight", "0.place.weight"):
        return array
    if model == "cnn":
        return array.reshape(SIDE, SIDE, -1, 10).transpose(3, 2, 0, 1).reshape(10, -1)
    return array.T


@pytest.mark.parametrize("model", DUELS)
def test_both_sides_learn_the_same(model: str) -> None:
    """Values are compared where the gradient is more than rounding: Adam's first step only asks for its sign."""
    duel = small(model)
    ours, theirs = duel.ours(), duel.theirs("channels_last")
    run, parameters = ours.run, dict(theirs.module.named_parameters())
    (layout,), sum_ = run.model.layouts, run.stage.sum

    def converted(vector: np.ndarray) -> list[np.ndarray]:
        arrays = named(layout, vector).values()
        return [in_torch(array, model, name).copy() for array, name in zip(arrays, parameters, strict=True)]

    with torch.no_grad():
        for value, parameter in zip(converted(sum_.values.vector), parameters.values(), strict=True):
            parameter.copy_(torch.from_numpy(value))
    (batch,) = run.data.ahead.batches(1)
    rows = torch.from_numpy(np.array(batch.select()))
    ours.step()
    theirs.train(rows)
    weight = duel.y[: duel.rows].size
    for name, value, slope in zip(parameters, converted(sum_.values.vector), converted(sum_.slots[0]), strict=True):
        parameter = parameters[name]
        grad = parameter.grad.numpy()
        np.testing.assert_allclose(slope / weight, grad, rtol=1e-3, atol=1e-6, err_msg=name)
        sure = np.abs(grad) > 1e-5
        np.testing.assert_allclose(value[sure], parameter.detach().numpy()[sure], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_images_lie_as_asked_for(memory_format: str) -> None:
    side = small("cnn").theirs(memory_format)
    first, *_ = side.module
    assert first(side.x[:4]).is_contiguous(memory_format=getattr(torch, memory_format))


@pytest.mark.parametrize("needs_dx", [True, False])
def test_products_have_the_operations_of_a_convolution(needs_dx: bool) -> None:
    layer, rows = Conv2d(16, 8), 100  # several tiles, the last one smaller
    layer.needs_dx = needs_dx
    made = products(layer, 14 * 14, rows)
    for left, right, product in made:
        np.matmul(left, right, out=product)
    operations = sum(2 * left.size * right.shape[1] for left, right, _ in made)
    assert operations == (3 if needs_dx else 2) * rows * layer.flops((14, 14, 16))
    assert len(made) > 6

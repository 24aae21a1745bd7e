"""Layers and the loss in float32 against PyTorch's with the same weights, at sizes of which several blocks are made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpiml.nn import layers as nn
from mpiml.nn.convnets import cnn, resnet
from mpiml.nn.export import to_torch
from mpiml.nn.losses import softmax_cross_entropy
from mpiml.nn.parameters import Gradients, Layout
from mpiml.nn.perceptrons import mlp
from mpiml.nn.transformers import gpt

torch = pytest.importorskip("torch")
Array = np.ndarray


def as_torch(array: Array) -> Any:
    return torch.from_numpy(array.copy()).requires_grad_()


class Positional(torch.nn.Embedding):
    def forward(self, x: Any) -> Any:
        return x + self.weight


class Causal(torch.nn.MultiheadAttention):
    def __init__(self, features: int, heads: int):
        super().__init__(features, heads, batch_first=True)

    def forward(self, x: Any) -> Any:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return super().forward(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


class Residual(torch.nn.Module):
    def __init__(self, *modules: Any):
        super().__init__()
        self.layers = torch.nn.Sequential(*modules)

    def forward(self, x: Any) -> Any:
        return x + self.layers(x)


F, T = torch.nn.functional, torch.nn
CASES = {
    "linear": (nn.Linear(30, 20), (7, 30), T.Linear(30, 20)),
    "relu": (nn.ReLU(), (70, 90), T.ReLU()),
    "tanh": (nn.Tanh(), (70, 90), T.Tanh()),
    "gelu": (nn.GELU(), (70, 90), T.GELU(approximate="tanh")),
    "silu": (nn.SiLU(), (70, 90), T.SiLU()),
    "layer norm": (nn.LayerNorm(96), (40, 96), T.LayerNorm(96)),
    "rms norm": (nn.RMSNorm(96), (40, 96), T.RMSNorm(96, 1e-5)),
    "group norm": (nn.GroupNorm(4, 16), (9, 8, 16), T.GroupNorm(4, 16)),
    "convolution": (nn.Conv2d(8, 16), (28, 30, 8), T.Conv2d(8, 16, 3, 1, 1)),
    "convolution, stride 2": (nn.Conv2d(8, 16, stride=2), (27, 30, 8), T.Conv2d(8, 16, 3, 2, 1)),
    "convolution 5 x 5": (nn.Conv2d(3, 8, 5, 3, 1), (27, 30, 3), T.Conv2d(3, 8, 5, 3, 1)),
    "max pool": (nn.MaxPool2d(), (91, 80, 8), T.MaxPool2d(2)),
    "average pool": (nn.AvgPool2d(3), (9, 8, 5), T.AvgPool2d(3)),
    "global average pool": (nn.GlobalAvgPool(), (9, 8, 5), T.Sequential(T.AdaptiveAvgPool2d(1), T.Flatten())),
    "positional embedding": (nn.PositionalEmbedding(9, 16), (9, 16), Positional(9, 16)),
    "attention": (nn.CausalSelfAttention(32, 4), (300, 32), Causal(32, 4)),
}


def placed(layers: list[nn.Layer]) -> Layout:
    """Names the layers and gives them values: first ones, and noise, so that no two are alike."""
    nn.name(layers)
    layout = Layout(nn.parameters(layers), "float32")
    values = layout.zeros()
    layout.bind(values)
    layout.initialise(values, 0)
    values += np.random.default_rng(0).standard_normal(values.size).astype("float32") * 0.1
    return layout


def loaded(module: Any, layers: list[nn.Layer], shape: tuple[int, ...]) -> Any:
    """PyTorch's module with our weights."""
    arrays = to_torch(layers, {p.name: p.value for p in nn.parameters(layers)}, shape)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return module


def outputs(module: Any, x: Any) -> Any:
    """Of a module for rows as ours: images with channels last."""
    y = module(x.permute(0, 3, 1, 2) if x.ndim == 4 else x)
    return y.permute(0, 2, 3, 1) if y.ndim == 4 else y


@pytest.mark.parametrize("case", CASES)
def test_layer(case: str) -> None:
    layer, shape, theirs = CASES[case]
    layout, module = placed([layer]), T.Sequential(theirs)
    random = np.random.default_rng(0)
    x = random.standard_normal((6, *shape)).astype("float32")
    y, backward = layer(x, nn.At(training=True))
    dy = random.standard_normal(y.shape).astype("float32")
    grads = Gradients(layout, layout.zeros())
    dx = backward(dy, grads)

    tx = as_torch(x)
    ty = outputs(loaded(module, [layer], shape), tx)
    ty.backward(torch.from_numpy(dy))
    close(y, ty)
    close(dx, tx.grad)
    exported = to_torch([layer], {p.name: grads[p] for p in layout.parameters}, shape)
    assert list(exported) == [name for name, _ in module.named_parameters()]
    for name, weight in module.named_parameters():
        close(exported[name], weight.grad)


def norm_relu_convolution(width: int) -> list[Any]:
    return [T.GroupNorm(1, width), T.ReLU(), T.Conv2d(width, width, 3, padding=1)]


def residual(width: int) -> Any:
    return Residual(*norm_relu_convolution(width), *norm_relu_convolution(width))


MODELS = {
    "mlp": (mlp((5, 6), 3, [8]), (5, 6), T.Sequential(T.Flatten(), T.Linear(30, 8), T.ReLU(), T.Linear(8, 3))),
    "images flattened at once": (
        mlp((5, 6, 3), 3, [8]),
        (5, 6, 3),
        T.Sequential(T.Flatten(), T.Linear(90, 8), T.ReLU(), T.Linear(8, 3)),
    ),
    "cnn": (
        cnn((12, 8, 3), 5, 4),
        (12, 8, 3),
        T.Sequential(
            *(T.Conv2d(3, 4, 3, padding=1), T.MaxPool2d(2), T.ReLU()),
            *(T.Conv2d(4, 8, 3, padding=1), T.MaxPool2d(2), T.ReLU(), T.Flatten(), T.Linear(48, 5)),
        ),
    ),
    "resnet": (
        resnet((8, 8, 3), 5, 2, 1),
        (8, 8, 3),
        T.Sequential(
            *(T.Conv2d(3, 2, 3, padding=1), residual(2), T.Conv2d(2, 4, 3, 2, 1), residual(4)),
            *(T.Conv2d(4, 8, 3, 2, 1), residual(8), T.GroupNorm(1, 8), T.ReLU()),
            *(T.Sequential(T.AdaptiveAvgPool2d(1), T.Flatten()), T.Linear(8, 5)),
        ),
    ),
    "gpt": (
        gpt((7,), 11, width=8, heads=2, blocks=1),
        (7,),
        T.Sequential(
            *(T.Embedding(11, 8), Positional(7, 8), Residual(T.LayerNorm(8), Causal(8, 2))),
            Residual(T.LayerNorm(8), T.Linear(8, 32), T.GELU(approximate="tanh"), T.Linear(32, 8)),
            *(T.LayerNorm(8), T.Linear(8, 11)),
        ),
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_model(model: str) -> None:
    layers, shape, theirs = MODELS[model]
    placed(layers)
    random = np.random.default_rng(0)
    x = random.integers(0, 11, (4, *shape)) if model == "gpt" else random.random((4, *shape))
    y, _ = nn.forward(layers, x.astype("float32"), nn.At(training=False))
    close(y, outputs(loaded(theirs, layers, shape), torch.from_numpy(x if model == "gpt" else x.astype("float32"))))


def test_batch_norm_and_its_running_averages() -> None:
    layer, theirs = nn.BatchNorm2d(16), torch.nn.BatchNorm2d(16)
    nn.name([layer])
    layout = Layout(nn.parameters([layer]), "float32")
    layout.bind(values := layout.zeros())
    layout.initialise(values, 0)
    random = np.random.default_rng(0)
    for rows in (6, 70, 3):
        x, dy = ((random.standard_normal((rows, 9, 8, 16)) * 3 + 1).astype("float32") for _ in range(2))
        tx = as_torch(x)
        theirs.zero_grad()
        ty = outputs(theirs, tx)
        ty.backward(torch.from_numpy(dy))
        y, backward = layer(x, nn.At(training=True))
        grads = Gradients(layout, layout.zeros())
        for array, other in ((y, ty), (backward(dy, grads), tx.grad)):
            close(array, other)
        close(grads[layer.gain], theirs.weight.grad)
        close(grads[layer.bias], theirs.bias.grad)
        for statistic in (layer.running_mean, layer.running_variance):
            statistic.value += layer.running_mean.momentum * (grads[statistic] / rows - statistic.value)
        close(layer.running_mean.value, theirs.running_mean)
        close(layer.running_variance.value, theirs.running_var)
    module = loaded(T.Sequential(torch.nn.BatchNorm2d(16)), [layer], (9, 8, 16)).eval()
    close(layer(x, nn.At(training=False))[0], outputs(module, torch.from_numpy(x)))


def close(array: Array, theirs: Any) -> None:
    """Equal but for rounding, which is of the size of the largest values that are added up."""
    expected = theirs.detach().numpy()
    np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_embedding() -> None:
    layer = nn.Embedding(11, 8)
    layout = Layout(nn.parameters([layer]), "float32")
    values = np.random.default_rng(0).standard_normal(layout.size).astype("float32")
    layout.bind(values)
    ids = np.random.default_rng(1).integers(0, 11, (40, 30))
    y, backward = layer(ids.astype("float32"), nn.At(training=True))
    weight = as_torch(layer.weight.value)
    expected = F.embedding(torch.from_numpy(ids), weight)
    close(y, expected)
    dy = np.random.default_rng(2).standard_normal(y.shape).astype("float32")
    grads = Gradients(layout, layout.zeros())
    assert backward(dy, grads) is None
    expected.backward(torch.from_numpy(dy))
    close(grads[layer.weight], weight.grad)


@pytest.mark.parametrize("shape", [(50,), (5, 30), (2, 3, 4)])
def test_cross_entropy_with_masked_labels(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    y = random.standard_normal((*shape, 200)).astype("float32") * 3
    labels = random.integers(-1, 200, shape)
    labels.flat[::3] = -1
    total, weight, dy = softmax_cross_entropy(y, labels)
    ty = as_torch(y)
    flat, goal = ty.reshape(-1, 200), torch.from_numpy(labels).reshape(-1)
    expected = F.cross_entropy(flat, goal, ignore_index=-1, reduction="sum")
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert weight == np.count_nonzero(labels >= 0)
    close(dy, ty.grad)

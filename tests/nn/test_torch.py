"""Layers and the loss in float32 against PyTorch's with the same weights, at sizes of which several blocks are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpiml.nn import layers as nn
from mpiml.nn.losses import softmax_cross_entropy
from mpiml.nn.parameters import Gradients, Layout

torch = pytest.importorskip("torch")
Array = np.ndarray


def as_torch(array: Array) -> Any:
    return torch.from_numpy(array.copy()).requires_grad_()


def image(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (rows, channels, H, W) as one of (rows, H, W, channels)."""
    return lambda x, *weights: f(x.permute(0, 3, 1, 2), *weights).permute(0, 2, 3, 1)


def attention(heads: int) -> Callable[..., Any]:
    def f(x: Any, w: Any, b: Any, out_w: Any, out_b: Any) -> Any:
        rows, places, features = x.shape
        qkv = (x @ w + b).view(rows, places, 3, heads, features // heads).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
        return y.transpose(1, 2).reshape(x.shape) @ out_w + out_b

    return f


def convolution(stride: int, padding: int) -> Callable[..., Any]:
    conv = torch.nn.functional.conv2d
    return image(lambda x, w, b: conv(x, w.permute(3, 2, 0, 1), b, stride=stride, padding=padding))


F = torch.nn.functional
CASES = {
    "linear": (nn.Linear(30, 20), (7, 30), lambda x, w, b: x @ w + b),
    "relu": (nn.ReLU(), (70, 90), F.relu),
    "tanh": (nn.Tanh(), (70, 90), torch.tanh),
    "gelu": (nn.GELU(), (70, 90), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (nn.SiLU(), (70, 90), F.silu),
    "layer norm": (nn.LayerNorm(96), (40, 96), lambda x, g, b: F.layer_norm(x, (96,), g, b)),
    "rms norm": (nn.RMSNorm(96), (40, 96), lambda x, g: F.rms_norm(x, (96,), g, 1e-5)),
    "group norm": (nn.GroupNorm(4, 16), (9, 8, 16), image(lambda x, g, b: F.group_norm(x, 4, g, b))),
    "convolution": (nn.Conv2d(8, 16), (28, 30, 8), convolution(1, 1)),
    "convolution, stride 2": (nn.Conv2d(8, 16, stride=2), (27, 30, 8), convolution(2, 1)),
    "convolution 5 x 5": (nn.Conv2d(3, 8, 5, 3, 1), (27, 30, 3), convolution(3, 1)),
    "max pool": (nn.MaxPool2d(), (91, 80, 8), image(lambda x: F.max_pool2d(x, 2))),
    "average pool": (nn.AvgPool2d(3), (9, 8, 5), image(lambda x: F.avg_pool2d(x, 3))),
    "global average pool": (nn.GlobalAvgPool(), (9, 8, 5), lambda x: x.mean(dim=(1, 2))),
    "positional embedding": (nn.PositionalEmbedding(9, 16), (9, 16), lambda x, w: x + w),
    "attention": (nn.CausalSelfAttention(32, 4), (300, 32), attention(4)),
}


@pytest.mark.parametrize("case", CASES)
def test_layer(case: str) -> None:
    layer, shape, theirs = CASES[case]
    nn.name([layer])
    layout = Layout(nn.parameters([layer]), "float32")
    values = layout.zeros()
    layout.bind(values)
    layout.initialise(values, 0)
    random = np.random.default_rng(0)
    values += random.standard_normal(values.size).astype("float32") * 0.1
    x = random.standard_normal((6, *shape)).astype("float32")
    y, backward = layer(x, nn.At(training=True))
    dy = random.standard_normal(y.shape).astype("float32")
    grads = Gradients(layout, layout.zeros())
    dx = backward(dy, grads)

    tx, *weights = map(as_torch, (x, *(p.value for p in layout.parameters)))
    ty = theirs(tx, *weights)
    ty.backward(torch.from_numpy(dy))
    close(y, ty)
    close(dx, tx.grad)
    for parameter, weight in zip(layout.parameters, weights, strict=True):
        close(grads[parameter], weight.grad)


def close(mine: Array, theirs: Any) -> None:
    """Equal but for rounding, which is of the size of the largest values that are added up."""
    expected = theirs.detach().numpy()
    np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


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

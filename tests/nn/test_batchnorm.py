"""Batch normalisation: what it hands to the running averages, and evaluation by them."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.nn.layers import At, BatchNorm2d
from mpiml.nn.parameters import Gradients, Layout
from tests.nn.test_layers import slopes

TRAINING, EVALUATION = At(training=True), At(training=False)


def prepared(channels: int, dtype: str = "float64") -> tuple[BatchNorm2d, Gradients]:
    """A layer of which no parameter has a special value."""
    layer = BatchNorm2d(channels)
    parameters = [layer.gain, layer.bias, layer.running_mean, layer.running_variance]
    layout = Layout(parameters, dtype)
    layout.bind(layout.zeros())
    for number, parameter in enumerate(parameters):
        parameter.value[...] = np.random.default_rng(number).uniform(0.5, 2.0, channels)
    return layer, Gradients(layout, layout.zeros() + 1e30)


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape) * [1.0, 3.0] + [100.0, -2.0]


def test_training_makes_mean_bias_and_deviation_gain() -> None:
    layer, _ = prepared(2)
    y, _ = layer(images(50, 3, 4, 2), TRAINING)
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), layer.bias.value, rtol=1e-12)
    np.testing.assert_allclose(y.std(axis=(0, 1, 2)), layer.gain.value, rtol=1e-5)


def test_backward_hands_on_mean_and_unbiased_variance_times_rows() -> None:
    layer, grads = prepared(2)
    x = images(5, 3, 4, 2)
    layer(x, TRAINING)[1](x, grads)
    np.testing.assert_allclose(grads[layer.running_mean], 5 * x.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(grads[layer.running_variance], 5 * x.var(axis=(0, 1, 2), ddof=1), rtol=1e-12)


def test_a_single_value_of_a_channel_becomes_the_bias() -> None:
    layer, grads = prepared(2)
    x = images(1, 1, 1, 2)
    y, backward = layer(x, TRAINING)
    np.testing.assert_array_equal(y[0, 0, 0], layer.bias.value)
    assert not backward(np.ones(x.shape), grads).any()
    np.testing.assert_array_equal(grads[layer.running_mean], x[0, 0, 0])
    assert not grads[layer.running_variance].any()


def test_evaluation_is_by_running_averages_and_leaves_them() -> None:
    layer, grads = prepared(2)
    x, mean, variance = images(3, 2, 4, 2), layer.running_mean.value, layer.running_variance.value
    y, backward = layer(x, EVALUATION)
    expected = layer.gain.value * (x - mean) / np.sqrt(variance + 1e-5) + layer.bias.value
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    dy = np.random.default_rng(9).standard_normal(x.shape)
    gradients = {"dx": backward(dy, grads), "gain": grads[layer.gain], "bias": grads[layer.bias]}
    for name, where in {"dx": x, "gain": layer.gain.value, "bias": layer.bias.value}.items():
        by_hand = slopes(lambda: float(np.sum(layer(x, EVALUATION)[0] * dy)), where)
        np.testing.assert_allclose(gradients[name], by_hand, rtol=1e-6, atol=1e-8, err_msg=name)
    np.testing.assert_array_equal(grads[layer.running_mean], 3 * mean)
    np.testing.assert_array_equal(grads[layer.running_variance], 3 * variance)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_single_precision_is_kept_far_from_zero(mean: float) -> None:
    layer, _ = prepared(2, "float32")
    x = (np.random.default_rng(1).standard_normal((64, 28, 28, 2)) + mean).astype(np.float32)
    centred = x - x.mean(axis=(0, 1, 2), dtype=np.float64)
    normal = centred / np.sqrt(np.square(centred).mean(axis=(0, 1, 2)) + 1e-5)
    y, _ = layer(x, TRAINING)
    np.testing.assert_allclose(y, normal * layer.gain.value + layer.bias.value, atol=2e-5 if mean == 0 else 2e-4)

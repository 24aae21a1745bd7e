"""All layers alike: gradients against finite differences, micro-batches in flight, shapes and names."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from mpiml.nn import layers as nn
from mpiml.nn.layers import (
    GELU,
    AvgPool2d,
    BatchNorm2d,
    CausalSelfAttention,
    Conv2d,
    Embedding,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Layer,
    LayerNorm,
    Linear,
    MaxPool2d,
    PositionalEmbedding,
    ReLU,
    Reshape,
    Residual,
    RMSNorm,
    SiLU,
    Tanh,
)
from mpiml.nn.parameters import Gradients, Layout
from tests.nn.cases import AT, GARBAGE, Bench, every_case, named


def slopes(f: Callable[[], float], where: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """Central differences of f by every element of `where`, which f reads."""
    result = np.empty(where.shape)
    for index in np.ndindex(where.shape):
        kept = where[index]
        where[index] = kept + h
        above = f()
        where[index] = kept - h
        result[index] = (above - f()) / (2 * h)
        where[index] = kept
    return result


@every_case
def test_gradients_are_the_slopes(case: str) -> None:
    bench = Bench(case)
    x = bench.rows(4)
    dy = np.random.default_rng(9).standard_normal(bench.forward(x)[0].shape)

    def f() -> float:
        return float(np.sum(bench.forward(x)[0] * dy))

    dx, *gradients = bench.both(x)
    if not bench.tokens:
        np.testing.assert_allclose(dx, slopes(f, x), rtol=1e-6, atol=1e-8)
    for parameter, gradient in zip(bench.layout.parameters, gradients, strict=True):
        if parameter.momentum is not None:
            continue  # a statistic, in whose place something else is written
        np.testing.assert_allclose(gradient, slopes(f, parameter.value), rtol=1e-6, atol=1e-8, err_msg=parameter.name)


@every_case
def test_what_backward_calls_complete_stays_as_it_is(case: str) -> None:
    bench = Bench(case, skip_dx=True)
    completed: list[tuple[int, np.ndarray]] = []
    vector = bench.layout.zeros() + GARBAGE
    gradients = Gradients(bench.layout, vector, lambda offset: completed.append((offset, vector[offset:].copy())))
    for seed in range(2):
        completed.clear()
        gradients.begin()
        y, backward = bench.forward(bench.rows(4, seed))
        backward(np.random.default_rng(seed).standard_normal(y.shape), gradients)
        for offset, complete in completed:
            np.testing.assert_array_equal(vector[offset:], complete)
        if bench.layout.parameters:
            assert completed[-1][0] == 0
            with_matrices = [layer for layer in bench.layers if any(p.decay for p in nn.parameters([layer]))]
            assert len({offset for offset, _ in completed}) >= min(2, len(with_matrices))


@every_case
def test_microbatches_in_flight_do_not_mix(case: str) -> None:
    bench = Bench(case)
    xs, ats = [bench.rows(3, seed=0), bench.rows(2, seed=1)], [dataclasses.replace(AT, microbatch=m) for m in (0, 1)]
    alone = [bench.both(x, at) for x, at in zip(xs, ats, strict=True)]

    flying = [bench.forward(x, at) for x, at in zip(xs, ats, strict=True)]
    for m in (1, 0):
        y, backward = flying[m]
        grads = bench.gradients()
        dx = backward(np.random.default_rng(9).standard_normal(y.shape), grads)
        together = [np.zeros(xs[m].shape) if dx is None else dx, *(grads[p] for p in bench.layout.parameters)]
        for array, expected in zip(together, alone[m], strict=True):
            np.testing.assert_array_equal(array, expected)


@every_case
def test_nothing_given_or_held_is_written(case: str) -> None:
    bench = Bench(case)
    x = bench.rows(3)
    dy = np.random.default_rng(9).standard_normal(bench.forward(x)[0].shape)
    kept = x.copy(), dy.copy()
    for array in (x, dy, *(p.value for p in bench.layout.parameters)):
        array.flags.writeable = False  # a write raises
    y, backward = bench.forward(x)
    y.flags.writeable = False
    first, second = bench.gradients(), bench.gradients()
    dx = copy.copy(backward(dy, first))
    np.testing.assert_array_equal(backward(dy, second), dx)  # so nothing that it holds has changed
    np.testing.assert_array_equal(first.vector, second.vector)
    np.testing.assert_array_equal(x, kept[0])
    np.testing.assert_array_equal(dy, kept[1])


@every_case
@pytest.mark.filterwarnings("error")
def test_a_microbatch_without_rows_gives_zero_gradients(case: str) -> None:
    bench = Bench(case)
    dx, *gradients = bench.both(bench.rows(0))
    assert dx.shape == (0, *bench.shape)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@every_case
def test_numbers_keep_their_kind(case: str) -> None:
    bench = Bench(case, "float32")
    y, backward = bench.forward(bench.rows(3))
    assert y.dtype == np.float32
    dx = backward(np.ones(y.shape, np.float32), bench.gradients())
    assert bench.tokens or dx.dtype == np.float32


@every_case
def test_shape_is_known_beforehand(case: str) -> None:
    bench = Bench(case)
    y, _ = bench.forward(bench.rows(3))
    assert nn.stack_shapes(bench.layers, bench.shape)[-1] == y.shape[1:]


@pytest.mark.parametrize(
    ("layer", "x", "y"),
    [
        (ReLU(), [-2.0, 0.0, 3.0], [0, 0, 3]),
        (Tanh(), [0.0, math.log(2)], [0, 0.6]),  # (2 - 1/2) / (2 + 1/2)
        (GELU(), [-1.0, 0.0, 1.0, 2.0], [-0.158808, 0, 0.841192, 1.954598]),
        (SiLU(), [0.0, math.log(3), -1e4], [0, 0.75 * math.log(3), 0]),
        (LayerNorm(4), [1.0, 1.0, 3.0, 3.0], [-1, -1, 1, 1]),
        (RMSNorm(2), [1.0, 7.0], [0.2, 1.4]),  # the mean square is 25
        (GroupNorm(2, 4), [1.0, 3.0, 5.0, 5.0], [-1, 1, 0, 0]),
        (GroupNorm(1, 2), [[1.0, 1.0], [3.0, 3.0]], [[-1, -1], [1, 1]]),
        (MaxPool2d(), [[[1.0], [2.0], [9.0]], [[4.0], [-3.0], [9.0]]], [[[4]]]),
        (AvgPool2d(), [[[1.0], [2.0], [9.0]], [[4.0], [-3.0], [9.0]]], [[[1]]]),
        (GlobalAvgPool(), [[[1.0, 5.0], [2.0, 7.0]]], [1.5, 6]),
        (Reshape((2, 1)), [4.0, 5.0], [[4], [5]]),
        (LayerNorm(2, epsilon=3.0), [1.0, 3.0], [-0.5, 0.5]),  # 1 / sqrt(1 + 3)
        (Residual(ReLU()), [-2.0, 3.0], [-2, 6]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Layer) else "",
)
def test_values_by_hand(layer: Layer, x: list, y: list) -> None:
    for parameter in nn.parameters([layer]):
        parameter.value = parameter.init(np.random.default_rng(), parameter.shape)
    np.testing.assert_allclose(layer(np.array([x]), AT)[0], [y], rtol=1e-5)


@pytest.mark.parametrize("case", ["linear", "layer norm", "residual", "stack"])
def test_a_gradient_that_nobody_reads_changes_no_other(case: str) -> None:
    x = Bench(case).rows(3)
    _, *expected = Bench(case).both(x)
    _, *partial = Bench(case, skip_dx=True).both(x)
    assert partial
    for array, other in zip(partial, expected, strict=True):
        np.testing.assert_array_equal(array, other)


@every_case
def test_frozen_parameters_change_no_gradient_of_others(case: str) -> None:
    """Each by itself, and all that an optimizer would change; what is written for them goes nowhere else."""
    bench = Bench(case)
    x, count = bench.rows(3), len(bench.layout.parameters)
    dx, *expected = bench.both(x)
    for frozen in [*({index} for index in range(count)), set(range(count))]:
        one = Bench(case, frozen=frozen)
        for parameter, other in zip(one.layout.parameters, bench.layout.parameters, strict=True):
            parameter.value[...] = other.value
        before = one.values.copy()
        y, backward = one.forward(x)
        grads = Gradients(one.layout, one.layout.zeros(gradients=True))
        got = backward(np.random.default_rng(9).standard_normal(y.shape), grads)
        if got is not None:
            np.testing.assert_array_equal(got, dx)
        for parameter, gradient in zip(one.layout.parameters, expected, strict=True):
            if not parameter.frozen:
                np.testing.assert_array_equal(grads[parameter], gradient)
        assert one.values.tobytes() == before.tobytes()


@pytest.mark.parametrize("layer", [Linear(3, 4), Conv2d(2, 3), Embedding(5, 4)])
def test_no_gradient_of_a_large_parameter_is_computed_for_nothing(layer: Layer) -> None:
    for parameter in nn.parameters([layer]):
        parameter.rate, parameter.value = 0.0, np.ones(parameter.shape)
    layout = Layout(nn.parameters([layer]), "float64")
    x = np.ones((2, 3)) if not isinstance(layer, Conv2d) else np.ones((2, 4, 4, 2))
    y, backward = layer(x, AT)
    grads = Gradients(layout, layout.zeros(gradients=True))
    grads[layer.weight].fill(7.5)  # type: ignore[attr-defined]
    backward(y, grads)
    assert (grads[layer.weight] == 7.5).all()  # type: ignore[attr-defined]


def test_only_the_first_layer_with_parameters_skips_dx() -> None:
    bench = Bench("stack", skip_dx=True)
    assert [layer.needs_dx for layer in bench.layers] == [False, False, True, True, True, True, True]
    y, backward = bench.forward(bench.rows(2))
    assert backward(np.ones(y.shape), bench.gradients()) is None


@pytest.mark.parametrize(
    ("layer", "given", "named"),
    [
        (Linear(3, 4), (5,), ["3", "(5,)"]),
        (Linear(3, 4), (), ["3", "()"]),
        (LayerNorm(6), (2, 5), ["6", "(2, 5)"]),
        (RMSNorm(6), (2, 5), ["6", "(2, 5)"]),
        (GroupNorm(2, 6), (2, 5), ["6", "(2, 5)"]),
        (BatchNorm2d(3), (8, 8), ["(H, W, 3)", "(8, 8)"]),
        (BatchNorm2d(3), (8, 8, 1), ["(H, W, 3)", "(8, 8, 1)"]),
        (Conv2d(3, 4), (8, 8), ["(H, W, 3)", "(8, 8)"]),
        (Conv2d(3, 4), (8, 8, 1), ["(H, W, 3)", "(8, 8, 1)"]),
        (Conv2d(3, 4, 5, padding=1), (8, 2, 3), ["at least 3", "(8, 2, 3)"]),
        (MaxPool2d(), (8, 1, 3), ["at least 2", "(8, 1, 3)"]),
        (AvgPool2d(3), (8,), ["at least 3", "(8,)"]),
        (GlobalAvgPool(), (8, 8), ["(H, W, channels)", "(8, 8)"]),
        (Reshape((2, 3)), (7,), ["6", "(7,)"]),
        (PositionalEmbedding(3, 4), (2, 4), ["(3, 4)", "(2, 4)"]),
        (CausalSelfAttention(4, 2), (3, 5), ["(T, 4)", "(3, 5)"]),
        (CausalSelfAttention(4, 2), (4,), ["(T, 4)", "(4,)"]),
        (Residual(Linear(3, 4)), (3,), ["(3,)", "(4,)"]),
        (Residual(Linear(3, 3)), (7,), ["3", "(7,)"]),
    ],
)
def test_shapes_that_do_not_fit_are_both_named(layer: Layer, given: tuple[int, ...], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        layer.output_shape(given)
    assert all(shape in str(error.value) for shape in named)


def test_names_are_paths() -> None:
    bench = Bench("stack")
    assert list(named(bench.layout, bench.values)) == [
        *("layers.1.weight", "layers.1.bias", "layers.3.gain", "layers.3.bias"),
        *("layers.4.layers.0.weight", "layers.4.layers.0.bias", "layers.6.weight", "layers.6.bias"),
    ]


def test_operations_are_counted() -> None:
    layers = [Flatten(), Linear(6, 5), ReLU(), Residual(Linear(5, 5)), Linear(5, 2)]
    assert nn.stack_flops(layers, (2, 3)) == [0, 2 * 6 * 5, 5, 2 * 5 * 5 + 5, 2 * 5 * 2]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GroupNorm(3, 8), ["3 groups", "8 channels"]),
        (lambda: CausalSelfAttention(8, 3), ["3 heads", "8 features"]),
        (lambda: Conv2d(1, 1, 3, padding=3), ["padding 3", "kernel 3"]),
        (lambda: Conv2d(1, 1, 3, stride=0), ["stride 0"]),
        (lambda: MaxPool2d(0), ["MaxPool2d(0)"]),
        (lambda: BatchNorm2d(4, momentum=1.5), ["BatchNorm2d(4)", "momentum 1.5"]),
    ],
)
def test_sizes_that_cannot_be_are_refused(make: Callable[[], Layer], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in named)


@pytest.mark.parametrize(
    "case", ["gelu", "layer norm", "rms norm of two axes", "batch norm", "convolution", "convolution, stride 2"]
)
def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    bench = Bench(case)
    x = bench.rows(5)
    whole = [bench.forward(x)[0], *bench.both(x)]
    monkeypatch.setattr("mpiml.nn.convolution.CACHE", 2000)
    monkeypatch.setattr("mpiml.nn.tiling.tiles.__defaults__", (100,))
    for part, expected in zip([bench.forward(x)[0], *bench.both(x)], whole, strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-12, atol=1e-13)

"""Layers: gradients against finite differences, micro-batches in flight, dropout's keys, shapes and names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from mpiml.nn import layers as nn
from mpiml.nn.layers import GELU, At, Dropout, Flatten, Layer, LayerNorm, Linear, ReLU, Residual, Tanh
from mpiml.nn.parameters import Gradients, Layout

AT = At(training=True, seed=3, step=5, microbatch=2)
GARBAGE = 1e30  # what gradients hold before `backward`: a backward that adds, or leaves some out, is seen

Stack = Callable[[], list[Layer]]
CASES: dict[str, tuple[Stack, tuple[int, ...]]] = {
    "linear": (lambda: [Linear(3, 4)], (3,)),
    "relu": (lambda: [ReLU()], (5,)),
    "tanh": (lambda: [Tanh()], (5,)),
    "gelu": (lambda: [GELU()], (5,)),
    "layer norm": (lambda: [LayerNorm(6)], (6,)),
    "layer norm of two axes": (lambda: [LayerNorm(5)], (2, 5)),
    "layer norm, large epsilon": (lambda: [LayerNorm(4, epsilon=0.5)], (4,)),
    "dropout": (lambda: [Dropout(0.4)], (9,)),
    "flatten": (lambda: [Flatten()], (2, 3)),
    "residual": (lambda: [Residual(Linear(4, 4))], (4,)),
    "residual of a stack": (lambda: [Residual(Linear(4, 6), Tanh(), Dropout(0.3), Linear(6, 4))], (4,)),
    "residual in residual": (lambda: [Residual(Tanh(), Residual(Linear(3, 3), GELU()))], (3,)),
    "stack": (
        lambda: [
            Flatten(),
            Linear(6, 5),
            GELU(),
            LayerNorm(5),
            Residual(Linear(5, 5), ReLU()),
            Dropout(0.2),
            Linear(5, 2),
        ],
        (2, 3),
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


class Bench:
    """A case's layers with parameters in one vector, none of them at a special value."""

    def __init__(self, case: str, dtype: str = "float64", skip_first_dx: bool = False):
        build, self.shape = CASES[case]
        self.layers = build()
        nn.name(self.layers)
        if skip_first_dx:
            nn.skip_first_dx(self.layers)
        self.layout = Layout(nn.parameters(self.layers), dtype)
        self.values = self.layout.zeros()
        self.layout.bind(self.values)
        self.values[...] = np.random.default_rng(1).uniform(0.3, 1.2, self.values.size)
        self.values[::2] *= -1

    def rows(self, count: int, seed: int = 0) -> np.ndarray:
        """Inputs at a distance from 0, where ReLU has no derivative."""
        random = np.random.default_rng(seed)
        x = random.uniform(0.1, 1.5, (count, *self.shape)) * random.choice([-1.0, 1.0], (count, *self.shape))
        return x.astype(self.layout.dtype)

    def gradients(self) -> Gradients:
        vector = self.layout.zeros()
        vector += GARBAGE
        return Gradients(self.layout, vector)

    def forward(self, x: np.ndarray, at: At = AT) -> tuple[np.ndarray, nn.Backward]:
        return nn.forward(self.layers, x, at)

    def both(self, x: np.ndarray, at: At = AT, seed: int = 9) -> list[np.ndarray]:
        """Forward and backward of some dy: dx and the gradient of every parameter."""
        y, backward = self.forward(x, at)
        dy = np.random.default_rng(seed).standard_normal(y.shape).astype(y.dtype)
        grads = self.gradients()
        dx = backward(dy, grads)
        return [dx, *(grads[p].copy() for p in self.layout.parameters)]


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

    dx, *found = bench.both(x)
    np.testing.assert_allclose(dx, slopes(f, x), rtol=1e-6, atol=1e-8)
    for parameter, gradient in zip(bench.layout.parameters, found, strict=True):
        np.testing.assert_allclose(gradient, slopes(f, parameter.value), rtol=1e-6, atol=1e-8, err_msg=parameter.name)


@every_case
def test_what_backward_calls_complete_stays_as_it_is(case: str) -> None:
    bench = Bench(case, skip_first_dx=True)
    told: list[tuple[int, np.ndarray]] = []
    vector = bench.layout.zeros() + GARBAGE
    gradients = Gradients(bench.layout, vector, lambda offset: told.append((offset, vector[offset:].copy())))
    for seed in range(2):
        told.clear()
        gradients.begin()
        y, backward = bench.forward(bench.rows(4, seed))
        backward(np.random.default_rng(seed).standard_normal(y.shape), gradients)
        for offset, complete in told:
            np.testing.assert_array_equal(vector[offset:], complete)
        if bench.layout.parameters:
            assert told[-1][0] == 0
            assert len({offset for offset, _ in told}) >= min(2, sum(p.decay for p in bench.layout.parameters))


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
        together = [dx, *(grads[p] for p in bench.layout.parameters)]
        for mine, expected in zip(together, alone[m], strict=True):
            np.testing.assert_array_equal(mine, expected)


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
    dx = backward(dy, first).copy()
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
    assert backward(np.ones(y.shape, np.float32), bench.gradients()).dtype == np.float32


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
        (LayerNorm(4), [1.0, 1.0, 3.0, 3.0], [-1, -1, 1, 1]),
        (LayerNorm(2, epsilon=3.0), [1.0, 3.0], [-0.5, 0.5]),  # 1 / sqrt(1 + 3)
        (Residual(ReLU()), [-2.0, 3.0], [-2, 6]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Layer) else "",
)
def test_values_by_hand(layer: Layer, x: list[float], y: list[float]) -> None:
    for parameter in nn.parameters([layer]):
        parameter.value = parameter.init(np.random.default_rng(), parameter.shape)
    np.testing.assert_allclose(layer(np.array([x]), AT)[0], [y], rtol=1e-5)


def test_linear_by_hand() -> None:
    layer = Linear(2, 3)
    layer.weight.value, layer.bias.value = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), np.array([10.0, 20.0, 30.0])
    np.testing.assert_array_equal(layer(np.array([[1.0, 10.0]]), AT)[0], [[51, 72, 93]])


@pytest.mark.parametrize("case", ["linear", "layer norm", "residual", "stack"])
def test_a_gradient_that_nobody_reads_changes_no_other(case: str) -> None:
    x = Bench(case).rows(3)
    _, *expected = Bench(case).both(x)
    _, *found = Bench(case, skip_first_dx=True).both(x)
    assert found
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_only_the_first_layer_with_parameters_skips_dx() -> None:
    bench = Bench("stack", skip_first_dx=True)
    assert [layer.needs_dx for layer in bench.layers] == [False, False, True, True, True, True, True]
    y, backward = bench.forward(bench.rows(2))
    assert backward(np.ones(y.shape), bench.gradients()) is None


@pytest.mark.parametrize(
    ("layer", "given", "named"),
    [
        (Linear(3, 4), (5,), ["(3,)", "(5,)"]),
        (Linear(3, 4), (2, 3), ["(3,)", "(2, 3)"]),
        (LayerNorm(6), (2, 5), ["6", "(2, 5)"]),
        (Residual(Linear(3, 4)), (3,), ["(3,)", "(4,)"]),
        (Residual(Linear(3, 3)), (7,), ["(3,)", "(7,)"]),
    ],
)
def test_shapes_that_do_not_fit_are_both_named(layer: Layer, given: tuple[int, ...], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        layer.output_shape(given)
    assert all(shape in str(error.value) for shape in named)


def test_names_are_paths() -> None:
    bench = Bench("stack")
    assert list(bench.layout.named(bench.values)) == [
        *("layers.1.weight", "layers.1.bias", "layers.3.gain", "layers.3.bias"),
        *("layers.4.layers.0.weight", "layers.4.layers.0.bias", "layers.6.weight", "layers.6.bias"),
    ]


def test_operations_are_counted() -> None:
    layers = [Flatten(), Linear(6, 5), ReLU(), Residual(Linear(5, 5)), Linear(5, 2)]
    assert nn.stack_flops(layers, (2, 3)) == [0, 2 * 6 * 5, 5, 2 * 5 * 5 + 5, 2 * 5 * 2]


def dropped(at: At = AT, path: str = "layers.0", rate: float = 0.3, rows: int = 400) -> np.ndarray:
    layer = Dropout(rate)
    layer.path = path
    return layer(np.ones((rows, 50)), at)[0]


def test_dropout_is_a_function_of_its_place_in_the_run() -> None:
    np.testing.assert_array_equal(dropped(), dropped())
    others = [dropped(dataclasses.replace(AT, **{key: 9})) for key in ("seed", "step", "microbatch")]
    for other in [*others, dropped(path="layers.1")]:
        assert 0.3 < np.mean(other != dropped()) < 0.5  # independent masks differ in 2 x 0.3 x 0.7 = 0.42


def test_dropout_keeps_the_mean() -> None:
    y = dropped()
    assert set(np.unique(y)) == {0.0, 1 / 0.7}
    assert y.mean() == pytest.approx(1, abs=0.02)  # four standard deviations


def test_dropout_is_off_in_evaluation_and_at_rate_0() -> None:
    np.testing.assert_array_equal(dropped(nn.At(training=False)), np.ones((400, 50)))
    np.testing.assert_array_equal(dropped(rate=0.0), np.ones((400, 50)))


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_rate_is_a_probability_below_1(rate: float) -> None:
    with pytest.raises(ValueError, match="dropout rate"):
        Dropout(rate)

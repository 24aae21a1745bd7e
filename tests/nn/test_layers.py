"""Layers: gradients against finite differences, micro-batches in flight, dropout's keys, shapes and names."""

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
    At,
    AvgPool2d,
    BatchNorm2d,
    CausalSelfAttention,
    Conv2d,
    Dropout,
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

AT = At(training=True, seed=3, step=5, microbatch=2)
TOKENS = 7
GARBAGE = 1e30  # what gradients hold before `backward`: a backward that adds, or leaves some out, is seen

Stack = Callable[[], list[Layer]]
CASES: dict[str, tuple[Stack, tuple[int, ...]]] = {
    "linear": (lambda: [Linear(3, 4)], (3,)),
    "linear of two axes": (lambda: [Linear(3, 4)], (2, 3)),
    "relu": (lambda: [ReLU()], (5,)),
    "tanh": (lambda: [Tanh()], (5,)),
    "gelu": (lambda: [GELU()], (5,)),
    "silu": (lambda: [SiLU()], (5,)),
    "layer norm": (lambda: [LayerNorm(6)], (6,)),
    "layer norm of two axes": (lambda: [LayerNorm(5)], (2, 5)),
    "layer norm, large epsilon": (lambda: [LayerNorm(4, epsilon=0.5)], (4,)),
    "rms norm": (lambda: [RMSNorm(6)], (6,)),
    "rms norm of two axes": (lambda: [RMSNorm(5)], (2, 5)),
    "group norm": (lambda: [GroupNorm(2, 6)], (3, 2, 6)),
    "group norm of one group": (lambda: [GroupNorm(1, 4)], (2, 2, 4)),
    "group norm of each channel": (lambda: [GroupNorm(3, 3)], (2, 2, 3)),
    "group norm of one axis": (lambda: [GroupNorm(2, 8)], (8,)),
    "batch norm": (lambda: [BatchNorm2d(3)], (4, 2, 3)),
    "batch norm of one place": (lambda: [BatchNorm2d(2, epsilon=0.5)], (1, 1, 2)),
    "convolution": (lambda: [Conv2d(2, 3)], (4, 5, 2)),
    "convolution of one channel": (lambda: [Conv2d(1, 2)], (3, 3, 1)),
    "convolution without padding": (lambda: [Conv2d(2, 3, padding=0)], (4, 3, 2)),
    "convolution, stride 2": (lambda: [Conv2d(2, 3, stride=2)], (5, 4, 2)),
    "convolution, stride 2, a rest": (lambda: [Conv2d(1, 2, stride=2, padding=0)], (6, 5, 1)),
    "convolution, stride beyond kernel": (lambda: [Conv2d(1, 2, 2, 3, 1)], (6, 7, 1)),
    "convolution 1 x 1": (lambda: [Conv2d(3, 2, 1)], (2, 3, 3)),
    "convolution 5 x 5, stride 3": (lambda: [Conv2d(1, 2, 5, 3, 1)], (7, 8, 1)),
    "max pool": (lambda: [MaxPool2d()], (4, 6, 2)),
    "max pool with a rest": (lambda: [MaxPool2d(2)], (5, 3, 2)),
    "max pool of three": (lambda: [MaxPool2d(3)], (3, 7, 1)),
    "average pool": (lambda: [AvgPool2d()], (4, 2, 2)),
    "average pool with a rest": (lambda: [AvgPool2d(3)], (4, 5, 2)),
    "global average pool": (lambda: [GlobalAvgPool()], (2, 3, 4)),
    "images": (
        lambda: [Reshape((4, 4, 1)), Conv2d(1, 4), GroupNorm(2, 4), SiLU(), MaxPool2d(), Conv2d(4, 2), GlobalAvgPool()],
        (16,),
    ),
    "images, batch norm": (
        lambda: [Conv2d(1, 3), BatchNorm2d(3), SiLU(), Residual(BatchNorm2d(3), Conv2d(3, 3)), GlobalAvgPool()],
        (3, 2, 1),
    ),
    "embedding": (lambda: [Embedding(TOKENS, 4)], (5,)),
    "embedding of one id a row": (lambda: [Embedding(TOKENS, 4)], ()),
    "positional embedding": (lambda: [PositionalEmbedding(3, 4)], (3, 4)),
    "attention": (lambda: [CausalSelfAttention(6, 2)], (5, 6)),
    "attention of one head": (lambda: [CausalSelfAttention(4, 1)], (3, 4)),
    "attention of one place": (lambda: [CausalSelfAttention(4, 2)], (1, 4)),
    "tokens": (
        lambda: [
            Embedding(TOKENS, 4),
            PositionalEmbedding(3, 4),
            Residual(LayerNorm(4), CausalSelfAttention(4, 2)),
            Residual(RMSNorm(4), Linear(4, 5), GELU(), Linear(5, 4)),
            LayerNorm(4),
            Linear(4, TOKENS),
        ],
        (3,),
    ),
    "dropout": (lambda: [Dropout(0.4)], (9,)),
    "flatten": (lambda: [Flatten()], (2, 3)),
    "reshape": (lambda: [Reshape((3, 2, 1))], (2, 3)),
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
TAKE_TOKENS = {"embedding", "embedding of one id a row", "tokens"}  # whose input has no gradient
every_case = pytest.mark.parametrize("case", CASES)


class Bench:
    """A case's layers with parameters in one vector, none of them at a special value."""

    def __init__(self, case: str, dtype: str = "float64", skip_first_dx: bool = False):
        build, self.shape = CASES[case]
        self.tokens = case in TAKE_TOKENS
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
        if self.tokens:
            return random.integers(0, TOKENS - 1, (count, *self.shape)).astype(self.layout.dtype)  # the last is rare
        x = random.uniform(0.1, 1.5, (count, *self.shape)) * random.choice([-1.0, 1.0], (count, *self.shape))
        return x.astype(self.layout.dtype)

    def gradients(self) -> Gradients:
        vector = self.layout.zeros()
        vector += GARBAGE
        return Gradients(self.layout, vector)

    def forward(self, x: np.ndarray, at: At = AT) -> tuple[np.ndarray, nn.Backward]:
        return nn.forward(self.layers, x, at)

    def both(self, x: np.ndarray, at: At = AT, seed: int = 9) -> list[np.ndarray]:
        """Forward and backward of some dy: dx, zero where there is none, and the gradient of every parameter."""
        y, backward = self.forward(x, at)
        dy = np.random.default_rng(seed).standard_normal(y.shape).astype(y.dtype)
        grads = self.gradients()
        dx = backward(dy, grads)
        assert dx is not None or self.tokens or not self.layers[0].needs_dx
        return [np.zeros(x.shape) if dx is None else dx, *(grads[p].copy() for p in self.layout.parameters)]


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
    if not bench.tokens:
        np.testing.assert_allclose(dx, slopes(f, x), rtol=1e-6, atol=1e-8)
    for parameter, gradient in zip(bench.layout.parameters, found, strict=True):
        if parameter.momentum is not None:
            continue  # a statistic, in whose place something else is written
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
            with_matrices = [layer for layer in bench.layers if any(p.decay for p in nn.parameters([layer]))]
            assert len({offset for offset, _ in told}) >= min(2, len(with_matrices))


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


def test_equal_values_in_a_window_share_no_gradient() -> None:
    x = np.zeros((1, 2, 2, 1))
    x[0, 1, :] = 5
    _, backward = MaxPool2d()(x, AT)
    np.testing.assert_array_equal(backward(np.full((1, 1, 1, 1), 3.0), None)[0, :, :, 0], [[0, 0], [3, 0]])


def test_a_place_sees_none_that_comes_later() -> None:
    bench = Bench("attention")
    x = bench.rows(2)
    y, _ = bench.forward(x)
    x[:, 3:] += 1
    changed, _ = bench.forward(x)
    np.testing.assert_array_equal(changed[:, :3], y[:, :3])
    assert np.all(changed[:, 3:] != y[:, 3:])


@pytest.mark.parametrize("queries", [1, 2, 3])
def test_attention_in_blocks_is_attention(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    bench = Bench("attention")
    x = bench.rows(2)
    whole = [bench.forward(x)[0], *bench.both(x)]
    monkeypatch.setattr("mpiml.nn.attention.QUERIES", queries)
    for part, expected in zip([bench.forward(x)[0], *bench.both(x)], whole, strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-12, atol=1e-13)


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


def test_large_scores_do_not_overflow() -> None:
    bench = Bench("attention", "float32")
    y, backward = bench.forward(bench.rows(2) * 1e4)
    assert np.isfinite(y).all()
    assert np.isfinite(backward(y, bench.gradients())).all()


def test_group_norm_of_large_images_far_from_zero_is_as_exact_as_float32_allows() -> None:
    """Whose mean is 100 deviations: half a unit in the last place of an input is 4e-6 of a deviation."""
    x = np.random.default_rng(0).normal(100, 1, (1, 150, 150, 4)).astype(np.float32)
    (layer,) = layers = [GroupNorm(2, 4)]
    layout = Layout(nn.parameters(layers), "float32")
    layout.bind(layout.zeros())
    layer.gain.value[...] = 1
    exact = x.reshape(-1, 2, 2).astype(np.float64)
    exact = (exact - exact.mean(axis=(0, 2), keepdims=True)) / np.sqrt(exact.var(axis=(0, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(x, AT)[0], exact.reshape(x.shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("token", [-1, TOKENS])
def test_a_token_that_has_no_vector_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match=f"{token}.*0 to {TOKENS - 1}"):
        Bench("embedding").forward(np.array([[0.0, 1, 2, 3, token]]))


def test_equal_tokens_add_their_gradients() -> None:
    bench = Bench("embedding")
    grads, (weight,) = bench.gradients(), bench.layout.parameters
    y, backward = bench.forward(np.array([[2.0, 5, 2, 2, 0]]))
    np.testing.assert_array_equal(y[0], weight.value[[2, 5, 2, 2, 0]])
    backward(np.arange(5.0)[None, :, None] * np.ones(4), grads)
    np.testing.assert_array_equal(grads[weight], np.array([4, 0, 0 + 2 + 3, 0, 0, 1, 0])[:, None] * np.ones(4))

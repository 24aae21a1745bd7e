"""The flat vector of parameters: alignment, padding, views, blocks and first values."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from mpiml.errors import ConfigError
from mpiml.nn import layers as nn
from mpiml.nn import optimizers, parameters
from mpiml.nn.layers import LayerNorm, Linear, ReLU, Residual
from mpiml.nn.parameters import Gradients, Layout, Parameter, Statistic, constant, normal, uniform
from mpiml.nn.perceptrons import mlp
from mpiml.vectors import ALIGNMENT, BLOCK, Operands
from tests.nn.cases import named

both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def model() -> list[nn.Layer]:
    layers = [Linear(3, 5), ReLU(), LayerNorm(5), Residual(Linear(5, 5)), Linear(5, 2)]
    nn.name(layers)
    return layers


def layout_of(layers: list[nn.Layer], dtype: str = "float64") -> Layout:
    return Layout(nn.parameters(layers), dtype)


def blocky() -> Layout:
    """Parameters shorter than a block, of exactly one, a little longer, and of several."""
    sizes = [(7,), (BLOCK,), (BLOCK + 1,), (3, BLOCK), (5, 5)]
    return Layout([Parameter(size, constant(0.0)) for size in sizes], "float32")


def padding(layout: Layout) -> np.ndarray:
    """Which elements of the vector belong to no parameter."""
    free = np.ones(layout.size, bool)
    for parameter, offset in layout.offsets.items():
        free[offset : offset + parameter.size] = False
    return free


@both_dtypes
def test_every_parameter_starts_on_a_cache_line(dtype: str) -> None:
    layout = layout_of(model(), dtype)
    for _ in range(5):  # malloc alone would be lucky now and then
        vector = layout.zeros()
        assert all(view.ctypes.data % ALIGNMENT == 0 for _, view in layout.views(vector))


@pytest.mark.parametrize("layout", [layout_of(model()), layout_of(model(), "float32"), blocky()])
def test_parameters_lie_apart_and_padding_is_short(layout: Layout) -> None:
    spans = sorted((offset, offset + p.size) for p, offset in layout.offsets.items())
    spans.append((layout.size, layout.size))
    line = ALIGNMENT // layout.dtype.itemsize
    assert len(layout.offsets) == len(layout.parameters)
    assert spans[0][0] == 0
    assert all(0 <= after[0] - before[1] < line for before, after in itertools.pairwise(spans))


def test_views_are_the_vector() -> None:
    layers = model()
    layout = layout_of(layers)
    values = layout.zeros()
    layout.bind(values)
    layers[0].weight.value[1, 2] = 7
    assert values[layout.offsets[layers[0].weight] + 1 * 5 + 2] == 7
    values += 1
    assert layers[0].weight.value[1, 2] == 8
    for parameter in layout.parameters:
        assert parameter.value.shape == parameter.shape
        assert np.shares_memory(parameter.value, values)
        assert np.shares_memory(Gradients(layout, values)[parameter], parameter.value)


def test_decaying_parameters_come_last_in_layer_order() -> None:
    layout = layout_of(model())
    decays = [p.decay for p, _ in sorted(layout.offsets.items(), key=lambda item: item[1])]
    assert decays == [False] * 5 + [True] * 3
    assert [p for p in layout.offsets if p.decay] == [p for p in layout.parameters if p.decay]
    assert [p.decay for p in layout.parameters] != decays  # while names keep the order of the layers
    assert list(named(layout, layout.zeros()))[:3] == ["layers.0.weight", "layers.0.bias", "layers.2.gain"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_complete_down_to_the_first_that_is_missing(order: tuple[int, ...]) -> None:
    layout = Layout([Parameter((3, 3), constant(0.0)) for _ in range(4)], "float64")  # at 0, 16, 32 and 48
    offsets: list[int] = []
    gradients = Gradients(layout, layout.zeros(), offsets.append)
    for _ in range(2):
        offsets.clear()
        gradients.begin()
        for index in order:
            gradients.finished([layout.parameters[index]])
        missing = [set(order[count:]) for count in range(1, 5)]
        assert offsets == [16 * max(left) + 9 if left else 0 for left in missing]


def test_statistics_come_first_and_do_not_decay() -> None:
    """First is last: backward completes the vector from its end, and nothing with decay has to wait for them."""
    made = [Parameter((3, 3), constant(0.0)), Statistic((3,), constant(0.0), 0.1), Parameter((2,), constant(0.0))]
    made += [Statistic((3, 3), constant(0.0), 0.2), Parameter((2, 2), constant(0.0))]
    layout = Layout(made, "float64")
    assert list(layout.offsets) == [made[1], made[3], made[2], made[0], made[4]]
    assert [block.momentum for block in layout.blocks()] == [0.1, 0.2, None, None, None]
    assert [block.decay for block in layout.blocks()] == [False, False, False, True, True]
    assert layout.parameters == made


def test_what_is_frozen_lies_behind_all_that_is_updated() -> None:
    """And nothing but the vector of values is long enough to hold it."""
    made = [Parameter((3, 3), constant(0.0)), Statistic((3,), constant(0.0), 0.1), Parameter((2,), constant(0.0))]
    made += [
        Parameter((BLOCK + 1,), constant(0.0)),
        Statistic((5,), constant(0.0), 0.2),
        Parameter((2, 2), constant(0.0)),
    ]
    for parameter, rate in zip(made, [0.0, 0.0, 1.0, 0.0, 1.0, 10.0], strict=True):
        parameter.rate = rate
    layout = Layout(made, "float64")
    assert list(layout.offsets) == [made[1], made[4], made[2], made[5], made[3], made[0]]
    assert layout.updated == layout.offsets[made[3]] == 4 * 8
    assert layout.size == 4 * 8 + BLOCK + 8 + 16
    assert [(block.momentum, block.rate) for block in layout.blocks()][2:] == [(None, 1.0), (None, 10.0)]
    assert [parameter for parameter, _ in layout.views(layout.zeros())] == made
    assert [parameter for parameter, _ in layout.views(layout.zeros(gradients=True))] == [made[1], made[2], *made[4:]]
    offsets: list[int] = []
    gradients = Gradients(layout, vector := layout.zeros(gradients=True), offsets.append)
    for parameter in reversed(made):
        gradients[parameter].fill(3.0)
        gradients.finished([parameter])
    assert offsets == [18, 18, 18, 3, 0, 0]
    assert vector.sum() == 3 * (3 + 5 + 2 + 4)


def test_ranks_compare_rates() -> None:
    one, other = Parameter((2,), constant(0.0)), Parameter((2,), constant(0.0))
    assert one.described(0) == other.described(0)
    other.rate = 0.5
    assert one.described(0) != other.described(0)


def test_matrices_decay_unless_said_otherwise() -> None:
    assert Parameter((2, 2), constant(0.0)).decay
    assert not Parameter((2,), constant(0.0)).decay
    assert not Parameter((2, 2), constant(0.0), decay=False).decay


def test_blocks_cover_each_parameter_from_its_own_start() -> None:
    layout = blocky()
    blocks = layout.blocks()
    assert [b.start for b in blocks] == sorted(b.start for b in blocks)
    for parameter, offset in layout.offsets.items():
        own = [b for b in blocks if offset <= b.start < offset + parameter.size]
        assert own[0].start == offset
        assert own[-1].stop == offset + parameter.size
        assert all(left.stop == right.start for left, right in itertools.pairwise(own))
        assert all(b.stop - b.start == BLOCK for b in own[:-1])
        assert 0 < own[-1].stop - own[-1].start <= BLOCK
        assert {b.decay for b in own} == {parameter.decay}
    assert sum(b.stop - b.start for b in blocks) == sum(p.size for p in layout.parameters)


def test_blocks_of_a_parameter_do_not_depend_on_its_neighbours() -> None:
    # Norms are sums over blocks: were they cut elsewhere on another stage, their bits would change with the grid.
    lengths = [b.stop - b.start for b in blocky().blocks()]
    assert lengths == [7] + [BLOCK] + [BLOCK, 1] + [BLOCK] * 3 + [25]


def test_blocks_number_the_matrices_of_an_optimizer_with_norms() -> None:
    layout = blocky()
    layerwise = Layout(layout.parameters, "float32", layerwise=True)
    assert [block.matrix for block in layerwise.blocks()] == [None] * 4 + [0] * 3 + [1]
    assert {block.matrix for block in layout.blocks()} == {None}


def test_without_weight_decay_blocks_are_of_one_kind() -> None:
    layout = blocky()
    plain = Layout(layout.parameters, "float32", layerwise=True, decays=False)
    assert {block.decay for block in layout.blocks()} == {False, True}
    assert {block.decay for block in plain.blocks()} == {False}
    assert plain.offsets == layout.offsets
    assert [block.matrix for block in plain.blocks()] == [None] * 4 + [0] * 3 + [1]


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "lars", "adam", "adamw", "lamb"])
@both_dtypes
def test_padding_stays_zero(name: str, dtype: str) -> None:
    layout = layout_of(model(), dtype)
    values, spare = layout.zeros(), layout.zeros()
    layout.bind(values)
    layout.initialise(values, seed=0)
    optimizer = optimizers.build(name, 0.9, 0.1)
    states = [layout.zeros() for _ in optimizer.states]
    for step in (1, 2, 3):
        gradient = layout.zeros()
        for _, view in layout.views(gradient):
            view[...] = np.random.default_rng(step).standard_normal(view.shape)
        on = Operands(values, states, (layout.zeros(), spare), gradient, True)
        optimizer.prepare(on, 1.0, step)
        optimizer.update(on, 1.0, 0.1, step)
    free = padding(layout)
    assert free.any()
    for vector in (values, *states):
        assert not vector[free].any()
        assert vector[~free].all()  # the update has been everywhere else


@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 4), slice(4, 5)])
@both_dtypes
def test_first_values_depend_on_seed_and_name_alone(part: slice, dtype: str) -> None:
    layers = model()
    whole, some = layout_of(layers, dtype), layout_of(layers[part], dtype)
    everything, values = whole.zeros(), some.zeros()
    whole.initialise(everything, seed=4)
    some.initialise(values, seed=4)
    assert named(some, values)
    for name, view in named(some, values).items():
        np.testing.assert_array_equal(view, named(whole, everything)[name])


def ordered() -> Callable[[np.random.Generator, int], np.ndarray]:
    """An init that knows how often it has been called, as one does that hands out an array that exists."""
    calls = itertools.count()
    return lambda random, count: random.random(count) + next(calls)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_first_values_are_the_same_from_any_number_of_workers(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "CHUNK", 8)

    def layout() -> Layout:
        inits = [normal(1.0), uniform(2.0), ordered(), normal(1.0)]
        made = [Parameter((size,), init) for size, init in zip((50, 8, 20, 3), inits, strict=True)]
        for number, parameter in enumerate(made):
            parameter.name = f"layers.{number}.weight"
        return Layout(made, "float64")

    one, many = layout(), layout()
    expected, values = one.zeros(), many.zeros()
    one.initialise(expected, 3)
    for worker in reversed(range(workers)):
        many.initialise(values, 3, worker, workers)
    np.testing.assert_array_equal(values, expected)
    assert len(set(values[values != 0])) == 50 + 8 + 20 + 3


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_workers_draw_equally_many_first_values(workers: int) -> None:
    """Of a few large parameters, too, and where weights and biases take turns."""
    shapes = [(7000, 4096), (4096,), (4096, 4096), (4096,), (1000, 4096), (1000,)]
    made = [Parameter(shape, normal(1.0)) for shape in shapes]
    layout = Layout([*made, Parameter((800, 4096), ordered())], "float32")
    shares = layout.shares(workers)
    counts = [sum(len(elements) for _, elements in share) for share in shares]
    assert sum(counts) == sum(parameter.size for parameter in layout.parameters)
    assert max(counts) - min(counts) <= parameters.CHUNK
    assert sum(counts) / max(counts) > 0.95 * workers


def test_first_values_differ_between_seeds_and_names() -> None:
    layout = layout_of([layer for layer in model() if isinstance(layer, Linear)])
    one, two = layout.zeros(), layout.zeros()
    layout.initialise(one, seed=1)
    layout.initialise(two, seed=2)
    assert not np.array_equal(named(layout, one)["layers.0.weight"], named(layout, two)["layers.0.weight"])
    twins = [Linear(4, 4), Linear(4, 4)]
    nn.name(twins)
    layout = layout_of(twins)
    layout.bind(values := layout.zeros())
    layout.initialise(values, seed=1)
    assert not np.array_equal(twins[0].weight.value, twins[1].weight.value)


def test_first_values_have_he_variance() -> None:
    layers = mlp((300,), 200, hidden=[400])
    nn.name(layers)
    layout = layout_of(layers)
    layout.bind(values := layout.zeros())
    layout.initialise(values, seed=0)
    hidden, output = layers[0], layers[-1]
    assert hidden.weight.value.var() == pytest.approx(2 / 300, rel=0.02)
    assert output.weight.value.var() == pytest.approx(1 / 400, rel=0.02)  # nothing is rectified after the output
    assert not hidden.bias.value.any()


def test_first_values_that_are_others_when_drawn_again_are_refused() -> None:
    """Each rank draws some parameters alone: what a generator of one's own gives depends on who has drawn before."""
    own, values = np.random.default_rng(0), iter(np.arange(6.0))
    drawn = {
        "again": lambda random, count: own.random(count),
        "no more": lambda random, count: np.array([*itertools.islice(values, count)]),
        "good": lambda random, count: random.random(count),
    }
    for name, init in drawn.items():
        parameter = Parameter((2, 3), init)
        parameter.name = name
        layout = Layout([parameter], "float32")
        parameter.described(5)
        if name == "good":
            layout.initialise(layout.zeros(), 5)
            layout.initialise(layout.zeros(), 6)  # of another run
            continue
        with pytest.raises(ConfigError, match=rf"^{name}: its init gives 0|^{name} gets different first values"):
            layout.initialise(layout.zeros(), 5)

"""The update on any number of ranks has the bits of a serial one, and changes nothing where it must not."""

import contextlib
import math
import time

import numpy as np
import pytest
from mpi4py import MPI

from mpiml import vectors
from mpiml.clock import Clock
from mpiml.errors import RunError
from mpiml.nn import optimizers
from mpiml.nn.parameters import Layout, Parameter, Statistic, constant
from mpiml.parallel.gradient_sum import LibrarySum, OrderedSum
from mpiml.parallel.update import Update
from mpiml.team import Team
from mpiml.vectors import BLOCK, Block, Operands
from tests.contract.reference import Rule
from tests.parallel.sums import (
    SHAPES,
    WORLD,
    Array,
    feed,
    has_the_bits_of_the_tree,
    layout_of,
    make,
    scattered,
    serial_sum,
)

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("free_sums")]

ROWS = {1: 50, 2: 1, 3: 77}.__getitem__  # of a step


def with_averages(name: str, dtype: str, layerwise: bool = False) -> Layout:
    """A layout with statistics of two momenta between the parameters, of which one has a learning rate of its own, and
    one is fixed."""
    made = [Parameter(shape, constant(0.0)) for shape in SHAPES[name]]
    made[-2].rate = 10.0
    made[1:1] = [Statistic((5,), constant(0.0), 0.1), Statistic((3,), constant(0.0), 0.3)]
    made.insert(0, fixed := Parameter((5, 9), constant(0.0)))
    fixed.rate = 0.0
    return Layout([*made, Statistic((4, 5), constant(0.0), 0.1)], dtype, layerwise)


class Serial:
    """The update on the whole vector at once: what any number of ranks must equal, bit for bit."""

    def __init__(self, optimizer: optimizers.Optimizer, blocks: list[Block], values: Array, clip: float):
        self.optimizer, self.blocks, self.values, self.clip = optimizer, blocks, values.copy(), clip
        self.states = {name: np.zeros_like(values) for name in optimizer.states}

    def step(self, total: Array, rate: float, weight: float, step: int) -> float:
        """One step; returns the norm of the mean gradient."""
        optimized = [block for block in self.blocks if block.momentum is None]
        norm = norm_of([total[b.start : b.stop] for b in optimized]) * (1 / weight)
        scale = 1 / weight
        if self.clip and norm > self.clip:
            scale *= self.clip / norm
        total, prepared, ratios = total.copy(), list[tuple[Block, Operands]](), dict[int, float]()
        for block in self.blocks:
            span = slice(block.start, block.stop)
            if block.momentum is not None:
                self.values[span] += block.momentum * (total[span] * (1 / ROWS(step)) - self.values[span])
                continue
            states = [state[span] for state in self.states.values()]
            scratch = np.empty_like(total[span]), np.empty_like(total[span])
            on = Operands(self.values[span], states, scratch, total[span], block.decay)
            self.optimizer.prepare(on, scale, step)
            prepared.append((block, on))
        for block, _ in prepared:
            if block.matrix is not None:
                whole = [other for one, other in prepared if one.matrix == block.matrix]
                norms = [norm_of([o.value for o in whole]), norm_of([o.total for o in whole])]
                ratios[block.matrix] = self.optimizer.trust_ratio(*norms, scale)
        for block, on in prepared:
            on.trust = 1.0 if block.matrix is None else ratios[block.matrix]
            self.optimizer.update(on, scale, block.rate * rate, step)
        return norm


def norm_of(blocks: list[Array]) -> float:
    return math.sqrt(math.fsum(np.add.reduce(block.astype(np.float64) ** 2) for block in blocks))


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e9])
@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "lars", "adam", "adamw", "lamb"])
@pytest.mark.parametrize("bucket", [0, 30])
def test_update_has_the_bits_of_a_serial_one(name: str, clip: float, bucket: int) -> None:
    """Of parameters and statistics, of which the optimizer, the clipping and the weight know nothing, and with values
    that are fixed, of which there are no gradients and no state."""
    optimizer = optimizers.build(name, 0.9, 0.1)
    layout, microbatches, weight = with_averages("small", "float32", optimizer.layerwise), 37, 101.0
    sum_ = make(OrderedSum, layout, microbatches, bucket=bucket)
    update = Update(Team(WORLD, Clock()), WORLD.rank, sum_, optimizer, clip, ROWS)
    values = layout.zeros()
    values[: layout.updated], values[layout.updated :] = scattered(layout, 99), 7.5
    serial = Serial(optimizer, layout.blocks(), values, clip)
    sum_.values.vector[...] = values
    good = [all(slot.size == layout.updated < layout.size for slot in sum_.slots)]
    for step, measure in enumerate([True, False, True], start=1):
        parts = [scattered(layout, step, m) for m in range(microbatches)]
        expected = serial.step(serial_sum(parts), 0.1, weight, step)
        feed(sum_, parts)
        norm = update.step(0.1, weight, step, measure)
        good.append(norm == (expected if measure or clip else None))
        good.append(sum_.values.vector.tobytes() == serial.values.tobytes())
        for key, state in update.states.items():
            held = [serial.states[key][start:stop].tobytes() for start, stop in sum_.values.held]
            good.append(state.tobytes() == b"".join(held))
    assert all(good)


PLACES = [(OrderedSum, "private"), (OrderedSum, "shared"), (OrderedSum, "nodes"), (LibrarySum, "private")]


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize(("kind", "where"), PLACES)
def test_matrices_have_trust_ratios_of_their_own(kind: type, where: str, name: str) -> None:
    """Wherever their blocks are updated, one of them with a rate of its own, one that is zero, one without gradient;
    the gradient is clipped. Other parameters have none."""
    made = [Parameter(shape, constant(0.0)) for shape in [(3, 3), (BLOCK, 3), (500,), (201, 100), (4, 2)]]
    made[1].rate = 10.0
    layout, weight, clip = Layout(made, "float64", layerwise=True), 3.0, 0.5
    sum_ = make(kind, layout, 16, where=where)
    update = Update(Team(WORLD, Clock()), WORLD.rank, sum_, optimizers.build(name, 0.9, 0.1), clip, ROWS)
    first = np.random.default_rng(0).standard_normal(layout.size)
    dict(layout.views(first))[made[0]].fill(0.0)
    if sum_.values.memory.rank == 0:
        sum_.values.vector[...] = first
    sum_.values.memory.barrier()
    expected = {parameter: view.copy() for parameter, view in layout.views(first)}
    rules = {p: Rule(name, 0.1 * p.rate, 0.1 if p.decay else 0.0, (0.9, 0.999)) for p in made}
    for step in (1, 2, 3):
        parts = [np.random.default_rng([step, m]).standard_normal(layout.size) for m in range(16)]
        for part in parts:
            dict(layout.views(part))[made[4]].fill(0.0)
        feed(sum_, parts)
        norm = update.step(0.1, weight, step, False)
        assert norm is not None
        assert norm > clip
        mean = np.sum(parts, axis=0) / weight * (clip / norm)
        expected = {p: rules[p](expected[p], gradient) for p, gradient in layout.views(mean)}
    differences = [np.abs(view - expected[p]).max() for p, view in layout.views(sum_.values.vector)]
    assert max(differences) < 1e-10


EMA = 0.75
WEIGHTS = [0.0, 3.0, 2.0, 0.0]  # of steps


def averaging(kind: type, where: str, dtype: str = "float32") -> tuple[Update, list[Array]]:
    """An update that keeps an average, after some steps, of which the first and the last have no rows; the values after
    each of them."""
    layout = with_averages("small", dtype)
    sum_ = make(kind, layout, 16, where=where)
    optimizer = optimizers.build("momentum", 0.9, 0.1)
    update = Update(Team(WORLD, Clock()), WORLD.rank, sum_, optimizer, 0.0, ROWS, EMA)
    if sum_.values.memory.rank == 0:
        values, updated = sum_.values.vector, layout.updated
        values[:updated], values[updated:] = scattered(layout, 99) + 0.0, 7.5  # no padding of -0.0
    sum_.values.memory.barrier()
    after = []
    for step, weight in enumerate(WEIGHTS, start=1):
        feed(sum_, [scattered(layout, step, m) if weight else layout.zeros(gradients=True) for m in range(16)])
        update.step(0.1, weight, step, False)
        after.append(sum_.values.vector.copy())
    return update, after


def whole_average(update: Update) -> Array:
    """The average of all values of a stage, from those who hold it."""
    values, whole = update.sum.values, np.zeros_like(update.sum.values.vector)
    for piece, on in zip(update.pieces, update._operands, strict=True):
        if on.average is not None:
            whole[piece.start : piece.stop] = on.average
    if values.comm.size > 1:
        values.comm.Allreduce(MPI.IN_PLACE, whole)  # where others hold a part there are zeros
    return whole


@pytest.mark.parametrize(("kind", "where"), PLACES)
def test_the_average_is_the_weighted_mean_of_the_values_after_all_steps(kind: type, where: str) -> None:
    """Of what the optimizer changes; a step without rows counts as every step."""
    update, values = averaging(kind, where)
    blocks = with_averages("small", "float32").blocks()
    optimized = np.zeros(values[0].size, bool)
    for block in blocks:
        optimized[block.start : block.stop] = block.momentum is None
    found = whole_average(update)
    weights = [EMA ** (len(values) - step) for step in range(1, len(values) + 1)]
    expected = sum(w * v.astype("f8") for w, v in zip(weights, values, strict=True)) / sum(weights)
    np.testing.assert_allclose(found, np.where(optimized, expected, 0), rtol=1e-5, atol=1e-5)
    serial = np.zeros_like(found)
    for step, value in enumerate(values, start=1):
        serial += (value * optimized - serial) * ((1 - EMA) / (1 - EMA**step))
    assert found.tobytes() == serial.tobytes()


def test_the_average_of_one_step_is_its_values() -> None:
    value, average = scattered(layout_of("small", "float32"), 1), layout_of("small", "float32").zeros()
    vectors.approach(average, value, (1 - EMA) / (1 - EMA**1), np.empty_like(value))
    np.testing.assert_array_equal(average, value)


@pytest.mark.parametrize(("kind", "where"), [*PLACES, (OrderedSum, "fenced")])
@pytest.mark.parametrize("error", [None, RunError("of all").on_all_ranks()])
def test_values_are_their_averages_for_a_while(kind: type, where: str, error: RunError | None) -> None:
    """On every rank until the last one needs them no more; then they are what they were, bit for bit, even if all ranks
    leave by an error."""
    update, (*_, values) = averaging(kind, where)
    average, good = whole_average(update), []
    expected = np.where(average == 0, values, average)  # running averages stay
    for late in (0, WORLD.size - 1):
        with contextlib.suppress(RunError), update.averaged():
            time.sleep(0.02 * (WORLD.rank == late))
            good.append(update.sum.values.vector.tobytes() == expected.tobytes())
            if error:
                raise error
        good.append(update.sum.values.vector.tobytes() == values.tobytes())
        good.append(whole_average(update).tobytes() == average.tobytes())
        WORLD.Barrier()
    assert all(good)


def test_a_rank_that_fails_alone_waits_for_nobody() -> None:
    """To change the values back would need the others, which know nothing of it."""
    update, (*_, values) = averaging(LibrarySum, "private")
    with pytest.raises(ZeroDivisionError), update.averaged():
        raise ZeroDivisionError
    assert (update.sum.values.vector.tobytes() == values.tobytes()) is (WORLD.size == 1)


@pytest.mark.parametrize("kind", [OrderedSum, LibrarySum])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_norm_is_over_all_stages(kind: type, stages: int) -> None:
    if WORLD.size % stages:
        return
    stage = WORLD.rank % stages
    layouts = [with_averages("large" if s % 2 else "small", "float64") for s in range(stages)]
    comm = WORLD.Split(stage, WORLD.rank)
    sum_ = make(kind, layouts[stage], 16, comm)
    parts = [[np.round(scattered(layout, m)) for m in range(16)] for layout in layouts]  # exact in any order
    update = Update(Team(WORLD, Clock()), comm.rank, sum_, optimizers.build("sgd", 0.0, 0.0), 0.0, ROWS)
    feed(sum_, parts[stage])
    norm = update.step(0.1, 3.0, 1, True)
    totals = [serial_sum(of_stage) for of_stage in parts]
    squares = [
        np.add.reduce(total[b.start : b.stop] ** 2)
        for layout, total in zip(layouts, totals, strict=True)
        for b in layout.blocks()
        if b.momentum is None
    ]
    comm.Free()
    assert norm == math.sqrt(math.fsum(squares)) * (1 / 3.0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    layout = layout_of("small", "float32")
    sum_ = make(OrderedSum, layout, 16)
    update = Update(Team(WORLD, Clock()), WORLD.rank, sum_, optimizers.build("adam", 0.0, 0.0), 1.0, ROWS)
    sum_.values.vector[...] = before = scattered(layout, 1)
    parts = [scattered(layout, m) for m in range(16)]
    parts[11][0] = bad
    feed(sum_, parts)
    norm = update.step(0.1, 1.0, 1, False)
    assert norm is not None
    assert not math.isfinite(norm)
    assert sum_.values.vector.tobytes() == before.tobytes()
    assert all(not state.any() for state in update.states.values())


def test_values_that_are_not_finite_are_noticed() -> None:
    layout = layout_of("small", "float32")
    sum_ = make(OrderedSum, layout, 16)
    update = Update(Team(WORLD, Clock()), WORLD.rank, sum_, optimizers.build("sgd", 0.0, 0.0), 0.0, ROWS)
    parts = [scattered(layout, m) for m in range(16)]
    good = []
    for step, bad in enumerate([1.0, math.inf], start=1):
        parts[5][0] = bad
        feed(sum_, parts)
        update.step(0.1, 1.0, step, False)
        good.append(WORLD.allreduce(update.finite, MPI.LAND) == math.isfinite(bad))
    assert all(good)


@pytest.mark.parametrize("bucket", [0, 30])
def test_a_batch_of_weight_zero_changes_nothing(bucket: int) -> None:
    layout = with_averages("small", "float32")
    sum_ = make(OrderedSum, layout, 16, bucket=bucket)
    update = Update(Team(WORLD, Clock()), WORLD.rank, sum_, optimizers.build("sgd", 0.0, 0.0), 0.0, ROWS)
    before = sum_.values.vector.copy()
    before[: layout.updated] = scattered(layout, 1)
    sum_.values.vector[...] = before
    feed(sum_, [layout.zeros(gradients=True)] * 16, 20)
    assert update.step(0.1, 0.0, 1, True) == 0.0
    assert sum_.values.vector.tobytes() == before.tobytes()
    sum_.values.vector.fill(0)
    assert has_the_bits_of_the_tree(sum_, layout, 16, 2, 20)

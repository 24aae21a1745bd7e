"""The average over workers has the bits of a serial one wherever they are computed, and the outer step is its rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from mpiml.clock import Clock
from mpiml.config import Config
from mpiml.nn import optimizers
from mpiml.nn.parameters import Layout, Parameter, Statistic, constant
from mpiml.parallel import grid as grids
from mpiml.parallel.average import Average
from mpiml.parallel.grid import Grid
from mpiml.parallel.update import Update
from mpiml.team import Team, wait
from mpiml.training.place import another, place
from mpiml.training.resolve import Resolved
from tests.parallel.sums import WORLD, Array, is_real, scattered, serial_sum

pytestmark = pytest.mark.mpi
NODES, PRIVATE, SHARED = "nodes", "private", "shared"
LAYOUTS = [(1, 1, SHARED), (1, 1, NODES), (2, 1, SHARED), (2, 1, PRIVATE), (2, 1, NODES), (3, 1, SHARED), (4, 1, NODES)]
LAYOUTS += [(4, 1, PRIVATE), (8, 1, SHARED), (2, 2, SHARED), (2, 2, NODES)]
everywhere = pytest.mark.parametrize(("workers", "pipe", "where"), LAYOUTS)


def layout_of(dtype: str = "float64") -> Layout:
    """Two parameters, a running average between them, and a parameter that nobody updates."""
    made = [Parameter((150, 120), constant(0.0)), Statistic((5,), constant(0.0), 0.1), Parameter((7,), constant(0.0))]
    made.append(fixed := Parameter((3,), constant(0.0)))
    fixed.rate = 0.0
    return Layout(made, dtype)


@dataclass
class Workers:
    """The workers of this rank: their updates, and the number of the first."""

    count: int
    microbatches: int  # of each
    first: int
    grid: Grid
    group: Grid
    layout: Layout
    copies: list[Update]
    average: Average

    def write(self, vectors: Sequence[Array]) -> None:
        """Let the values of each worker be those."""
        for number, copy in enumerate(self.copies, self.first):
            values = copy.sum.values
            for start, stop in values.held:
                values.vector[start:stop] = vectors[number][start:stop]
            values.publish()

    def states(self, vectors: Sequence[Array]) -> None:
        for number, copy in enumerate(self.copies, self.first):
            copy.states["velocity"][...] = self.held(vectors[number])

    def held(self, vector: Array) -> Array:
        """What a worker's state vector on this rank has of a whole one."""
        return np.concatenate([vector[:0], *(vector[a:b] for a, b in self.copies[0].sum.values.held)])

    def step(self, gradient: Callable[[int, Array], Array], rate: float, step: int) -> None:
        """A step of each worker, by the gradient of its values."""
        for number, copy in enumerate(self.copies, self.first):
            sum_, count = copy.sum, self.microbatches
            own = gradient(number, sum_.values.vector[: self.layout.updated].copy()) * is_real(self.layout)
            wait([self.group.comm.Ibarrier()])  # before anybody writes to values that others still read
            for index in range(len(sum_.plan.counts)):
                sum_.slots[sum_.plan.slots[index]][...] = own
                sum_.accumulate(index)
            wait([self.group.comm.Ibarrier()])  # the step record is agreed on before the sum starts
            copy.step(rate, count, step, False)

    def meet(self, counted: Sequence[bool] = (), measure: bool = False) -> float | None:
        counted = counted or [True] * self.count
        return self.average.meet(counted[self.first : self.first + len(self.copies)], sum(counted), measure)

    def all_have(self, expected: Array, state: Array | None = None) -> bool:
        """Whether each worker has the bits of these values, and of this state."""
        good = [copy.sum.values.vector[: self.layout.updated].tobytes() == expected.tobytes() for copy in self.copies]
        if state is not None:
            good += [copy.states["velocity"].tobytes() == self.held(state).tobytes() for copy in self.copies]
        wait([WORLD.Ibarrier()])
        return all(good)


Build = Callable[..., Workers]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """Makes workers on all ranks; skips the test where the replicas cannot share them."""
    made: list[Workers] = []

    def build(
        workers: int,
        pipe: int = 1,
        where: str = SHARED,
        optimizer: str = "momentum",
        dtype: str = "float64",
        outer: tuple[float, float] | None = None,
    ) -> Workers:
        replicas = WORLD.size // pipe
        if WORLD.size % pipe or (workers % replicas and replicas % workers):
            pytest.skip(f"{replicas} replicas cannot share {workers} workers")
        if where == NODES:
            monkeypatch.setenv("MPIML_NODES", f"{(WORLD.size + 1) // 2},{WORLD.size // 2}")
        grid, layout = grids.build(Team(WORLD, Clock()), pipe), layout_of(dtype)
        groups = min(replicas, workers)
        group = grid.divided(groups) if groups > 1 else grid
        microbatches = 2 * group.replicas + 1
        memory = PRIVATE if where == PRIVATE else "auto"
        config = Resolved(
            **vars(Config(memory=memory, microbatches=1, steps=1, lr=1.0, decay_steps=1, weight_decay=0.0))
        )
        first, *_ = place(config, grid.comm, group, layout, microbatches, 2)
        sums = [first, *(another(first, group, layout, microbatches, 1) for _ in range(workers // groups - 1))]
        rule = optimizers.build(optimizer, 0.9, 0.0, (0.9, 0.999))
        copies = [Update(group.team, group.replica, one, rule, 0.0, lambda step: 10) for one in sums]
        average = Average(grid, groups, workers, copies, memory, outer)
        number = grid.replica * groups // replicas * (workers // groups)
        made.append(Workers(workers, microbatches, number, grid, group, layout, copies, average))
        return made[-1]

    yield build
    for one in made:
        one.average.free()
        for copy in one.copies:
            copy.sum.free()
            copy.sum.values.free()
        if one.group is not one.grid:
            one.group.free()
        one.grid.free()


def vector(layout: Layout, *key: int) -> Array:
    """As `scattered`, with no negative zeros in the padding."""
    return scattered(layout, *key) + 0


def kinds(layout: Layout) -> tuple[Array, Array]:
    """Which elements belong to parameters, and which to the running average."""
    masks = [np.zeros(layout.updated, bool) for _ in range(2)]
    for block in layout.blocks():
        masks[block.momentum is not None][block.start : block.stop] = True
    return masks[0], masks[1]


@everywhere
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_mean_has_the_bits_of_the_canonical_tree(
    build: Build, workers: int, pipe: int, where: str, dtype: str
) -> None:
    """Of values and states, in every round anew; with rate 1 and no momentum nothing is done after it."""
    made, good = build(workers, pipe, where, dtype=dtype), []
    stage = made.grid.stage
    for round_ in range(3):
        values, states = ([vector(made.layout, round_, w, stage, of) for w in range(workers)] for of in (0, 1))
        made.average.begin()
        made.write(values)
        made.states(states)
        assert made.meet() is None
        mean, state = (serial_sum(parts) / np.asarray(workers, dtype) for parts in (values, states))
        good.append(made.all_have(mean, state))
    assert all(good)


@everywhere
def test_a_worker_that_does_not_count_is_left_out(build: Build, workers: int, pipe: int, where: str) -> None:
    made, good = build(workers, pipe, where), []
    for leave_out in range(min(workers, 3) if workers > 1 else 0):
        counted = [w != leave_out for w in range(workers)]
        values = [vector(made.layout, w, made.grid.stage) for w in range(workers)]
        made.average.begin()
        made.write([part if counts else part * np.nan for part, counts in zip(values, counted, strict=True)])
        made.states(values)
        made.meet(counted)
        mean = serial_sum(
            [part if counts else 0 * is_real(made.layout) for part, counts in zip(values, counted, strict=True)]
        ) / (workers - 1)
        good.append(made.all_have(mean, mean))
    assert all(good)


@everywhere
def test_the_distance_is_the_root_of_the_mean_square(build: Build, workers: int, pipe: int, where: str) -> None:
    """Over all stages, of what optimizers change, before the outer step, from the workers that count."""
    made = build(workers, pipe, where, outer=(0.7, 0.9))
    counted = [w != 1 for w in range(workers)]
    stages = [[vector(made.layout, w, stage) for w in range(workers)] for stage in range(pipe)]
    made.average.begin()
    made.write(stages[made.grid.stage])
    distance = made.meet(counted, measure=True)
    total, parameters = 0.0, kinds(made.layout)[0]
    for of_stage in stages:
        those = np.array([part[parameters] for part, counts in zip(of_stage, counted, strict=True) if counts])
        total += float(((those - those.mean(axis=0)) ** 2).sum())
    assert distance == pytest.approx((total / sum(counted)) ** 0.5, rel=1e-12, abs=1e-12)
    assert {distance} == set(WORLD.allgather(distance))


@everywhere
def test_the_outer_rule_with_a_gradient_that_is_always_two(build: Build, workers: int, pipe: int, where: str) -> None:
    """Three steps from 1 lead to -5, and twice the way to there to -11; three more to -23, and three more to -35."""
    made, real = build(workers, pipe, where, "sgd", outer=(2.0, 0.0)), kinds(layout_of())[0]
    made.write([is_real(made.layout) * 1.0] * workers)
    seen = []
    for round_ in range(3):
        made.average.begin()
        for step in range(3 * round_ + 1, 3 * round_ + 4):
            made.step(lambda _, values: np.full_like(values, 2.0), 1.0, step)
        made.meet()
        seen += [set(copy.sum.values.vector[: len(real)][real]) for copy in made.copies]
    each = len(made.copies)
    assert seen == [{-11.0}] * each + [{-23.0}] * each + [{-35.0}] * each


@everywhere
def test_a_quadratic_by_hand(build: Build, workers: int, pipe: int, where: str) -> None:
    """Workers with valleys of their own, inner momentum 0.9, outer rate 0.7 and momentum 0.9."""
    made, rounds, steps, lr = build(workers, pipe, where, outer=(0.7, 0.9)), 3, 3, 0.05
    real, _ = kinds(made.layout)
    steep = [1.0 + w for w in range(workers)]
    valley = [vector(made.layout, w, made.grid.stage) for w in range(workers)]
    start = is_real(made.layout) * 0.5
    theta, outer, inner = start.copy(), np.zeros_like(start), np.zeros_like(start)
    made.write([start] * workers)
    for round_ in range(rounds):
        made.average.begin()
        for step in range(steps):
            gradient = lambda w, values: steep[w] * (values - valley[w])  # noqa: E731
            made.step(gradient, lr, round_ * steps + step + 1)
        made.meet()
        ends, velocities = [], []
        for w in range(workers):
            value, velocity = theta.copy(), inner.copy()
            for _ in range(steps):
                velocity = 0.9 * velocity + steep[w] * (value - valley[w])
                value = value - lr * velocity
            ends.append(value)
            velocities.append(velocity)
        delta = theta - np.mean(ends, axis=0)
        outer = 0.9 * outer + delta
        theta, inner = theta - 0.7 * (delta + 0.9 * outer), np.mean(velocities, axis=0)
    for copy in made.copies:
        np.testing.assert_allclose(copy.sum.values.vector[: len(real)][real], theta[real], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(
            copy.states["velocity"][made.held(real)], made.held(inner)[made.held(real)], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("where", [SHARED, NODES])
def test_running_averages_have_no_outer_step_and_what_is_fixed_stays(build: Build, where: str) -> None:
    made = build(WORLD.size, 1, where, outer=(0.5, 0.9))
    real, statistic = kinds(made.layout)
    values = [is_real(made.layout) * float(w) for w in range(WORLD.size)]
    mean = (WORLD.size - 1) / 2
    made.write([is_real(made.layout) * 8.0] * WORLD.size)
    made.copies[0].sum.values.vector[made.layout.updated :] = 3.0
    made.average.begin()
    made.write(values)
    made.meet()
    after = made.copies[0].sum.values.vector
    assert set(after[: len(real)][statistic]) == {mean}
    assert after[: len(real)][real] == pytest.approx(8.0 - 0.5 * 1.9 * (8.0 - mean))
    assert set(after[made.layout.updated :]) == {3.0}


@everywhere
def test_what_is_collected_of_start_and_velocity_has_each_element_once(
    build: Build, workers: int, pipe: int, where: str
) -> None:
    made = build(workers, pipe, where, outer=(0.7, 0.9))
    part = made.average.parts(made.average.velocity)
    count = np.zeros(made.layout.updated, int)
    for start, stop in part.collected:
        count[start:stop] += 1
    total = sum(of for stage, of in WORLD.allgather((made.grid.stage, count)) if stage == made.grid.stage)
    blocks = made.layout.blocks()
    assert all((total[block.start : block.stop] == 1).all() for block in blocks)
    assert total.max() == 1

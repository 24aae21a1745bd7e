"""Tests of gathering the whole model's vectors on rank 0 and of handing them back."""

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.nn.parameters import Layout, Parameter, constant
from mpiml.parallel import grid as grids
from mpiml.parallel import slices
from mpiml.parallel.gradient_sum import LibrarySum, OrderedSum
from mpiml.parallel.memory import PrivateMemory
from mpiml.parallel.state import VALUES, State
from mpiml.parallel.values import Values
from mpiml.team import Team
from mpiml.vectors import Vector, zeros

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
NAMES = (VALUES, "mean", "variance")
Whole = list[dict[str, Vector]]


def layouts(stages: int) -> list[Layout]:
    """Stages of different sizes; the second of three or more has no parameters at all."""
    shapes = [[] if stage == 1 and stages > 2 else [(100 * stage + 300, 90), (17,)] for stage in range(stages)]
    return [Layout([Parameter(shape, constant(0.0)) for shape in of_stage], "float64") for of_stage in shapes]


def whole(stages: int, salt: float) -> Whole:
    """Vectors in which every element is different, and the padding zero."""
    made: Whole = []
    for stage, layout in enumerate(layouts(stages)):
        made.append({})
        for number, name in enumerate(NAMES):
            vector = made[-1][name] = layout.zeros()
            for block in layout.blocks():
                place = np.arange(block.start, block.stop)
                vector[block.start : block.stop] = salt + 1000 * stage + 100 * number + place / 65536
    return made


def build(kind: type, pipe: int, *bucket: int) -> tuple[grids.Grid, State]:
    grid = grids.build(Team(WORLD, Clock()), pipe)
    layout = layouts(pipe)[grid.stage]
    arguments = (16, layout.size, layout.blocks(), layout.dtype, *bucket)
    sum_ = kind(grid.data, PrivateMemory(), [1] * grid.replicas, *arguments)
    size = sum(stop - start for start, stop in sum_.held)
    return grid, State(grid, sum_, {name: zeros(size, layout.dtype) for name in NAMES[1:]}, Clock())


def same(left: Whole, right: Whole, names: tuple[str, ...]) -> bool:
    pairs = [(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in names]
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("pipe", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(("kind", "bucket"), [(OrderedSum, [0]), (OrderedSum, [20_000]), (LibrarySum, [])])
def test_what_is_handed_out_comes_back(kind: type, bucket: list[int], pipe: int) -> None:
    if WORLD.size % pipe:
        return
    grid, state = build(kind, pipe, *bucket)
    root = grid.comm.rank == 0
    good = []
    for salt in (0.5, 7.25):
        state.distribute(whole(pipe, salt) if root else [])
        expected = whole(pipe, salt)[grid.stage]
        good.append(state.sum.values.tobytes() == expected[VALUES].tobytes())
        for name in NAMES:
            held = [expected[name][start:stop].tobytes() for start, stop in state.sum.held]
            good.append([part.tobytes() for part in state.mine[name]] == held)
        back = state.collect()
        good.append(same(back, whole(pipe, salt), NAMES) if root else back == [{}] * pipe)
    assert all(good)


class Short(MPI.Intracomm):
    """A communicator of a library that takes no long messages."""

    def Isend(self, buf: Vector, *place: int) -> MPI.Request:
        assert len(buf) <= slices.MESSAGE
        return super().Isend(buf, *place)

    def Ibcast(self, buf: Vector) -> MPI.Request:
        assert len(buf) <= slices.MESSAGE
        return super().Ibcast(buf)


def test_long_vectors_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "MESSAGE", 5000)
    grid, trained = build(LibrarySum, 1)
    grid.team, layout = Team(Short(grid.comm), grid.team.clock), layouts(1)[0]
    values = Values(grid, PrivateMemory(), layout.size, layout.dtype)
    values._firsts = Short(values._firsts)
    states = {name: zeros(layout.size, layout.dtype) for name in NAMES[1:]}
    for state, names in (
        (State(grid, trained.sum, states, Clock()), NAMES),
        (State(grid, values, {}, Clock()), (VALUES,)),
    ):
        state.distribute(whole(1, 1.0) if WORLD.rank == 0 else [], *names)
        assert state.sum.values.tobytes() == whole(1, 1.0)[0][VALUES].tobytes()
        back = state.collect(*names)
        assert same(back, whole(1, 1.0), names) if WORLD.rank == 0 else back == [{}]
    values.free()


@pytest.mark.parametrize("pipe", [1, 2, 4])
def test_some_vectors_alone(pipe: int) -> None:
    if WORLD.size % pipe:
        return
    grid, state = build(OrderedSum, pipe)
    root = grid.comm.rank == 0
    state.distribute(whole(pipe, 1.0) if root else [])
    state.distribute(whole(pipe, 2.0) if root else [], VALUES)
    values, mean = state.collect(VALUES), state.collect("mean")
    if root:
        assert set(values[0]) == {VALUES}
        assert same(values, whole(pipe, 2.0), (VALUES,))
        assert same(mean, whole(pipe, 1.0), ("mean",))
    else:
        assert values == mean == [{}] * pipe


def test_collected_vectors_are_copies() -> None:
    grid, state = build(OrderedSum, 1)
    state.distribute(whole(1, 1.0) if grid.comm.rank == 0 else [])
    for vectors in state.collect():
        for vector in vectors.values():
            vector.fill(0)
    assert state.sum.values.tobytes() == whole(1, 1.0)[0][VALUES].tobytes()

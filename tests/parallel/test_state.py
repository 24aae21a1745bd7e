"""Tests of collecting the whole model's vectors on rank 0 and of distributing them again."""

from collections.abc import Iterator

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.nn.parameters import Layout, Parameter, constant
from mpiml.parallel import grid as grids
from mpiml.parallel import slices
from mpiml.parallel.memory import PrivateMemory, SharedMemory
from mpiml.parallel.state import VALUES, State, parts
from mpiml.parallel.values import Values
from mpiml.team import Team
from mpiml.vectors import Vector, bytes_of, zeros

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
NAMES = (VALUES, "mean", "variance")
Whole = list[dict[str, Vector]]
MADE: list[Values] = []


def layouts(stages: int) -> list[Layout]:
    """Stages of different sizes, a part of which is fixed; of three or more the second has no parameters at all, and
    the last only ones that are fixed."""
    shapes = [[] if stage == 1 and stages > 2 else [(100 * stage + 300, 90), (17,)] for stage in range(stages)]
    made = [[Parameter(shape, constant(0.0)) for shape in of_stage] for of_stage in shapes]
    for stage, parameters in enumerate(made[::2]):
        parameters.insert(1, Parameter((31, 20 + stage), constant(0.0)))
        parameters[1].rate = 0.0
    for parameter in made[-1] if stages > 2 else []:
        parameter.rate = 0.0
    return [Layout(parameters, "float64") for parameters in made]


def whole(stages: int, salt: float) -> Whole:
    """Vectors in which every element is different, and the padding zero."""
    made: Whole = []
    for stage, layout in enumerate(layouts(stages)):
        made.append({})
        for number, name in enumerate(NAMES):
            vector = made[-1][name] = layout.zeros(updated=name != VALUES)
            for parameter, view in layout.views(vector):
                place = layout.offsets[parameter] + np.arange(parameter.size).reshape(parameter.shape)
                view[...] = salt + 1000 * stage + 100 * number + place / 65536
    return made


@pytest.fixture(autouse=True)
def _free_values() -> Iterator[None]:
    """Values hold requests of the MPI library, which complains of those that are left at the end."""
    yield
    while MADE:
        MADE.pop().free()


def build(pipe: int, divided: bool = True, bucket: int = 0, of_node: int = 1) -> tuple[grids.Grid, Values, State]:
    """Values of which each replica holds a part (`divided`), or a copy of its own; `of_node` replicas share memory."""
    grid = grids.build(Team(WORLD, Clock()), pipe)
    layout = layouts(pipe)[grid.stage]
    comm, memory = grid.data if divided else MPI.COMM_SELF, PrivateMemory()
    if of_node > 1:
        node = grid.data.Split(grid.replica // of_node, grid.replica)
        memory = SharedMemory(node, 0, bytes_of(layout.size, layout.dtype))
    values = Values(comm, memory, layout.size, layout.blocks(), layout.dtype, bucket)
    MADE.append(values)
    size = sum(stop - start for start, stop in values.held)
    mine = parts(values, {name: zeros(size, layout.dtype) for name in NAMES[1:]}, grid.replica)
    return grid, values, State(grid, NAMES, mine, layout.dtype, values.publish)


def same(left: Whole, right: Whole, names: tuple[str, ...]) -> bool:
    pairs = [(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in names]
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("pipe", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(
    ("divided", "bucket", "of_node"), [(True, 0, 1), (True, 20_000, 1), (False, 0, 1), (True, 0, 2), (True, 20_000, 3)]
)
def test_what_is_distributed_is_collected_again(divided: bool, bucket: int, of_node: int, pipe: int) -> None:
    if WORLD.size % pipe:
        return
    grid, values, state = build(pipe, divided, bucket, of_node)
    root = grid.comm.rank == 0
    good = []
    for salt in (0.5, 7.25):
        state.distribute(whole(pipe, salt) if root else [])
        expected = whole(pipe, salt)[grid.stage]
        good.append(values.vector.tobytes() == expected[VALUES].tobytes())
        for name in NAMES:
            held = state.parts[name].held
            good.append(
                {of: part.tobytes() for of, part in held.items()}
                == {of: expected[name][slice(*of)].tobytes() for of in held}
            )
            good.append(set(slices.cut(values.held)) <= set(held))
        WORLD.Barrier()  # before the next round writes to memory that others still look at
        back = state.collect()
        good.append(same(back, whole(pipe, salt), NAMES) if root else back == [{}] * pipe)
    assert all(good)


class Short(MPI.Intracomm):
    """A communicator of a library that takes no long messages."""

    def Isend(self, buf: Vector, *place: int) -> MPI.Request:
        assert len(buf) <= slices.MESSAGE
        return super().Isend(buf, *place)


@pytest.mark.parametrize("divided", [True, False])
def test_long_vectors_go_in_parts(monkeypatch: pytest.MonkeyPatch, divided: bool) -> None:
    monkeypatch.setattr(slices, "MESSAGE", 5000)
    grid, values, state = build(1, divided)
    state.comm = Short(grid.comm)
    for names in (NAMES, (VALUES,)):
        state.distribute(whole(1, 1.0) if WORLD.rank == 0 else [], *names)
        assert values.vector.tobytes() == whole(1, 1.0)[0][VALUES].tobytes()
        back = state.collect(*names)
        assert same(back, whole(1, 1.0), names) if WORLD.rank == 0 else back == [{}]


@pytest.mark.parametrize("pipe", [1, 2, 4])
def test_some_vectors_alone(pipe: int) -> None:
    if WORLD.size % pipe:
        return
    grid, _, state = build(pipe)
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
    grid, values, state = build(1)
    state.distribute(whole(1, 1.0) if grid.comm.rank == 0 else [])
    for vectors in state.collect():
        for vector in vectors.values():
            vector.fill(0)
    assert values.vector.tobytes() == whole(1, 1.0)[0][VALUES].tobytes()

"""Tests of how the whole model's vectors go from the ranks that have their parts to those that need them."""

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.nn.parameters import Layout, Parameter, constant
from mpiml.parallel import grid as grids
from mpiml.parallel import slices
from mpiml.parallel import state as states
from mpiml.parallel.memory import PrivateMemory, SharedMemory
from mpiml.parallel.state import VALUES, Source, State, of_rank_0, parts
from mpiml.parallel.values import Values
from mpiml.team import Team
from mpiml.vectors import Vector, bytes_of, zeros

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
NAMES = (VALUES, "mean", "variance")
Whole = list[dict[str, Vector]]
MADE: list[Values] = []
GRIDS: list[grids.Grid] = []
# Whether each replica holds a part, the elements of a bucket, and how many replicas share memory.
LAYOUTS = [(True, 0, 1), (True, 20_000, 1), (False, 0, 1), (True, 0, 2), (True, 20_000, 3)]


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
            vector = made[-1][name] = layout.zeros(gradients=name != VALUES)
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
    while GRIDS:
        GRIDS.pop().free()


def build(pipe: int, divided: bool = True, bucket: int = 0, of_node: int = 1) -> tuple[grids.Grid, Values, State]:
    """Values of which each replica holds a part (`divided`), or a copy of its own; `of_node` replicas share memory."""
    grid = grids.build(Team(WORLD, Clock()), pipe)
    GRIDS.append(grid)
    layout = layouts(pipe)[grid.stage]
    comm, memory = grid.data if divided else MPI.COMM_SELF, PrivateMemory()
    if of_node > 1:
        node = grid.data.Split(grid.replica // of_node, grid.replica)
        memory = SharedMemory(node, 0, bytes_of(layout.size, layout.dtype))
    values = Values(comm, memory, layout.size, layout.blocks(), layout.dtype, bucket)
    MADE.append(values)
    size = sum(stop - start for start, stop in values.held)
    mine = parts(values, {name: zeros(size, layout.dtype) for name in NAMES[1:]})
    return grid, values, State(grid, NAMES, mine, values.publish)


def fill(state: State, vectors: Whole) -> None:
    for name, part in state.parts.items():
        for of, view in part.held.items():
            view[...] = vectors[state.stage][name][slice(*of)]
    state.settle()


def holds(values: Values, state: State, vectors: Whole) -> bool:
    """Whether a rank has what it needs of some vectors: all values, and its parts of the others."""
    expected = vectors[state.stage]
    return values.vector.tobytes() == expected[VALUES].tobytes() and all(
        view.tobytes() == expected[name][slice(*of)].tobytes()
        for name, part in state.parts.items()
        for of, view in part.held.items()
    )


class Counted(MPI.Intracomm):
    """A communicator that counts what a rank sends and receives, of a library that takes no long messages."""

    sent = received = 0

    def Isend(self, buf: Vector, *place: int) -> MPI.Request:
        assert len(buf) <= slices.MESSAGE
        self.sent += buf.nbytes
        return super().Isend(buf, *place)

    def Irecv(self, buf: Vector, *place: int) -> MPI.Request:
        self.received += buf.nbytes
        return super().Irecv(buf, *place)


@pytest.mark.parametrize("pipe", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(("old", "new"), [*zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)])
def test_another_layout_takes_copies(old: Any, new: Any, pipe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if each rank waits as often as it ever does."""
    if WORLD.size % pipe:
        return
    monkeypatch.setattr(states, "POSTED", 1)
    _, _, before = build(pipe, *old)
    fill(before, whole(pipe, 0.5))
    copies = before.copied()
    fill(before, whole(pipe, 7.25))
    _, values, after = build(pipe, *new)
    after.take([copies])
    assert holds(values, after, whole(pipe, 0.5))


@pytest.mark.parametrize("pipe", [1, 2, 4])
def test_no_rank_has_more_than_it_needs(pipe: int) -> None:
    """Besides what it holds, a copy of what is collected from it; and it sends that once to each other replica at most,
    for all of them have what is fixed, and receives no more than it needs."""
    if WORLD.size % pipe:
        return
    _, _, before = build(pipe)
    _, _, after = build(pipe, True, 20_000)
    after.comm = comm = Counted(after.comm)
    needed = sum(view.nbytes for part in after.parts.values() for view in part.held.values())
    WORLD.Barrier()
    tracemalloc.start()
    copies = before.copied()
    after.take([copies])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    own = sum(view.nbytes for views in copies.own.values() for view in views.values())
    assert peak < own + 50_000 + 2_000 * WORLD.size  # what is known of each rank
    assert comm.sent <= own * max(WORLD.size // pipe - 1, 1)
    assert comm.received <= needed


@pytest.mark.parametrize("divided", [True, False])
def test_long_parts_go_in_messages_that_the_library_takes(monkeypatch: pytest.MonkeyPatch, divided: bool) -> None:
    monkeypatch.setattr(slices, "MESSAGE", 5000)
    _, values, state = build(1, divided)
    state.comm = Counted(state.comm)
    first = whole(1, 1.0)[0]
    whole_vectors = [((0, name), vector) for name, vector in first.items()]
    state.take(of_rank_0(key, 0, v.size, None if WORLD.rank else v) for key, v in whole_vectors)
    assert holds(values, state, [first])
    _, _, before = build(1, bucket=6000)
    fill(before, whole(1, 2.0))
    state.take([before.copied()])
    assert holds(values, state, whole(1, 2.0))


@pytest.mark.parametrize("pipe", [1, 2, 4])
def test_some_copies_alone(pipe: int) -> None:
    """Of two vectors, of which one stays as it is where the other is taken."""
    if WORLD.size % pipe:
        return
    _, values, state = build(pipe)
    fill(state, whole(pipe, 1.0))
    copies = state.copied(VALUES, "mean")
    fill(state, whole(pipe, 2.0))
    state.take([copies])
    expected = [
        old | {"variance": new["variance"]} for old, new in zip(whole(pipe, 1.0), whole(pipe, 2.0), strict=True)
    ]
    assert holds(values, state, expected)


@pytest.mark.parametrize("pipe", [1, 2, 3, 4])
@pytest.mark.parametrize(("divided", "bucket", "of_node"), LAYOUTS)
def test_arrays_that_rank_0_alone_has(divided: bool, bucket: int, of_node: int, pipe: int) -> None:
    """Every second parameter, of any stage, fixed or not; the others stay as they are."""
    if WORLD.size % pipe:
        return
    _, values, state = build(pipe, divided, bucket, of_node)
    fill(state, whole(pipe, 1.0))
    given, expected = whole(pipe, 2.0), whole(pipe, 1.0)

    def sources() -> Iterator[Source]:
        for stage, layout in enumerate(layouts(pipe)):
            for parameter in layout.parameters[::2]:
                start = layout.offsets[parameter]
                stop = start + parameter.size
                array = given[stage][VALUES][start:stop]
                expected[stage][VALUES][start:stop] = array
                yield of_rank_0((stage, VALUES), start, stop, None if WORLD.rank else array)

    state.take(sources())
    assert holds(values, state, expected)

"""Tests of a stage's values: each element has one holder, and all replicas get what the holders publish."""

from collections.abc import Iterator

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.nn.parameters import Layout, Parameter, constant
from mpiml.parallel.memory import PrivateMemory, SharedMemory
from mpiml.parallel.values import Values
from mpiml.vectors import bytes_of

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
MADE_OF = [Parameter(shape, constant(0.0)) for shape in [(300, 500), (500,), (70, 90), (7, 1001), (3,)]]
MADE_OF[2].rate = 0.0
LAYOUT = Layout(MADE_OF, "float32")
GRIDS = [
    (of_node, bucket, halved)
    for of_node in (1, 2, 3, 16)
    for bucket in (0, 40_000)
    for halved in (False, True)
    if not halved or (WORLD.size > of_node and WORLD.size % of_node == 0)
]
MADE: list[Values] = []


@pytest.fixture(autouse=True)
def _free_values() -> Iterator[None]:
    """Values hold requests of the MPI library, which complains of those that are left at the end."""
    yield
    while MADE:
        MADE.pop().free()


def values_of(of_node: int, bucket: int, halved: bool = False) -> Values:
    """Values of replicas of which `of_node` share memory."""
    node = WORLD.Split(WORLD.rank // of_node, WORLD.rank)
    memory = PrivateMemory() if of_node == 1 else SharedMemory(node, 0, bytes_of(LAYOUT.size, LAYOUT.dtype))
    MADE.append(Values(WORLD, memory, LAYOUT.size, LAYOUT.blocks(), LAYOUT.dtype, bucket, halved))
    return MADE[-1]


def is_real() -> np.ndarray:
    """Which elements belong to parameters that are updated; the others are padding, or fixed."""
    real = np.zeros(LAYOUT.size, bool)
    for block in LAYOUT.blocks():
        real[block.start : block.stop] = True
    return real


@pytest.mark.parametrize(("of_node", "bucket", "halved"), GRIDS)
def test_each_element_has_one_holder(of_node: int, bucket: int, halved: bool) -> None:
    values = values_of(of_node, bucket, halved)
    count = np.zeros(LAYOUT.size, int)
    for _, start, stop in values.holders:
        count[start:stop] += 1
    assert (count[is_real()] == 1).all()
    assert count.max() == 1
    assert not count[values.updated :].any()
    assert values.updated == LAYOUT.updated < LAYOUT.size
    assert values.held == [(start, stop) for owner, start, stop in values.holders if owner == WORLD.rank]
    assert len(values.buckets) == (4 if bucket else 1)


@pytest.mark.parametrize("of_node", [1, 2, 3, 16])
def test_nodes_are_the_replicas_that_share_memory(of_node: int) -> None:
    values = values_of(of_node, 0)
    assert values.nodes == [min(of_node, WORLD.size - first) for first in range(0, WORLD.size, of_node)]
    assert (values.memory.rank, values.memory.ranks) == (WORLD.rank % of_node, values.nodes[WORLD.rank // of_node])


@pytest.mark.parametrize(("of_node", "bucket", "halved"), GRIDS)
def test_all_replicas_get_what_holders_publish(of_node: int, bucket: int, halved: bool) -> None:
    values = values_of(of_node, bucket, halved)
    good = []
    for step in range(3):
        expected = np.where(is_real(), np.arange(LAYOUT.size) % 1000 + 1000 * step, 0).astype("float32")
        for start, stop in values.held:
            values.vector[start:stop] = expected[start:stop]
        values.publish()
        good.append(values.vector.tobytes() == expected.tobytes())
        WORLD.Barrier()  # replicas of a node look at the vector before the next step changes it
    assert all(good)


def test_alone_a_replica_holds_everything() -> None:
    values = Values(MPI.COMM_SELF, PrivateMemory(), LAYOUT.size, LAYOUT.blocks(), LAYOUT.dtype)
    end = LAYOUT.blocks()[-1].stop
    assert (values.nodes, values.held, values.holders) == ([1], [(0, end)], [(0, 0, end)])
    values.publish()

"""How far clocks are apart is found out through messages."""

import statistics
from time import perf_counter

import pytest
from mpi4py import MPI

from mpiml.run.offsets import Ruler, clock_offset

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
CLOSE = 0.005  # seconds: the ranks may share cores


@pytest.mark.parametrize("rank", range(WORLD.size))
def test_offset_of_a_clock_is_known_to_all(rank: int) -> None:
    found = clock_offset(WORLD, rank, lambda: perf_counter() + 100 * WORLD.rank)
    assert found == pytest.approx(100 * rank, abs=CLOSE)
    assert WORLD.bcast(found) == found


def test_times_are_told_in_those_of_rank_0_though_clocks_drift() -> None:
    origin = WORLD.bcast(perf_counter())

    def now() -> float:
        return (perf_counter() - origin) * (1 + 0.1 * (WORLD.rank % 2)) + 50 * WORLD.rank

    ruler = Ruler(MPI.COMM_SELF, WORLD, now)
    began = perf_counter()
    mine, true = [], []
    while perf_counter() < began + 0.3:
        mine.append(now())
        true.append(perf_counter() - origin)
    ruler.finish()
    found = ruler.times(mine)
    assert statistics.median(abs(a - b) for a, b in zip(found, true, strict=True)) < CLOSE


def test_on_one_node_there_is_one_clock() -> None:
    ruler = Ruler(WORLD, None, perf_counter)
    ruler.finish()
    assert ruler.times([1.5, 7.0]) == [1.5, 7.0]

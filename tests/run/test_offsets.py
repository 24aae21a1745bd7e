"""How far clocks are apart is found out through messages."""

import math
import statistics
from collections.abc import Sequence
from time import perf_counter

import pytest
from mpi4py import MPI

from mpiml.run import offsets
from mpiml.run.offsets import Ruler, clock_offset

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
CLOSE = 0.005  # seconds: the ranks may share cores


@pytest.mark.parametrize("ranks", [range(WORLD.size), [*reversed(range(WORLD.size))][:3]])
def test_every_rank_knows_its_own_clock(ranks: Sequence[int]) -> None:
    ahead, at = clock_offset(WORLD, ranks, lambda: perf_counter() + 100 * WORLD.rank)
    expected = 100 * (WORLD.rank - ranks[0]) if WORLD.rank in ranks else 0
    assert ahead == pytest.approx(expected, abs=CLOSE)
    assert at == pytest.approx(perf_counter() + 100 * WORLD.rank, abs=1)


def test_all_clocks_are_read_in_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks take one, three or four take two, 1,000 take ten."""
    rounds: list[int] = []
    barrier = offsets.quiet_barrier
    monkeypatch.setattr(offsets, "quiet_barrier", lambda comm: rounds.append(1) or barrier(comm))
    clock_offset(WORLD, range(WORLD.size))
    assert len(rounds) == 1 + math.ceil(math.log2(WORLD.size))


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

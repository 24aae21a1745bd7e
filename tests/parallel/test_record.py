"""Tests of the step record: equal sums and equal decisions on all ranks, whoever holds what."""

import functools
import math
import operator

import numpy as np
import pytest
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.clock import Clock
from mpiml.parallel import grid as grids
from mpiml.parallel.memory import SharedMemory
from mpiml.parallel.record import Agreement, Record, agree
from mpiml.partition import part
from mpiml.team import Team

WORLD = MPI.COMM_WORLD
LAST = WORLD.size - 1


def own_rows(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """A table with the rows of this rank only; the others are zero."""
    held = np.zeros_like(table)
    rows = slice(*part(WORLD.rank, WORLD.size, len(table)))
    held[rows] = table[rows]
    return held


@pytest.mark.mpi
@pytest.mark.parametrize("seed", range(5))
def test_rows_are_added_in_their_order(seed: int) -> None:
    """Of numbers whose sum in another order would differ in all digits that matter."""
    random = np.random.default_rng(seed)
    column = random.permutation(np.tile([1e16, 1.0, -1e16, 1e-8, 1e300, -1e300], 4))
    table = np.stack([column, np.arange(24.0), random.permutation(column), np.full(24, 0.1)], axis=1)
    record = agree(WORLD, own_rows(table))
    loss, weight, *metric = (functools.reduce(operator.add, column) for column in table.T.tolist())
    assert record == Record(loss, weight, metric)
    assert record.mean_loss == loss / 276


@pytest.mark.mpi
@pytest.mark.parametrize(("broken", "stop"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rank", [0, LAST])
def test_one_rank_decides_for_all(rank: int, broken: bool, stop: bool) -> None:
    it_is_me = rank == WORLD.rank
    record = agree(WORLD, np.zeros((16, 3)), broken and it_is_me, stop and it_is_me)
    assert (record.broken, record.stop, record.bad_entry) == (broken, stop, None)


@pytest.mark.mpi
def test_all_ranks_at_once_are_still_a_yes() -> None:
    record = agree(WORLD, np.zeros((16, 2)), True, True)
    assert (record.broken, record.stop) == (True, True)
    assert (type(record.broken), type(record.stop)) in [(bool, bool), (np.bool, np.bool)]


@pytest.mark.mpi
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_entry_is_named(bad: float) -> None:
    table = np.ones((20, 3))
    table[[7, 18], 0] = bad
    assert agree(WORLD, own_rows(table)).bad_entry == 7


@pytest.mark.mpi
@pytest.mark.parametrize("values", [(math.inf, -math.inf), (1.7e308, 1.7e308)])
def test_a_sum_that_does_not_exist_is_not_finite(values: tuple[float, float]) -> None:
    table = np.zeros((16, 2))
    table[[3, 12], 0] = values
    assert not math.isfinite(agree(WORLD, own_rows(table)).loss)


@pytest.mark.mpi
@pytest.mark.parametrize("entries", [0, 16])
def test_no_rows(entries: int) -> None:
    record = agree(WORLD, np.zeros((entries, 4)))
    assert record == Record(0.0, 0.0, [0.0, 0.0])
    assert record.mean_loss == 0.0


@pytest.mark.mpi
def test_later_messages_do_not_mix() -> None:
    losses = [agree(WORLD, own_rows(np.full((16, 2), float(step)))).loss for step in range(20)]
    assert losses == [16.0 * step for step in range(20)]


@pytest.mark.mpi
def test_steps_may_have_fewer_columns_than_the_most() -> None:
    """As those of which the metric is not measured; what they agree on is the same as of a table with all columns."""
    grid, columns = grids.build(Team(WORLD, Clock()), 1), 50
    memory = SharedMemory(grid.node, 0, Agreement.bytes_needed(grid.node.size, 16, columns))
    agreement, random = Agreement(grid, memory, 16, columns), np.random.default_rng(0)
    for step in range(30):
        whole = random.standard_normal((16, columns)) * 10.0 ** random.integers(-8, 8, (16, columns))
        expected = agree(WORLD, own_rows(whole))
        table = np.ascontiguousarray(whole[:, : (2, columns, 7)[step % 3]])
        record = agreement(own_rows(table), False, step == 3)
        assert record == Record(expected.loss, expected.weight, expected.metric[: table.shape[1] - 2], stop=step == 3)
    grid.free()

"""Tests of the step record: equal sums and equal decisions on all ranks, whoever holds what."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.clock import Clock
from mpiml.parallel import grid as grids
from mpiml.parallel.memory import SharedMemory
from mpiml.parallel.record import Agreement, Record, Sums, agree
from mpiml.partition import part
from mpiml.team import Team

WORLD = MPI.COMM_WORLD
LAST = WORLD.size - 1


def own(table: NDArray[np.float64], leaf: int = 1) -> dict[str, Any]:
    """The rows of this rank, as arguments of `agree`."""
    first, stop = part(WORLD.rank, WORLD.size, len(table), leaf)
    return {"rows": table[first:stop], "first": first}


def agreement_of(entries: int, columns: int, leaf: int = 1) -> Agreement:
    grid = grids.build(Team(WORLD, Clock()), 1)
    memory = SharedMemory(grid.node, 0, Agreement.bytes_needed(grid.node.size, WORLD.size, entries, columns, leaf))
    return Agreement(grid, memory, entries, columns, leaf)


@pytest.mark.mpi
@pytest.mark.parametrize("seed", range(5))
def test_sums_are_exact(seed: int) -> None:
    """Of numbers whose sum in another order would differ in all digits that matter."""
    random = np.random.default_rng(seed)
    column = random.permutation(np.tile([1e16, 1.0, -1e16, 1e-8, 1e300, -1e300], 4))
    table = np.stack([column, np.arange(24.0), random.permutation(column), np.full(24, 0.1)], axis=1)
    record = agree(WORLD, **own(table))
    loss, weight, *metric = (float(sum(map(Fraction, column))) for column in table.T.tolist())
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
    assert agree(WORLD, **own(table)).bad_entry == 7


@pytest.mark.mpi
@pytest.mark.parametrize("values", [(math.inf, -math.inf), (1.7e308, 1.7e308)])
def test_a_sum_that_does_not_exist_is_not_finite(values: tuple[float, float]) -> None:
    table = np.zeros((16, 2))
    table[[3, 12], 0] = values
    assert not math.isfinite(agree(WORLD, **own(table)).loss)


@pytest.mark.mpi
@pytest.mark.parametrize("entries", [0, 16])
def test_no_rows(entries: int) -> None:
    record = agree(WORLD, np.zeros((entries, 4)))
    assert record == Record(0.0, 0.0, [0.0, 0.0])
    assert record.mean_loss == 0.0


@pytest.mark.mpi
def test_later_messages_do_not_mix() -> None:
    losses = [agree(WORLD, **own(np.full((16, 2), float(step)))).loss for step in range(20)]
    assert losses == [16.0 * step for step in range(20)]


@pytest.mark.mpi
@pytest.mark.parametrize("entries", [16, 40 * WORLD.size, 100 * WORLD.size], ids=["few", "some", "many"])
def test_steps_may_have_fewer_columns_than_the_most(entries: int) -> None:
    """As those of which the metric is not measured; what they agree on is the same as of a table with all columns."""
    columns, random = 50, np.random.default_rng(0)
    agreement = agreement_of(entries, columns)
    for step in range(30):
        whole = random.standard_normal((entries, columns)) * 10.0 ** random.integers(-8, 8, (entries, columns))
        loss, weight, *metric = map(math.fsum, whole.T.tolist())
        width = (2, columns, 7)[step % 3]
        record = agreement(own(whole[:, :width])["rows"], False, step == 3)
        assert record == Record(loss, weight, metric[: width - 2], stop=step == 3)


@pytest.mark.mpi
@pytest.mark.parametrize(("entries", "leaf"), [(16, 1), (35, 7), (100 * WORLD.size, 1), (100 * WORLD.size, 50)])
def test_agreements_name_the_first_bad_entry(entries: int, leaf: int) -> None:
    agreement, table = agreement_of(entries, 2, leaf), np.ones((entries, 2))
    table[[7, 13], 0] = math.nan, math.inf
    assert agreement(own(table, leaf)["rows"]).bad_entry == 7
    table[7, 0] = 0
    record = agreement(own(table, leaf)["rows"])
    assert (record.bad_entry, record.loss, record.weight) == (13, math.inf, entries)


@pytest.mark.mpi
def test_sums_that_come_one_after_another() -> None:
    rows = np.random.default_rng(WORLD.rank).standard_normal((30, 3))
    sums = Sums(3, 30 * WORLD.rank)
    for start in range(0, 30, 10):
        sums.add(rows[start : start + 10])
    assert sums.over_all(WORLD) == agree(WORLD, rows)
    sums.add(np.full((1, 3), math.nan if WORLD.rank == LAST else 0.0))
    assert sums.over_all(WORLD).bad_entry == 30 * LAST + 30

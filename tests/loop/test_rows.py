"""Which rows are micro-batch m of step t: those of mpiml.train, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.data.order import SHUFFLES
from mpiml.data.shards import Shards
from mpiml.errors import ConfigError
from mpiml.loop.guard import clock
from mpiml.loop.rows import Rows
from mpiml.parallel.memory import MEMORIES

WORLD = MPI.COMM_WORLD
MOST = max(5, WORLD.size)  # micro-batches
ORDERS: list[dict[str, Any]] = [
    {},
    {"strided": True},
    {"shuffle": "blocks", "block_rows": 4},
    {"shuffle": "none"},
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_they_are_the_rows_of_the_shards_of_a_run(order: dict[str, Any]) -> None:
    x = np.arange(103.0)
    split = Dataset.from_arrays(x[:, None], x, x[:, None], x).train
    shards = Shards(split, 5, 20, 7, 0, 5, np.float64, **order)
    rows = Rows(103, 20, 5, 7, MPI.COMM_SELF, **order)
    assert (rows.steps_per_epoch, rows.rows_per_step) == (shards.steps_per_epoch, shards.rows_per_step)
    for step in (1, 2, 6, 7, 31):
        batches = shards.batches(step)
        assert [m for m, _ in rows.mine(step)] == [batch.index for batch in batches] == list(range(5))
        for (_, numbers), batch in zip(rows.mine(step), batches, strict=True):
            np.testing.assert_array_equal(x[numbers], batch.y())


@pytest.mark.mpi
def test_an_epoch_has_every_row_once_on_all_ranks_together() -> None:
    microbatches = max(8, WORLD.size)
    rows = Rows(50, 9, microbatches, seed=3)
    used = [numbers for step in range(1, rows.steps_per_epoch + 1) for _, numbers in rows.mine(step)]
    assert sorted(
        np.concatenate([numbers for of_rank in WORLD.allgather(used) for numbers in of_rank]).tolist()
    ) == list(range(50))
    alone = Rows(50, 9, microbatches, seed=3, comm=MPI.COMM_SELF)
    assert [m for m, _ in rows.mine(3)] == list(rows.own)
    for m, numbers in rows.mine(3):
        np.testing.assert_array_equal(numbers, alone.mine(3)[m][1])
    assert clock().step == 3


@pytest.mark.mpi
def test_each_rank_has_a_micro_batch_if_nothing_else_is_said() -> None:
    assert Rows(50, 9).microbatches == WORLD.size
    assert len(Rows(50, 9).own) == 1


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 4}, f"4 rows, {MOST} micro-batches: each needs one row at least"),
        ({"count": "many"}, "count 'many': must be a whole number, 1 or more"),
        ({"batch": 0}, "batch 0: must be a whole number, 1 or more"),
        ({"batch": 2.5}, "batch 2.5: must be a whole number, 1 or more"),
        ({"microbatches": 0}, "microbatches 0: must be a whole number, 1 or more"),
        ({"seed": -1}, "seed -1: must be a whole number, 0 or more"),
        ({"seed": None}, "seed None: must be a whole number, 0 or more"),
        ({"shuffle": "often"}, "shuffle 'often': choose from none, rows, blocks"),
        ({"strided": "no"}, "strided 'no': must be True or False"),
        ({"block_rows": 0}, "block_rows 0: must be a whole number, 1 or more"),
    ],
    ids=str,
)
def test_what_does_not_work_is_refused_on_all_ranks_alike(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Rows(**({"count": 20, "batch": 5, "microbatches": MOST} | change))
    assert str(error.value) == message
    assert error.value.everywhere


@pytest.mark.mpi
@pytest.mark.skipif(WORLD.size == 1, reason="needs other ranks")
def test_fewer_micro_batches_than_ranks_and_rows_that_ranks_count_differently() -> None:
    with pytest.raises(ConfigError, match=f"microbatches 1: {WORLD.size} ranks need at least one each"):
        Rows(20, 5, 1)
    with pytest.raises(ConfigError, match=r"ranks differ in count: 101 \(rank 1 on .*\), 100 \(rank 0\)"):
        Rows(100 + WORLD.rank, 5, WORLD.size)


@pytest.mark.parametrize("step", [0, -3, 1.5, None])
def test_steps_are_counted_from_1(step: Any) -> None:
    with pytest.raises(ConfigError, match="must be a whole number, 1 or more"):
        Rows(20, 5, 5, comm=MPI.COMM_SELF).mine(step)


def test_choices_are_those_of_a_run() -> None:
    choices = {field.name: tuple(field.metadata.get("choices", ())) for field in fields(Config)}
    assert (choices["shuffle"], choices["memory"]) == (SHUFFLES, MEMORIES)

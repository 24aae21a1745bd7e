"""Shards: every row once an epoch, the same rows on every layout, steps of about the same size."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpiml.data.dataset import Split
from mpiml.data.shards import Shards, chunks
from mpiml.data.sources import ArraySource
from mpiml.partition import part

SEED = 11
# (rows, micro-batches, batch): even and ragged, batches of one row and of more than all, one row a shard.
CASES = [
    *((64, 4, 16), (64, 4, 64), (100, 7, 13), (100, 1, 13), (101, 100, 10)),
    *(
        (5, 5, 2),
        (1, 1, 1),
        (1, 1, 8),
        (7, 3, 100),
        (13, 13, 13),
        (13, 13, 1),
        (17, 16, 4),
        (31, 2, 1),
        (1437, 24, 128),
    ),
]
every_case = pytest.mark.parametrize(("rows", "microbatches", "batch"), CASES)


class Recorder(ArraySource):
    """Row i holds the number i; remembers which rows were asked for."""

    def __init__(self, rows: int):
        super().__init__(np.arange(rows))
        self.read: set[int] = set()

    def rows(self, indices: np.ndarray) -> np.ndarray:
        self.read.update(indices.tolist())
        return super().rows(indices)


def shards(
    rows: int, microbatches: int, batch: int, block: tuple[int, int] | None = None, seed: int = SEED
) -> tuple[Shards, Recorder]:
    source = Recorder(rows)
    first, last = block or (0, microbatches)
    return Shards(Split(source, source), microbatches, batch, seed, first, last, "float64"), source


def epoch(of: Shards, number: int = 0) -> list[list[np.ndarray]]:
    """The rows of every micro-batch of every step of an epoch."""
    first = 1 + number * of.steps_per_epoch
    return [[batch.y() for batch in of.batches(step)] for step in range(first, first + of.steps_per_epoch)]


def flat(steps: list[list[np.ndarray]]) -> np.ndarray:
    return np.concatenate([rows for step in steps for rows in step])


@every_case
@pytest.mark.parametrize("number", [0, 3])
def test_every_row_once_an_epoch(rows: int, microbatches: int, batch: int, number: int) -> None:
    of, _ = shards(rows, microbatches, batch)
    assert of.steps_per_epoch == math.ceil(rows / batch)
    assert sorted(flat(epoch(of, number))) == list(range(rows))


@every_case
def test_a_microbatch_says_how_many_rows_it_has(rows: int, microbatches: int, batch: int) -> None:
    of, _ = shards(rows, microbatches, batch)
    for step in range(1, of.steps_per_epoch + 1):
        batches = of.batches(step)
        assert [b.index for b in batches] == list(range(microbatches))
        assert [b.rows for b in batches] == [len(b.x()) for b in batches]


@every_case
@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_replicas_together_read_what_one_would(rows: int, microbatches: int, batch: int, replicas: int) -> None:
    replicas = min(replicas, microbatches)
    alone = epoch(shards(rows, microbatches, batch)[0], 1)
    blocks = [part(replica, replicas, microbatches) for replica in range(replicas)]
    together = [epoch(shards(rows, microbatches, batch, block)[0], 1) for block in blocks]
    for step, expected in enumerate(alone):
        joined = [rows_of for replica in together for rows_of in replica[step]]
        assert len(joined) == len(expected)
        assert all(np.array_equal(a, b) for a, b in zip(joined, expected, strict=True))


@every_case
def test_a_replica_reads_only_what_it_holds(rows: int, microbatches: int, batch: int) -> None:
    replicas = min(3, microbatches)
    held = []
    for replica in range(replicas):
        of, source = shards(rows, microbatches, batch, part(replica, replicas, microbatches))
        epoch(of)
        assert source.read == set(of.rows().tolist())
        held += of.rows().tolist()
    assert held == list(range(rows))


@every_case
def test_nothing_is_read_before_it_is_asked_for(rows: int, microbatches: int, batch: int) -> None:
    of, source = shards(rows, microbatches, batch)
    of.batches(1)
    assert not source.read


@every_case
def test_steps_are_of_about_the_same_size(rows: int, microbatches: int, batch: int) -> None:
    sizes = [sum(map(len, step)) for step in epoch(shards(rows, microbatches, batch)[0])]
    assert sum(sizes) == rows
    # Each shard rounds for itself: left to chance the spread would grow with their number.
    assert max(sizes) - min(sizes) <= 3
    assert max(abs(size - rows / len(sizes)) for size in sizes) <= 2.1


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 32, 100])
@pytest.mark.parametrize("rows", [1, 2, 13, 100])
def test_shards_of_one_row_make_even_steps(rows: int, batch: int) -> None:
    sizes = [sum(map(len, step)) for step in epoch(shards(rows, rows, batch)[0])]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("microbatches", [7, 16, 64])
def test_short_shards_are_spread_over_the_steps(microbatches: int) -> None:
    # 2 to 18 rows a shard and 12 steps: in step with each other, all shards would give a row in the same steps.
    sizes = [sum(map(len, step)) for step in epoch(shards(129, microbatches, 11)[0])]
    assert len(sizes) == 12
    assert 9 <= min(sizes) <= max(sizes) <= 13


def test_order_is_drawn_anew_for_epoch_seed_and_shard() -> None:
    def orders(number: int, seed: int = SEED) -> list[list[int]]:
        steps = epoch(shards(200, 2, 20, seed=seed)[0], number)
        return [(np.concatenate([step[shard] for step in steps]) - 100 * shard).tolist() for shard in (0, 1)]

    assert orders(0) == orders(0)
    different = [*orders(0), *orders(1), *orders(0, seed=12), list(range(100))]
    assert len(set(map(tuple, different))) == 7


def test_order_of_a_shard_is_independent_of_the_batch() -> None:
    one, other = (np.concatenate([step[1] for step in epoch(shards(60, 3, batch)[0])]) for batch in (6, 25))
    np.testing.assert_array_equal(one, other)


def test_a_step_depends_on_its_number_alone() -> None:
    of, _ = shards(40, 4, 7)
    ahead = {step: np.concatenate([b.y() for b in of.batches(step)]) for step in (13, 1, 7, 6)}
    kept = of.batches(1)  # read only after a later epoch has been
    of.batches(20)[0].y()
    np.testing.assert_array_equal(np.concatenate([b.y() for b in kept]), ahead[1])
    for step, rows in ahead.items():
        np.testing.assert_array_equal(np.concatenate([b.y() for b in shards(40, 4, 7)[0].batches(step)]), rows)


@pytest.mark.parametrize(("rows", "chunk_rows"), [(10, 4), (8, 4), (3, 10), (1, 1)])
def test_chunks_are_all_rows_in_order(rows: int, chunk_rows: int) -> None:
    source = Recorder(rows)
    count = math.ceil(rows / chunk_rows)
    whole = chunks(Split(source, source), chunk_rows, 0, count, "float64")
    assert [c.index for c in whole] == list(range(count))
    assert [c.rows for c in whole] == [len(c.y()) for c in whole]
    np.testing.assert_array_equal(np.concatenate([c.y() for c in whole]), np.arange(rows))
    (last,) = chunks(Split(source, source), chunk_rows, count - 1, count, "float64")
    np.testing.assert_array_equal(last.y(), whole[-1].y())

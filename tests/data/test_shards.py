"""Shards: every row once an epoch, the same rows on every layout, steps of about the same size."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from mpiml.data import shards as module
from mpiml.data.dataset import Split
from mpiml.data.order import block_order
from mpiml.data.shards import Shards, chunks, classes_seen, starved
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
    rows: int, microbatches: int, batch: int, block: tuple[int, int] | None = None, seed: int = SEED, **order: Any
) -> tuple[Shards, Recorder]:
    source = Recorder(rows)
    first, last = block or (0, microbatches)
    return Shards(Split(source, source), microbatches, batch, seed, first, last, "float64", **order), source


def epoch(of: Shards, number: int = 0) -> list[list[np.ndarray]]:
    """The rows of every micro-batch of every step of an epoch."""
    first = 1 + number * of.steps_per_epoch
    return [[batch.y() for batch in of.batches(step)] for step in range(first, first + of.steps_per_epoch)]


def flat(steps: list[list[np.ndarray]]) -> np.ndarray:
    return np.concatenate([rows for step in steps for rows in step])


ORDERS: list[dict[str, Any]] = [
    {},
    {"shuffle": "none"},
    {"shuffle": "blocks", "block_rows": 1},
    {"shuffle": "blocks", "block_rows": 5},
    {"shuffle": "blocks", "block_rows": 1000},
    {"strided": True},
    {"shuffle": "none", "strided": True},
]


@every_case
@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_row_once_an_epoch(rows: int, microbatches: int, batch: int, number: int, order: Any) -> None:
    of, _ = shards(rows, microbatches, batch, **order)
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
@pytest.mark.parametrize("order", ORDERS[::5], ids=str)
def test_the_smallest_micro_batch_is_known(rows: int, microbatches: int, batch: int, order: Any) -> None:
    of, _ = shards(rows, microbatches, batch, **order)
    assert of.smallest() == min(len(rows) for step in epoch(of) for rows in step if len(rows))


@pytest.mark.parametrize("strided", [False, True])
def test_numbers_of_rows_take_no_more_memory_than_they_need(strided: bool) -> None:
    of, _ = shards(1 << 20, 64, 1 << 10, (16, 48), strided=strided)
    tracemalloc.start()
    try:
        kept = of.rows().nbytes
        assert tracemalloc.get_traced_memory()[1] < 1.1 * kept
    finally:
        tracemalloc.stop()
    assert kept == 8 << 19


@every_case
@pytest.mark.parametrize("replicas", [2, 3, 5])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_replicas_together_read_what_one_would(
    rows: int, microbatches: int, batch: int, replicas: int, order: Any
) -> None:
    replicas = min(replicas, microbatches)
    alone = epoch(shards(rows, microbatches, batch, **order)[0], 1)
    ours = [part(replica, replicas, microbatches) for replica in range(replicas)]
    together = [epoch(shards(rows, microbatches, batch, block, **order)[0], 1) for block in ours]
    for step, expected in enumerate(alone):
        joined = [rows_of for replica in together for rows_of in replica[step]]
        assert len(joined) == len(expected)
        assert all(np.array_equal(a, b) for a, b in zip(joined, expected, strict=True))


@every_case
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_replica_reads_only_what_it_holds(rows: int, microbatches: int, batch: int, order: Any) -> None:
    replicas = min(3, microbatches)
    held: list[int] = []
    for replica in range(replicas):
        of, source = shards(rows, microbatches, batch, part(replica, replicas, microbatches), **order)
        epoch(of)
        assert source.read == set(of.rows().tolist())
        assert (np.diff(of.rows()) > 0).all()
        held += of.rows().tolist()
    assert sorted(held) == list(range(rows))
    if not order.get("strided"):
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


def test_random_numbers_of_a_transform_belong_to_the_step_and_the_microbatch() -> None:
    def numbers(step: int, m: int, seed: int = SEED) -> float:
        of, _ = shards(40, 4, 7, (m, m + 1), seed, transform=lambda x, y, random: (x * 0 + random.random(), y))
        return float(of.batches(step)[0].x()[0])

    drawn = [numbers(step, m) for step in (1, 2, 7, 8) for m in (0, 3)]
    assert len({*drawn, numbers(1, 0, 12)}) == 9
    assert numbers(8, 3) == drawn[-1]


def test_rows_in_the_order_in_which_they_are_stored() -> None:
    assert flat(epoch(shards(40, 1, 7, shuffle="none")[0], 5)).tolist() == list(range(40))
    strided = np.concatenate([step[1] for step in epoch(shards(40, 3, 7, shuffle="none", strided=True)[0])])
    assert strided.tolist() == list(range(1, 40, 3))


def test_blocks_are_runs_of_consecutive_rows() -> None:
    for number in (0, 1):
        (order,) = (
            np.concatenate([step[0] for step in epoch(shards(50, 1, 9, shuffle="blocks", block_rows=8)[0], number)]),
        )
        runs = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1)
        assert all(run[0] % 8 == 0 for run in runs)
        assert all(len(run) % 8 == 0 or run[-1] == 49 for run in runs)
        assert len(runs) > 3


def test_blocks_come_in_another_order_for_epoch_seed_and_shard() -> None:
    def orders(number: int, seed: int = SEED) -> list[list[int]]:
        steps = epoch(shards(400, 2, 20, seed=seed, shuffle="blocks", block_rows=4)[0], number)
        return [(np.concatenate([step[m] for step in steps]) - 200 * m).tolist() for m in (0, 1)]

    assert orders(0) == orders(0)
    assert len(set(map(tuple, [*orders(0), *orders(1), *orders(0, seed=12)]))) == 6


@pytest.mark.parametrize(("length", "block"), [(1, 1), (10, 3), (12, 4), (5, 9), (64, 7)])
def test_any_part_of_an_order_of_blocks(length: int, block: int) -> None:
    order = block_order(length, block, np.random.default_rng(3))
    whole = order(0, length)
    assert sorted(whole) == list(range(length))
    for a in range(length + 1):
        for b in range(a, length + 1):
            np.testing.assert_array_equal(order(a, b), whole[a:b])


def test_blocks_need_no_permutation_of_the_rows() -> None:
    import tracemalloc

    of, _ = shards(4, 1, 1)
    of.shuffle, of.block_rows = "blocks", 4096
    tracemalloc.start()
    rows = of._draw(0, 0, 1 << 40 >> 10)(1 << 29, (1 << 29) + 9)  # 2^30 rows: a permutation has 8 GiB
    assert len(rows) == 9
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def labelled(labels: np.ndarray, microbatches: int, strided: bool = False) -> str | None:
    split = Split(ArraySource(labels), ArraySource(labels))
    first, last = (
        Shards(split, microbatches, 10, 0, *block, "float32", strided=strided)
        for block in ((0, microbatches // 2), (microbatches // 2, microbatches))
    )
    classes = int(labels.max()) + 1
    (counts, seen), (others, also) = (classes_seen(half, classes) for half in (first, last))
    return starved(counts + others, seen + also)


def test_labels_are_counted_some_at_a_time_and_each_time_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(90) % 7 - 1
    source = ArraySource(labels)
    shards_ = Shards(Split(source, source), 3, 9, SEED, 0, 2, "float32")
    whole = classes_seen(shards_, 7)
    monkeypatch.setattr(module, "SCAN", 8)
    moves: list[int] = []
    for one, other in zip(classes_seen(shards_, 7, lambda: moves.append(1)), whole, strict=True):
        np.testing.assert_array_equal(one, other)
    assert whole[0].tolist() == [sum(labels[:60] == label) for label in range(7)]
    assert len(moves) == 2 * 4


@pytest.mark.parametrize("microbatches", [2, 4, 16, 60])
@pytest.mark.parametrize("classes", [2, 10, 40])
def test_sorted_labels_starve_contiguous_shards(microbatches: int, classes: int) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, 1200)
    skewed = np.minimum(random.geometric(0.9, 1200) - 1, classes - 1)  # nine tenths are of one class
    assert labelled(labels, microbatches) is None
    assert labelled(skewed, microbatches) is None
    assert labelled(np.sort(labels), microbatches, strided=True) is None
    warning = labelled(np.sort(labels), microbatches)
    assert warning is not None
    assert "--shards strided" in warning


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

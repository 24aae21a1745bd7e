"""Which points a study measures: ranks, stages and micro-batches, and in which order."""

from __future__ import annotations

import pytest

from mpiml.errors import ConfigError
from mpiml.scaling.points import Point, points_of, shuffled


def test_strong_points_keep_the_batch() -> None:
    points = points_of("strong", [1, 2, 4], [1, 2], 64, None)
    assert [p for p in points if not p.extra] == [
        Point(1, 1, 64, 1),
        Point(2, 1, 64, 2),
        Point(2, 2, 64, 4),
        Point(4, 1, 64, 4),
        Point(4, 2, 64, 8),
    ]
    assert [p.microbatches for p in points if p.extra] == [2, 4, 8]  # one rank with one is there already


def test_weak_points_keep_the_rows_of_a_rank() -> None:
    points = points_of("weak", [1, 2, 4], [1, 2], 64, None)
    assert {p.batch / p.ranks for p in points} == {64}
    assert [p.microbatches for p in points if p.extra] == [2]  # pipelines have two micro-batches a rank, others one


def test_given_microbatches_are_kept() -> None:
    assert {p.microbatches for p in points_of("strong", [1, 2, 4], [1], 64, 8)} == {1, 8}


@pytest.mark.parametrize(("mode", "alone"), [("strong", [4, 8, 16]), ("weak", [4, 8])])
def test_workers_have_equally_many_micro_batches(mode: str, alone: list[int]) -> None:
    points = points_of(mode, [1, 2, 8], [1, 2], 64, None, 4)
    assert [p.microbatches for p in points if not p.extra] == [4, 4, 16, 8, 16]  # two for each stage of a pipeline
    assert [p.microbatches for p in points if p.ranks == 1] == alone


def test_replicas_have_whole_leaves() -> None:
    points = points_of("strong", [1, 2, 8], [1, 2], 64, None, None, 3)
    assert [p.microbatches for p in points if not p.extra] == [3, 6, 3, 24, 15]  # two for each stage, and one left out
    assert [p.microbatches for p in points if p.ranks == 1] == [3, 6, 15, 24]
    with pytest.raises(ConfigError, match="--microbatches 12 --leaf 3: fewer than the replicas of the largest point"):
        points_of("strong", [1, 8], [1], 64, 12, None, 3)


@pytest.mark.parametrize(
    ("ranks", "pipes", "batch", "microbatches", "named"),
    [([1, 3], [2], 64, None, "--ranks 3"), ([1, 8], [1], 4, None, "--ranks 8"), ([1, 8], [1], 64, 4, "4: fewer")],
)
def test_what_cannot_be_measured_is_refused(
    ranks: list[int], pipes: list[int], batch: int, microbatches: int | None, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        points_of("strong", ranks, pipes, batch, microbatches)


def test_repeats_are_shuffled_alike_each_time() -> None:
    points = points_of("strong", [1, 2, 4, 8], [1], 64, None)
    order = shuffled(points, 3)
    assert order == shuffled(points, 3)
    plain = [(point, repeat) for point in points for repeat in range(3)]
    assert sorted(order) == sorted(plain)
    assert order != plain
    assert [point for point, _ in order[:3]] != [points[0]] * 3  # a point's repeats are apart

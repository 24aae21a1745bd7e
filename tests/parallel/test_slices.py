"""Tests of cutting flat vectors into owners' slices and cache-sized pieces, against brute force."""

import itertools
import random
from typing import NamedTuple

import pytest

from mpiml.parallel import slices
from mpiml.parallel.slices import Range, bounds, bucket_size, buckets, cut, overlaps, owned, pieces, place
from mpiml.vectors import PIECE


class Block(NamedTuple):
    start: int
    stop: int
    decay: bool
    momentum: float | None = None
    rate: float = 1.0
    matrix: int | None = None
    array: str | None = None
    counted: bool = True


def random_blocks(seed: int, longest: int = PIECE) -> list[Block]:
    """Runs with gaps, as padding makes them; averages first and those that decay last, as in a layout; in one of two,
    matrices of a few blocks."""
    draw = random.Random(seed)
    blocks, end = [], 0
    for index in range(draw.randint(1, 30)):
        length = draw.randint(1, longest)
        rate = 10.0 if 15 <= index < 20 else 1.0
        matrix = index // 3 if seed % 2 and index >= 12 else None
        blocks.append(Block(end, end + length, index >= 12, [0.1, 0.2, None][min(index // 4, 2)], rate, matrix))
        end += length + draw.randint(0, 15)
    return blocks


@pytest.mark.parametrize("owners", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("seed", range(8))
def test_owners_get_neighbouring_runs_of_nearly_equal_length(seed: int, owners: int) -> None:
    blocks = random_blocks(seed)[seed % 3 :]  # a bucket begins anywhere
    runs = owned(blocks, owners)
    assert len(runs) == owners
    assert list(itertools.chain(*runs)) == blocks
    if not blocks:
        return
    share, longest = (blocks[-1].stop - blocks[0].start) / owners, max(b.stop - b.start for b in blocks) + 15
    assert all(stop - start <= share + longest for start, stop in map(bounds, runs))


def test_a_run_begins_at_the_first_block_after_its_fair_share() -> None:
    blocks = [Block(10 * i, 10 * i + 10, True) for i in range(10)]
    assert [bounds(run) for run in owned(blocks, 4)] == [(0, 30), (30, 50), (50, 80), (80, 100)]


def test_owners_share_a_bucket_as_they_share_the_whole() -> None:
    blocks = [Block(10 * i, 10 * i + 10, True) for i in range(10, 20)]
    assert [bounds(run) for run in owned(blocks, 4)] == [(100, 130), (130, 150), (150, 180), (180, 200)]


@pytest.mark.parametrize("most", [2, 3, 7, 10**6])
@pytest.mark.parametrize("asked", [0, 1, 1000, 10 * PIECE])
@pytest.mark.parametrize("seed", range(4))
def test_there_are_as_many_buckets_as_are_asked_for_and_as_tags_can_tell_apart(
    seed: int, asked: int, most: int
) -> None:
    blocks = random_blocks(seed)
    size = blocks[-1].stop + 5
    runs = buckets(blocks, bucket_size(asked, size, 3, most))
    assert len(runs) <= most
    if asked == 0:
        assert len(runs) == 1
    elif most == 10**6:
        assert runs == buckets(blocks, asked)


def test_no_owner_has_more_of_a_bucket_than_fits_into_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "MESSAGE", 1000)
    blocks = [Block(10 * i, 10 * i + 10, True) for i in range(1000)]
    for owners in (1, 2, 7):
        runs = buckets(blocks, bucket_size(0, 10_000, owners, 10**6))
        lengths = [stop - start for run in runs for start, stop in map(bounds, owned(run, owners))]
        assert sum(lengths) == 10_000
        assert max(lengths) <= 1000 + 10
    assert cut([(5, 1005), (2000, 4001), (7, 7)]) == [(5, 1005), (2000, 3000), (3000, 4000), (4000, 4001)]


@pytest.mark.parametrize("size", [1, 1000, PIECE, 10 * PIECE, 10**9])
@pytest.mark.parametrize("seed", range(8))
def test_buckets_come_from_the_end_and_are_hardly_longer_than_asked(seed: int, size: int) -> None:
    blocks = random_blocks(seed)
    runs = buckets(blocks, size)
    assert list(itertools.chain(*reversed(runs))) == blocks
    assert all(run[-1].stop - run[0].start >= size for run in runs[:-1])
    assert all(run[-1].stop - run[1].start < size for run in runs if len(run) > 1)


def test_a_bucket_ends_as_soon_as_it_is_long_enough_and_without_a_size_never() -> None:
    blocks = [Block(10 * i, 10 * i + 10, True) for i in range(5)]
    assert [bounds(run) for run in buckets(blocks, 20)] == [(30, 50), (10, 30), (0, 10)]
    assert buckets(blocks, 0) == [blocks]
    assert buckets([], 0) == buckets([], 5) == []


def test_places_in_a_vector_of_ranges_alone() -> None:
    ranges = [(100, 110), (40, 47), (0, 3)]
    places = [place(ranges, *limits) for limits in [(100, 110), (104, 106), (40, 41), (46, 47), (0, 3)]]
    assert places == [slice(0, 10), slice(4, 6), slice(10, 11), slice(16, 17), slice(17, 20)]
    with pytest.raises(ValueError, match="47 to 48"):
        place(ranges, 47, 48)


def test_more_owners_than_blocks_leave_some_with_nothing() -> None:
    runs = owned([Block(0, 5, True), Block(5, 9, True)], 5)
    assert sorted(len(run) for run in runs) == [0, 0, 0, 1, 1]


def test_no_blocks_at_all() -> None:
    assert [list(run) for run in owned([], 3)] == [[], [], []]
    assert bounds([]) == (0, 0)
    assert pieces([]) == []


@pytest.mark.parametrize("longest", [100, PIECE // 3, PIECE])
@pytest.mark.parametrize("seed", range(8))
def test_pieces_hold_each_block_once_and_fit_the_cache(seed: int, longest: int) -> None:
    blocks = random_blocks(seed, longest)
    joined = pieces(blocks)
    inside = [
        Block(piece.start + start, piece.start + stop, piece.decay, piece.momentum, piece.rate, piece.matrix)
        for piece in joined
        for start, stop in piece.blocks
    ]
    assert inside == blocks
    for piece in joined:
        assert piece.stop - piece.start <= PIECE
        assert (piece.blocks[0][0], piece.blocks[-1][1]) == (0, piece.stop - piece.start)
    for left, right in itertools.pairwise(joined):
        kinds = [(piece.decay, piece.momentum, piece.rate, piece.matrix) for piece in (left, right)]
        assert kinds[0] != kinds[1] or left.start + PIECE < right.start + right.blocks[0][1], "could be joined"


@pytest.mark.parametrize("seed", range(20))
def test_overlaps_are_the_elements_that_both_have(seed: int) -> None:
    draw = random.Random(seed)

    def ranges() -> list[Range]:
        ends = sorted(draw.sample(range(40), 2 * draw.randint(0, 8)))
        if seed % 2:  # without gaps
            return list(itertools.pairwise(ends))
        return list(zip(ends[::2], ends[1::2], strict=True))

    one, other = ranges(), ranges()
    runs = [range(of[0] + part.start, of[0] + part.stop) for of, part in overlaps(one, other)]
    assert all(runs)
    assert all(part.stop <= of[1] - of[0] for of, part in overlaps(one, other))
    assert [i for run in runs for i in run] == [
        i for i in range(40) if all(any(a <= i < b for a, b in r) for r in (one, other))
    ]
    back = [range(of[0] + part.start, of[0] + part.stop) for of, part in overlaps(other, one)]
    assert back == runs

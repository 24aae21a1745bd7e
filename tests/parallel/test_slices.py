"""Tests of cutting flat vectors into owners' slices and cache-sized pieces, against brute force."""

import itertools
import random
from typing import NamedTuple

import pytest

from mpiml.parallel.slices import bounds, owned, pieces
from mpiml.vectors import PIECE


class Block(NamedTuple):
    start: int
    stop: int
    decay: bool


def random_blocks(seed: int, longest: int = PIECE) -> list[Block]:
    """Runs with gaps, as padding makes them; those that decay first, as in a layout."""
    draw = random.Random(seed)
    blocks, end = [], 0
    for index in range(draw.randint(1, 30)):
        length = draw.randint(1, longest)
        blocks.append(Block(end, end + length, index < 12))
        end += length + draw.randint(0, 15)
    return blocks


@pytest.mark.parametrize("owners", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("seed", range(8))
def test_owners_get_neighbouring_runs_of_nearly_equal_length(seed: int, owners: int) -> None:
    blocks = random_blocks(seed)
    runs = owned(blocks, owners)
    assert len(runs) == owners
    assert list(itertools.chain(*runs)) == blocks
    share, longest = blocks[-1].stop / owners, max(b.stop - b.start for b in blocks) + 15
    assert all(stop - start <= share + longest for start, stop in map(bounds, runs))


def test_a_run_begins_at_the_first_block_after_its_fair_share() -> None:
    blocks = [Block(10 * i, 10 * i + 10, True) for i in range(10)]
    assert [bounds(run) for run in owned(blocks, 4)] == [(0, 30), (30, 50), (50, 80), (80, 100)]


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
    found = pieces(blocks)
    inside = [
        Block(piece.start + start, piece.start + stop, piece.decay) for piece in found for start, stop in piece.blocks
    ]
    assert inside == blocks
    for piece in found:
        assert piece.stop - piece.start <= PIECE
        assert (piece.blocks[0][0], piece.blocks[-1][1]) == (0, piece.stop - piece.start)
    for left, right in itertools.pairwise(found):
        assert left.decay != right.decay or left.start + PIECE < right.start + right.blocks[0][1], "could be joined"

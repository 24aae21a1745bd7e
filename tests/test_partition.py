"""Tests of cutting ranks into pipelines, and layers into stages, against all possible cuts."""

import itertools
import random

import pytest

from mpiml.errors import ConfigError
from mpiml.partition import balanced, check_cuts, check_ranks, part, part_of


@pytest.mark.parametrize(
    ("ranks", "pipe", "message"),
    [
        (6, 4, r"^6 ranks do not divide into pipelines of 4 stages; --pipe 1, 2, 3, 6 would work$"),
        (4, 8, r"^4 ranks do not divide into pipelines of 8 stages; --pipe 1, 2, 4 would work$"),
        (1, 2, r"^1 ranks do not divide into pipelines of 2 stages; --pipe 1 would work$"),
    ],
)
def test_refused_grids_say_what_would_work(ranks: int, pipe: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_ranks(ranks, pipe)


@pytest.mark.parametrize(("ranks", "pipe"), [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6), (16, 4)])
def test_good_grids(ranks: int, pipe: int) -> None:
    check_ranks(ranks, pipe)


@pytest.mark.parametrize(("parts", "total", "leaf"), [(5, 37, 1), (3, 12, 4), (4, 24, 2), (5, 60, 4), (7, 3, 1)])
def test_parts_are_one_after_another_and_made_of_whole_leaves(parts: int, total: int, leaf: int) -> None:
    cut = [part(index, parts, total, leaf) for index in range(parts)]
    assert [number for start, stop in cut for number in range(start, stop)] == list(range(total))
    assert all(start % leaf == stop % leaf == 0 for start, stop in cut)
    lengths = [(stop - start) // leaf for start, stop in cut]
    assert max(lengths) - min(lengths) <= 1
    assert [part_of(m, parts, total, leaf) for m in range(total)] == [
        index for index, (start, stop) in enumerate(cut) for _ in range(start, stop)
    ]


def dearest(costs: list[int], cuts: list[int]) -> int:
    """The cost of the most expensive stage."""
    return max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)]))


def cheapest(costs: list[int], stages: int) -> int:
    """The best that any cuts can do."""
    return min(dearest(costs, list(cuts)) for cuts in itertools.combinations(range(1, len(costs)), stages - 1))


@pytest.mark.parametrize("seed", range(40))
def test_no_cuts_are_better(seed: int) -> None:
    draw = random.Random(seed)
    costs = [draw.choice([0, 0, 1, 2, 5, 100, draw.randint(1, 1000)]) for _ in range(draw.randint(1, 9))]
    for stages in range(1, len(costs) + 1):
        cuts = balanced(costs, stages)
        check_cuts(cuts, len(costs), stages)
        assert dearest(costs, cuts) == cheapest(costs, stages)


@pytest.mark.parametrize(
    ("costs", "stages", "expected"),
    [([5, 5, 5, 5], 2, [2]), ([9, 1, 1, 1], 2, [1]), ([0, 0, 0], 3, [1, 2]), ([1, 1, 1, 9], 3, [2, 3])],
)
def test_known_cuts(costs: list[int], stages: int, expected: list[int]) -> None:
    cuts = balanced(costs, stages)
    assert dearest(costs, cuts) == dearest(costs, expected)
    assert len(cuts) == stages - 1


def test_more_stages_than_layers() -> None:
    with pytest.raises(ConfigError, match=r"3 layers cannot be cut into 4 stages; --pipe 3 at most"):
        balanced([1, 2, 3], 4)


@pytest.mark.parametrize(("cuts", "layers", "stages"), [([], 1, 1), ([1], 2, 2), ([1, 2, 6], 7, 4), ((2, 5), 6, 3)])
def test_good_cuts(cuts: list[int], layers: int, stages: int) -> None:
    check_cuts(cuts, layers, stages)


@pytest.mark.parametrize(
    ("cuts", "layers", "stages", "message"),
    [
        ([2], 7, 4, r"--cuts 2: 1 given, but 3 needed for --pipe 4"),
        ([1, 2], 7, 1, r"--cuts 1,2: 2 given, but 0 needed for --pipe 1"),
        ([2, 2], 7, 3, r"--cuts 2,2: must increase and lie between 1 and 6 \(7 layers\)"),
        ([4, 2], 7, 3, r"--cuts 4,2: must increase"),
        ([0, 2], 7, 3, r"--cuts 0,2: must increase and lie between 1 and 6"),
        ([2, 7], 7, 3, r"--cuts 2,7: must increase and lie between 1 and 6"),
    ],
)
def test_refused_cuts_say_why(cuts: list[int], layers: int, stages: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_cuts(cuts, layers, stages)

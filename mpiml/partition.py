"""Cutting into parts: a range into nearly equal ones, ranks into pipelines, layers into stages; no MPI."""

import itertools
from collections.abc import Sequence

from mpiml.errors import ConfigError


def part(index: int, parts: int, total: int, leaf: int = 1) -> tuple[int, int]:
    """The index-th of `parts` contiguous, nearly equal parts of 0..total-1, as (start, stop). They are made of whole
    runs of `leaf` numbers, which divides the total, as replicas have whole leaves of micro-batches."""
    leaves = total // leaf
    return leaves * index // parts * leaf, leaves * (index + 1) // parts * leaf


def part_of(number: int, parts: int, total: int, leaf: int = 1) -> int:
    """In which of those parts a number is."""
    return (parts * (number // leaf + 1) - 1) // (total // leaf)


def check_ranks(ranks: int, pipe: int) -> None:
    """Raise ConfigError unless `ranks` divide into pipelines of `pipe` stages."""
    if pipe > ranks or ranks % pipe:
        fits = ", ".join(str(s) for s in range(1, ranks + 1) if ranks % s == 0)
        raise ConfigError(f"{ranks} ranks do not divide into pipelines of {pipe} stages; --pipe {fits} would work")


def balanced(costs: Sequence[int], stages: int) -> list[int]:
    """Where to cut so that the most expensive stage is as cheap as possible; exact.

    Args:
        costs: of each layer, in order; not negative.
        stages: the number of parts; each gets at least one layer.

    Returns stages - 1 increasing indices: a stage begins at each.
    """
    if stages > len(costs):
        raise ConfigError(f"{len(costs)} layers cannot be cut into {stages} stages; --pipe {len(costs)} at most")
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if len(_greedy(costs, stages, middle)) < stages:
            high = middle
        else:
            low = middle + 1
    return _greedy(costs, stages, low)


def _greedy(costs: Sequence[int], stages: int, limit: int) -> list[int]:
    """Cuts that fill each stage up to `limit`, but leave a layer for each later stage; stages - 1 of them if that keeps
    every stage within the limit, else more."""
    cuts: list[int] = []
    filled = 0
    for index, cost in enumerate(costs):
        must = len(costs) - index == stages - 1 - len(cuts)
        if index and (filled + cost > limit or must):
            cuts.append(index)
            filled = 0
        filled += cost
    return cuts


def check_cuts(cuts: Sequence[int], layers: int, stages: int) -> None:
    """Raise ConfigError unless `cuts` give each of `stages` stages at least one of `layers` layers."""
    what = f"--cuts {','.join(map(str, cuts))}"
    if len(cuts) != stages - 1:
        raise ConfigError(f"{what}: {len(cuts)} given, but {stages - 1} needed for --pipe {stages}")
    bounds = [0, *cuts, layers]
    if any(a >= b for a, b in itertools.pairwise(bounds)):
        raise ConfigError(f"{what}: must increase and lie between 1 and {layers - 1} ({layers} layers)")

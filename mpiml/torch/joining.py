"""Ranks with different numbers of batches: those that are done with their own answer the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpiml.errors import ConfigError
from mpiml.torch import alike
from mpiml.torch.average import Average

_joining: list[Average] = []  # that this rank is in a join() of


@contextmanager
def joined(average: Average, by_all_ranks: bool) -> Iterator[None]:
    """As DataParallel.join."""
    if _joining:
        raise ConfigError(
            "join() within a join(): ranks that have joined answer one DataParallel alone; with several, give all "
            "ranks the same number of batches"
        )
    average.by_all_ranks = by_all_ranks
    _joining.append(average)
    try:
        yield
        answers = 0
        while average.answer():
            answers += 1
    finally:
        average.by_all_ranks = False
        _joining.remove(average)
    counts = average.team.allgather(answers)
    with_most_batches = counts.index(min(counts))
    alike.broadcast(average.team, average.values(), with_most_batches)

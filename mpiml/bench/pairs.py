"""Measuring in pairs: two actions in turn on the same ranks, so that a slower machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpiml.team import quiet_barrier

PAIRS = 9
Action = Callable[[], None]


@dataclass
class Ratio:
    """The ratio of two figures over all pairs: its median, and the range of the middle half."""

    median: float
    low: float
    high: float

    @classmethod
    def once(cls, ratio: float) -> Ratio:
        """Of a single measurement."""
        return cls(ratio, ratio, ratio)

    @classmethod
    def of(cls, tops: Sequence[float], bottoms: Sequence[float], factor: float = 1.0) -> Ratio:
        """`factor` times the ratio of the two figures of each pair."""
        ratios = [factor * a / b for a, b in zip(tops, bottoms, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        return cls(statistics.median(ratios), low, high)


def ratio(comm: MPI.Intracomm, over: Action, under: Action, repeats: int) -> Ratio:
    """The time of one action over that of another: the rate of `under` over that of `over`."""
    tops, bottoms = times(comm, [over, under], [repeats, repeats])
    return Ratio.of(tops, bottoms)


def times(
    comm: MPI.Intracomm, actions: Sequence[Action | None], repeats: Sequence[int], pairs: int = PAIRS
) -> list[list[float]]:
    """For each action, the seconds of a call in every pair, on the slowest rank; the actions take turns.

    A rank that takes no part in an action has None in its place and sleeps. A first pair warms up and does not count.
    """
    results: list[list[float]] = [[] for _ in actions]
    for pair in range(pairs + 1):
        order = range(len(actions)) if pair % 2 else reversed(range(len(actions)))
        for index in order:
            quiet_barrier(comm)
            spent = np.array([seconds(actions[index], repeats[index])])
            quiet_barrier(comm)
            comm.Allreduce(MPI.IN_PLACE, spent, MPI.MAX)
            if pair:
                results[index].append(float(spent[0]))
    return results


def seconds(action: Action | None, repeats: int) -> float:
    """The mean time of a call, after one that does not count: ranks leave the barrier at different times, and this one
    brings them into step."""
    if action is None:
        return 0.0
    action()
    began = time.perf_counter()
    for _ in range(repeats):
        action()
    return (time.perf_counter() - began) / repeats

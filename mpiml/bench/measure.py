"""Measuring in pairs: two things in turn on the same ranks, so that a drifting machine slows both alike."""

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
    """One figure over another, pair by pair: the median, and the range of the middle half."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, tops: Sequence[float], bottoms: Sequence[float], factor: float = 1.0) -> Ratio:
        """From the two figures of every pair; `factor` times their ratio."""
        ratios = [factor * a / b for a, b in zip(tops, bottoms, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        return cls(statistics.median(ratios), low, high)


def times(
    comm: MPI.Intracomm, actions: Sequence[Action | None], repeats: Sequence[int], pairs: int = PAIRS
) -> list[list[float]]:
    """Seconds of a call of each action, for every pair, each action in turn; the slowest rank's time counts.

    A rank that takes no part in an action has None in its place and sleeps; a first, uncounted round warms up.
    """
    found: list[list[float]] = [[] for _ in actions]
    for pair in range(pairs + 1):
        order = range(len(actions)) if pair % 2 else reversed(range(len(actions)))
        for index in order:
            quiet_barrier(comm)
            spent = np.array([seconds(actions[index], repeats[index])])
            quiet_barrier(comm)
            comm.Allreduce(MPI.IN_PLACE, spent, MPI.MAX)
            if pair:
                found[index].append(float(spent[0]))
    return found


def seconds(action: Action | None, repeats: int) -> float:
    """The mean time of a call, after one that does not count: in it the ranks find each other again, for they do not
    all leave `quiet_barrier` at once.
    """
    if action is None:
        return 0.0
    action()
    begin = time.perf_counter()
    for _ in range(repeats):
        action()
    return (time.perf_counter() - begin) / repeats

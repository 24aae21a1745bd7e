"""Measuring in pairs: two actions in turn on the same ranks, so that a slower machine slows both alike."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from mpiml.bench.rows import Ratio
from mpiml.team import quiet_barrier

PAIRS = 9
Action = Callable[[], None]


def ratio(
    comm: MPI.Intracomm,
    over: Action | None,
    under: Action | None,
    repeats: int,
    factor: float = 1.0,
    pairs: int = PAIRS,
) -> Ratio:
    """`factor` times the time of `over`, on the slowest rank, over that of `under`: the rate of `under` over that of
    `over`.

    A rank that takes no part in an action has None in its place and sleeps. A first pair warms up and does not count.
    """
    ratios = []
    for pair in range(pairs + 1):
        spent = np.zeros(2)
        for index, action in ((0, over), (1, under)) if pair % 2 else ((1, under), (0, over)):
            quiet_barrier(comm)
            spent[index] = seconds(action, repeats)
            quiet_barrier(comm)
        comm.Allreduce(MPI.IN_PLACE, spent, MPI.MAX)
        if pair:
            ratios.append(factor * float(spent[0] / spent[1]))
    return Ratio.of(ratios)


def milliseconds(comm: MPI.Intracomm, action: Action, repeats: int) -> Ratio:
    """The time of `action` on the slowest rank, measured as often as a pair."""
    spent = []
    for _ in range(PAIRS + 1):
        quiet_barrier(comm)
        spent.append(1000 * seconds(action, repeats))
    slowest = np.array(spent[1:])
    comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    return Ratio.of(slowest.tolist())


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

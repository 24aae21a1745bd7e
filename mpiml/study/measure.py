"""Measuring in pairs: two things in turn, so that a drifting machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Ratio:
    """The time of one thing over that of another, pair by pair: median, and the range of the middle half."""

    median: float
    low: float
    high: float
    seconds: float
    other_seconds: float


def paired(mine: Callable[[], None], other: Callable[[], None], pairs: int, repeats: int) -> Ratio:
    """Time `mine` and `other` in turn.

    Args:
        pairs: how many ratios.
        repeats: calls that are timed together.
    """
    times: list[tuple[float, float]] = []
    for action in (mine, other):
        seconds(action, repeats)
    for pair in range(pairs):
        first, second = (mine, other) if pair % 2 == 0 else (other, mine)
        a, b = seconds(first, repeats), seconds(second, repeats)
        times.append((a, b) if pair % 2 == 0 else (b, a))
    return of_pairs(times)


def of_pairs(times: list[tuple[float, float]]) -> Ratio:
    """The ratio from pairs of seconds."""
    ratios = [a / b for a, b in times]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return Ratio(
        statistics.median(ratios),
        low,
        high,
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
    )


def seconds(action: Callable[[], None], repeats: int) -> float:
    """The mean time of a call."""
    begin = time.perf_counter()
    for _ in range(repeats):
        action()
    return (time.perf_counter() - begin) / repeats

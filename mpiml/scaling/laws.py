"""Scaling laws fitted to measured times, with intervals and a verdict on whether the data support them; no MPI."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mpiml.random import generator

Times = Mapping[int, Sequence[float]]  # seconds of a step, by number of ranks, one for each repeat
Array = NDArray[np.float64]
Place = TypeVar("Place", int, float)
RESAMPLES = 1000
LEVEL = 0.95
SCATTER = 0.2  # of the median: if repeats differ more, nearly any law would seem to fit


def rounded(value: float) -> str:
    """A number with three significant digits: 0.0346, 46,900."""
    return f"{float(f'{value:.3g}'):,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.3g}"


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval of confidence LEVEL; infinite if there are too few repeats for one."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        return Interval(factor * self.value, factor * self.low, factor * self.high)

    def text(self, shown: Callable[[float], str] = rounded) -> str:
        """The value with its interval, if there is one."""
        if self.low == self.high or math.isinf(self.low):
            return shown(self.value)
        high = f"to {shown(self.high)}" if math.isfinite(self.high) else "or more"
        return f"{shown(self.value)} ({shown(self.low)} {high})"


@dataclass(frozen=True)
class Fit:
    """A law: its parameters by name, the largest relative distance of its curve from the medians, and a verdict."""

    law: str
    parameters: dict[str, Interval]
    error: float
    verdict: str


def median_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The median and its interval from order statistics, which assumes nothing of the distribution.

    With fewer than 6 values it is the whole range, which covers less than 95 %.
    Conover, "Practical Nonparametric Statistics", 3rd ed., 1999, section 3.2.
    """
    ordered, n = sorted(values), len(values)
    if not n:
        raise ValueError("no values: a median needs at least one")
    below = 0  # how many of the smallest values, and of the largest, lie outside
    tail = (1 + n) / 2**n  # the probability of at most below + 1 heads among n tosses
    while below < (n - 1) // 2 and 1 - 2 * tail >= level:
        below += 1
        tail += math.comb(n, below + 1) / 2**n
    return Interval(statistics.median(ordered), ordered[below], ordered[n - 1 - below])


def speed_up(base: Sequence[float], times: Sequence[float]) -> Interval:
    """The median of `base` over the median of `times`, with an interval from resampled repeats."""
    return _resampled(lambda both: [statistics.median(both[0]) / statistics.median(both[1])], [base, times])[0]


def karp_flatt(ranks: int, speed_up: float) -> float:
    """The serial fraction that explains a speed-up on several ranks if nothing else slows it.

    Karp and Flatt, "Measuring parallel processor performance", CACM 33(5), 1990.
    """
    if ranks < 2:
        raise ValueError(f"the Karp-Flatt metric needs at least 2 ranks, got {ranks}")
    return (1 / speed_up - 1 / ranks) / (1 - 1 / ranks)


def amdahl(times: Times) -> Fit:
    """T(p) = T1 (s + (1 - s) / p) for a problem of constant size; s is the serial fraction.

    Amdahl, "Validity of the single processor approach", AFIPS 1967.
    """

    def solve(medians: Mapping[int, float]) -> list[float]:
        constant, shared = least_squares(medians, lambda p: [1.0, 1.0 / p])
        return [constant + shared, constant / (constant + shared)]

    return _fit("Amdahl", ["serial fraction"], times, solve, lambda p, one, serial: one * (serial + (1 - serial) / p))


def gustafson(times: Times) -> Fit:
    """T(p) = T1 / (1 - s (p - 1) / p) for a problem that grows with the ranks: scaled speed-up p - s (p - 1).

    Gustafson, "Reevaluating Amdahl's law", CACM 31(5), 1988.
    """

    def solve(medians: Mapping[int, float]) -> list[float]:
        more = [(p - 1, p - p * medians[1] / medians[p]) for p in medians if p > 1]
        return [medians[1], sum(a * b for a, b in more) / sum(a * a for a, _ in more)]

    return _fit("Gustafson", ["serial fraction"], times, solve, lambda p, one, serial: one * p / (p - serial * (p - 1)))


def universal(times: Times) -> Fit:
    """T(p) = T1 (1 + a (p - 1) + b p (p - 1)) / p: a is contention, b is coherence (that all agree with all).

    Gunther, "Guerrilla Capacity Planning", 2007: the universal scalability law.
    """

    def solve(medians: Mapping[int, float]) -> list[float]:
        one, contention, coherence = least_squares(medians, lambda p: [1 / p, (p - 1) / p, p - 1.0])
        return [one, contention / one, coherence / one] if one else [0.0, math.nan, math.nan]

    def predict(p: int, one: float, contention: float, coherence: float) -> float:
        return one * (1 + contention * (p - 1) + coherence * p * (p - 1)) / p

    return _fit("universal scalability", ["contention", "coherence"], times, solve, predict)


def least_squares(values: Mapping[Place, float], terms: Callable[[Place], list[float]]) -> list[float]:
    """Coefficients, none negative, of the terms whose sum is nearest to the values; distances are relative."""
    rows = np.array([[term / value for term in terms(place)] for place, value in values.items()])
    keep = list(range(rows.shape[1]))
    coefficients = np.zeros(rows.shape[1])
    while keep:
        solution: Array = np.linalg.lstsq(rows[:, keep], np.ones(len(rows)), rcond=None)[0]
        if (solution >= 0).all():
            coefficients[keep] = solution
            break
        keep.pop(int(np.argmin(solution)))  # leave out the term that would be negative
    return coefficients.tolist()


def _fit(
    law: str,
    names: list[str],
    times: Times,
    solve: Callable[[Mapping[int, float]], list[float]],
    predict: Callable[..., float],
) -> Fit:
    """A law fitted to times.

    Args:
        solve: from medians by number of ranks to the time on one rank and the law's parameters.
        predict: from a number of ranks and the result of `solve` to a time.
    """
    if 1 not in times or len(times) < len(names) + 1:
        needed = f"one rank and {len(names)} more numbers of ranks"
        return Fit(law, {}, math.nan, f"undecided: needs times on {needed}, with a core for each rank")
    sizes = sorted(times)

    def of(samples: Sequence[Sequence[float]]) -> list[float]:
        return solve({p: statistics.median(sample) for p, sample in zip(sizes, samples, strict=True)})

    columns = [times[p] for p in sizes]
    curve = _resampled(of, columns)
    parameters = dict(zip(names, curve[1:], strict=True))
    errors = [abs(predict(p, *(one.value for one in curve)) / statistics.median(times[p]) - 1) for p in sizes]
    spread = max((max(values) - min(values)) / statistics.median(values) / 2 for values in columns)
    return Fit(law, parameters, max(errors), _verdict(len(sizes), len(names), max(errors), spread))


def _verdict(points: int, parameters: int, error: float, spread: float) -> str:
    if points <= parameters + 1:
        return "undecided: with so few points the law fits any data; measure more numbers of ranks"
    if spread > SCATTER:
        return f"undecided: repeats of one point differ by up to {spread:.0%} to either side"
    if error <= max(spread, 0.01):
        return f"supported: within the spread of the repeats ({error:.0%} of {spread:.0%})"
    if error <= 0.10:
        return f"roughly supported: {error:.0%} off at worst, more than the repeats' spread of {spread:.0%}"
    return f"not supported: {error:.0%} off at worst; something that this law leaves out decides the time"


def _resampled(
    estimate: Callable[[Sequence[Sequence[float]]], list[float]], samples: Sequence[Sequence[float]]
) -> list[Interval]:
    """Estimates from samples, with the intervals of estimates from samples resampled with replacement.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993: percentile intervals.
    """
    values = estimate(samples)
    if min(len(sample) for sample in samples) < 2:
        return [Interval(value, -math.inf, math.inf) for value in values]
    random = generator(0, "resampling")
    arrays = [np.asarray(sample, float) for sample in samples]
    drawn = [estimate([random.choice(array, len(array)).tolist() for array in arrays]) for _ in range(RESAMPLES)]
    tail = (1 - LEVEL) / 2
    intervals = np.quantile(drawn, [tail, 1 - tail], axis=0).T.tolist()
    return [Interval(value, low, high) for value, (low, high) in zip(values, intervals, strict=True)]

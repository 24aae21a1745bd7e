"""Scaling laws and intervals against cases worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from mpiml.scaling.laws import (
    Fit,
    Times,
    amdahl,
    gustafson,
    karp_flatt,
    median_interval,
    speed_up,
    universal,
)

RANKS = (1, 2, 4, 8, 16)


def made(law: Callable[[int], float], noise: float = 0.0, repeats: int = 5, ranks: tuple[int, ...] = RANKS) -> Times:
    random = np.random.default_rng(1)
    return {p: [law(p) * (1 + noise * random.standard_normal()) for _ in range(repeats)] for p in ranks}


def value(fit: Fit, name: str) -> float:
    return fit.parameters[name].value


def test_median_interval_by_the_binomial_table() -> None:
    """n = 10: P(at most 1 head) = 11/1024, of both sides 0.021; with 2 it is 0.109: so the 2nd and 9th value."""
    interval = median_interval([10, 3, 1, 4, 2, 5, 9, 6, 8, 7])
    assert (interval.value, interval.low, interval.high) == (5.5, 2, 9)


def test_median_interval_of_few_values_is_their_range() -> None:
    for values in ([4.0], [4.0, 2.0], [1.0, 2.0, 9.0, 4.0, 5.0]):
        interval = median_interval(values)
        assert (interval.low, interval.high) == (min(values), max(values))
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])


def test_median_interval_covers_what_it_says() -> None:
    """The true median, 0, lies inside in 95 % of samples or more, and not in all: else the intervals are too wide."""
    random = np.random.default_rng(0)
    inside = [i.low <= 0 <= i.high for i in (median_interval(random.standard_cauchy(15).tolist()) for _ in range(2000))]
    assert 0.95 <= np.mean(inside) < 0.985


def test_karp_flatt_by_hand() -> None:
    assert karp_flatt(4, 2.0) == pytest.approx((0.5 - 0.25) / 0.75)
    assert karp_flatt(8, 8.0) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="got 1"):
        karp_flatt(1, 1.0)


def test_distance_is_from_the_fitted_curve() -> None:
    """The curve of 1, 0.8, 0.5 and 0.1 s does not begin at the time on one rank: T = a + b / p, by the normal
    equations of its residuals relative to the times, worked out with determinants."""
    times = {1: 1.0, 2: 0.8, 4: 0.5, 8: 0.1}
    u, v = ([term(p) / t for p, t in times.items()] for term in (lambda p: 1.0, lambda p: 1 / p))
    uu, uv, vv = (sum(x * y for x, y in zip(*pair, strict=True)) for pair in ((u, u), (u, v), (v, v)))
    a, b = ((vv * sum(u) - uv * sum(v)) / (uu * vv - uv**2), (uu * sum(v) - uv * sum(u)) / (uu * vv - uv**2))
    a, b = (a, b) if a > 0 else (0.0, sum(v) / vv)
    fit = amdahl({p: [t] * 2 for p, t in times.items()})
    assert fit.error == pytest.approx(max(abs((a + b / p) / t - 1) for p, t in times.items()))


def test_amdahl_finds_the_serial_fraction() -> None:
    fit = amdahl(made(lambda p: 3.0 * (0.1 + 0.9 / p)))
    assert value(fit, "serial fraction") == pytest.approx(0.1)
    assert fit.error == pytest.approx(0, abs=1e-9)
    assert fit.verdict.startswith("supported")


def test_gustafson_finds_the_serial_fraction() -> None:
    fit = gustafson(made(lambda p: 2.0 * p / (p - 0.2 * (p - 1))))
    assert value(fit, "serial fraction") == pytest.approx(0.2)
    assert fit.error == pytest.approx(0, abs=1e-9)


def test_the_universal_law_finds_both() -> None:
    fit = universal(made(lambda p: 5.0 * (1 + 0.05 * (p - 1) + 0.002 * p * (p - 1)) / p))
    assert value(fit, "contention") == pytest.approx(0.05)
    assert value(fit, "coherence") == pytest.approx(0.002)


def test_no_parameter_is_negative() -> None:
    """Times that fall faster than the ranks grow, as with caches, are no negative serial fraction."""
    for fit in (amdahl(made(lambda p: 1 / p**1.1)), universal(made(lambda p: 1 / p**1.1))):
        assert all(parameter.value >= 0 for parameter in fit.parameters.values())


@pytest.mark.parametrize("law", [amdahl, gustafson, universal])
def test_intervals_hold_the_truth_and_grow_with_noise(law: Callable[[Times], Fit]) -> None:
    truth = {
        amdahl: lambda p: 0.1 + 0.9 / p,
        gustafson: lambda p: p / (p - 0.1 * (p - 1)),
        universal: lambda p: (1 + 0.1 * (p - 1)) / p,
    }[law]
    quiet, loud = law(made(truth, 0.002)), law(made(truth, 0.03))
    name = next(iter(quiet.parameters))
    for fit in (quiet, loud):
        assert fit.parameters[name].low <= 0.1 <= fit.parameters[name].high
    widths = [fit.parameters[name].high - fit.parameters[name].low for fit in (quiet, loud)]
    assert 0 < 5 * widths[0] < widths[1]


def test_a_law_that_does_not_hold_is_not_supported() -> None:
    assert amdahl(made(lambda p: 1 / p if p < 8 else 0.5, 0.01)).verdict.startswith("not supported")


def test_nothing_is_said_of_times_that_scatter() -> None:
    times = {p: [1 / p, 1.5 / p, 0.7 / p] for p in RANKS}
    assert amdahl(times).verdict.startswith("undecided")


def test_too_few_points_are_told() -> None:
    assert amdahl(made(lambda p: 1 / p, ranks=(1,))).verdict.startswith("undecided: needs times on one rank and")
    assert amdahl(made(lambda p: 1 / p, ranks=(2, 4))).verdict.startswith("undecided: needs times on one rank and")
    assert "the law fits any data" in amdahl(made(lambda p: 1 / p, ranks=(1, 2))).verdict
    assert "the law fits any data" in universal(made(lambda p: 1 / p, ranks=(1, 2, 4))).verdict


def test_speed_up_has_an_interval() -> None:
    times = {1: [4.0, 4.2, 4.1], 4: [1.0, 1.1, 1.2]}
    up = speed_up(times[1], times[4])
    assert up.value == pytest.approx(4.1 / 1.1)
    assert 4.0 / 1.2 <= up.low < up.value < up.high <= 4.2 / 1.0
    assert math.isinf(speed_up([4.0], [1.0]).high)

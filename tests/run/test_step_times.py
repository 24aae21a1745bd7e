"""Step times: of short runs all, of long ones a fair sample of bounded size, the same steps on every rank."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from mpiml.run.step_times import KEPT, WARM_UP, StepTimes, median


def noted(seconds: Iterable[float]) -> StepTimes:
    times = StepTimes()
    for each in seconds:
        times.add(each)
    return times


@pytest.mark.parametrize("steps", [1, WARM_UP - 1, WARM_UP])
def test_a_short_run_has_no_others_than_the_first(steps: int) -> None:
    assert noted(range(steps)).sample().tolist() == list(range(steps))


@pytest.mark.parametrize("steps", [WARM_UP + 1, WARM_UP + 2, 500, WARM_UP + KEPT])
def test_all_but_the_first_are_kept(steps: int) -> None:
    assert noted(range(steps)).sample().tolist() == list(range(WARM_UP, steps))


def test_of_a_long_run_every_rank_keeps_the_same_fair_sample() -> None:
    steps = 6 * KEPT
    one, other = (noted(map(float, range(shift, shift + steps))).sample() for shift in (0, 5))
    np.testing.assert_array_equal(other - one, 5)
    assert len(one) == len(set(one.tolist())) == KEPT
    assert one.min() >= WARM_UP
    shares = np.histogram(one, 6, (0, steps))[0] / KEPT
    assert np.abs(shares - 1 / 6).max() < 0.015  # five deviations
    assert median(one) == pytest.approx(steps / 2, rel=0.04)


def test_median() -> None:
    random = np.random.default_rng(0)
    for count in (1, 2, 7, 10):
        seconds = random.random(count)
        assert median(seconds) == np.median(seconds)

"""Who is slow is found from all ranks' times, and only where it is a habit and matters."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.clock import SHARES
from mpiml.run.stragglers import Pace, Slow

STEPS = 20  # of a line


def line(compute: list[float], data: list[float] | None = None) -> np.ndarray:
    """All ranks' seconds of a line, from their milliseconds per step."""
    seconds = np.full((len(compute), len(SHARES)), 0.7)
    seconds[:, SHARES.index("compute")] = compute
    seconds[:, SHARES.index("data")] = data or [0.0] * len(compute)
    return seconds * STEPS / 1000


def after(pace: Pace, *lines: np.ndarray, step: float = 0.05, steps: int = STEPS) -> Slow | None:
    found = None
    for seconds in lines:
        found = pace.slowest(seconds, step * steps, steps)
    return found


def of(replicas: int, stages: int = 1) -> Pace:
    return Pace(stages, [2] * replicas, range(replicas * stages), False)


SLOW = line([20, 20, 41, 20])
EVEN = line([20, 20, 21, 20])


def test_rank_is_named_after_three_lines() -> None:
    pace = of(4)
    assert after(pace, SLOW, SLOW) is None
    assert after(pace, SLOW) == Slow(2, 2, "compute", pytest.approx(41 / 20), pytest.approx(0.021))
    assert after(pace, SLOW) is not None
    assert after(pace, EVEN) is None


def test_streak_of_another_rank_or_activity_begins_anew() -> None:
    assert after(of(4), SLOW, SLOW, EVEN, SLOW, SLOW) is None
    assert after(of(4), SLOW, SLOW, line([20, 41, 20, 20]), SLOW, SLOW) is None
    assert after(of(4), SLOW, SLOW, line([20] * 4, [1, 1, 30, 1]), SLOW) is None


def test_three_lines_of_a_step_each_are_no_habit() -> None:
    pace = of(4)
    assert after(pace, *[SLOW / STEPS] * 9, steps=1, step=0.3) is None
    assert after(pace, SLOW / STEPS, steps=1, step=0.3) is not None


def test_hiccup_of_less_than_two_seconds_is_no_habit() -> None:
    pace = of(4)
    assert after(pace, *[SLOW] * 4, step=0.024) is None  # half a second a line, nearly
    assert after(pace, SLOW, step=0.024) is not None
    assert after(pace, EVEN, *[SLOW] * 4, step=0.024) is None


def test_limit_is_one_and_a_half_times_the_median_of_the_others() -> None:
    assert after(of(4), *[line([20, 20, 29, 20])] * 5) is None
    assert after(of(2), *[line([20, 29])] * 5) is None
    found = after(of(2), *[line([20, 31])] * 5)
    assert found
    assert (found.rank, found.times) == (1, pytest.approx(31 / 20))
    assert after(of(1), *[line([20])] * 5) is None


def test_what_hardly_matters_is_left_alone() -> None:
    """Less than 2 ms of a step, or than a twentieth of it."""
    data = line([20] * 3, [0.1, 0.1, 2.0])
    assert after(of(3), *[data] * 5, step=0.03) is None
    data = line([20] * 3, [0.1, 0.1, 2.2])
    assert after(of(3), *[data] * 5, step=0.03) is not None
    assert after(of(3), *[data] * 5, step=0.05) is None


def test_data_that_others_have_at_once_has_a_rank_too() -> None:
    found = after(of(3), *[line([20] * 3, [0, 0, 9])] * 3)
    assert found
    assert (found.rank, found.activity) == (2, "data")
    assert found.times > 1000


def test_only_ranks_of_one_stage_are_compared() -> None:
    """The second stage computes twice as long; in the first one there is a slow rank."""
    assert after(of(2, 2), *[line([20, 21, 40, 41])] * 3) is None
    found = after(of(2, 2), *[line([20, 33, 40, 41])] * 3)
    assert found
    assert (found.place, found.rank) == (1, 1)


def test_unequal_shares_of_the_batch_are_no_slowness() -> None:
    """Three micro-batches for two replicas: the first has two."""
    assert after(Pace(1, [2, 1], [0, 1], False), *[line([40, 20])] * 3) is None
    found = after(Pace(1, [2, 1], [7, 3], False), *[line([40, 32])] * 3)
    assert found == Slow(1, 3, "compute", pytest.approx(32 / 20), pytest.approx(0.012))


def test_the_one_that_costs_the_most_is_named() -> None:
    found = after(of(4), *[line([20, 20, 41, 20], [1, 30, 1, 1])] * 3)
    assert found
    assert (found.rank, found.activity) == (1, "data")

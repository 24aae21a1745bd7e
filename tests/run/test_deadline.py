"""How much time is kept for what comes after the last step."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mpiml.run.deadline import Deadline
from mpiml.run.process import StopRequest


class Time:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: self.now + 1e9)

    def last_step(self, deadline: Deadline, step: float) -> float:
        """Seconds after the start at which steps of that length end."""
        began = self.now
        while not deadline.near():
            self.now += step
            assert self.now < began + 10_000
        return self.now - began


@pytest.fixture
def clock(monkeypatch: Any) -> Time:
    return Time(monkeypatch)


def test_without_a_limit_time_is_never_up(clock: Time) -> None:
    clock.now += 1e9
    assert not Deadline().near()


def test_a_step_more_and_the_margin_are_kept(clock: Time) -> None:
    """Of 100 seconds 10 are the margin; after step 85 another of 5 would just fit."""
    assert clock.last_step(Deadline(100.0), 5.0) == pytest.approx(90, abs=5)
    assert clock.last_step(Deadline(6000.0), 5.0) == pytest.approx(6000 - 30 - 5, abs=5)


def test_the_start_is_no_step(clock: Time) -> None:
    """Of a limit of a minute, 28 seconds for reading the data leave 26 to train in."""
    limit = Deadline(60.0)
    clock.now += 28
    assert clock.last_step(limit, 1.0) == pytest.approx(60 - 28 - 6 - 1, abs=1)


def test_what_is_under_way_is_left_when_only_a_save_is_possible(clock: Time) -> None:
    limit = Deadline(600.0)
    limit.saved(40)
    limit.near()
    clock.now += 600 - 30 - 80 - 1
    assert not limit.up()
    assert limit.up(slack=2)
    clock.now += 2
    assert limit.up()
    assert not Deadline().up()


def test_an_evaluation_is_left_when_time_is_up(clock: Time) -> None:
    stop = StopRequest(Deadline(600.0))
    assert not stop.now()
    clock.now += 300
    assert not stop.at_once()
    clock.now += 271
    assert stop.at_once()
    assert stop.reason() == "time is nearly up"


def test_two_saves_are_kept_as_long_as_the_slowest_was(clock: Time) -> None:
    limit = Deadline(600.0)
    limit.saved(40)
    limit.saved(20)
    assert clock.last_step(limit, 1.0) == pytest.approx(600 - 30 - 80, abs=2)


def test_another_save_is_kept_if_one_may_be_in_flight(clock: Time) -> None:
    limit = Deadline(600.0)
    limit.expect_in_flight()
    limit.saved(40)
    assert clock.last_step(limit, 1.0) == pytest.approx(600 - 30 - 120, abs=2)


def test_a_save_that_is_not_over_counts_as_soon_as_it_is_slower_than_was_known(clock: Time) -> None:
    for before in (10, 100):
        limit = Deadline(600.0)
        limit.saved(before)
        limit.saving(60)
        assert clock.last_step(limit, 1.0) == pytest.approx(600 - 30 - 2 * max(before, 60), abs=2)
    for seconds in (10, 100):
        guessed = Deadline(600.0)
        guessed.expect(seconds * 50_000_000)
        guessed.saving(60)
        assert clock.last_step(guessed, 1.0) == pytest.approx(600 - 30 - 2 * max(seconds, 60), abs=2)


def test_a_save_that_has_not_been_timed_is_guessed_from_its_size(clock: Time) -> None:
    limit = Deadline(600.0)
    limit.expect(5_000_000_000)
    assert clock.last_step(limit, 1.0) == pytest.approx(600 - 30 - 200, abs=2)


def test_the_end_of_the_slurm_job_counts_if_it_is_sooner(clock: Time) -> None:
    end = {"SLURM_JOB_END_TIME": str(int(clock.now + 1e9) + 300)}
    assert clock.last_step(Deadline(60.0, end), 1.0) == pytest.approx(54, abs=2)
    assert clock.last_step(Deadline(600.0, end), 1.0) == pytest.approx(0.9 * (300 - 54), abs=3)

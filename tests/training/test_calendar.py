"""Where rounds of workers end, and what is due after which step."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mpiml.config import Config
from mpiml.training.calendar import Calendar, Due


def rounds(steps: int, **settings: Any) -> list[tuple[int, int]]:
    """The first and last step of each round."""
    calendar, ends, step = Calendar(Config(steps=steps, **settings)), [], 1
    while step <= steps:
        of = calendar.round_of(step)
        ends.append((of[0], of[-1]))
        step = of[-1] + 1
    return ends


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7)]),
        ({"average_every": 3}, [(1, 3), (4, 6), (7, 7)]),
        ({"average_every": 30}, [(1, 7)]),
        ({"average_every": 3, "average_from": 1}, [(1, 3), (4, 6), (7, 7)]),
        ({"average_every": 3, "average_from": 3}, [(1, 1), (2, 2), (3, 5), (6, 7)]),
        ({"average_every": 3, "average_from": 8}, [(n, n) for n in range(1, 8)]),
        ({"average_every": 3, "averaged_at": (5,)}, [(1, 3), (4, 5), (6, 6), (7, 7)]),
        ({"average_every": 4, "averaged_at": (2, 3)}, [(1, 2), (3, 3), (4, 4), (5, 7)]),
        ({"average_every": 4, "averaged_at": (4,)}, [(1, 4), (5, 7)]),
    ],
)
def test_rounds(settings: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    assert rounds(7, **settings) == expected


@pytest.mark.parametrize("seed", range(50))
def test_every_step_is_in_exactly_one_round_which_is_not_too_long(seed: int) -> None:
    """And is all of summed steps or all of steps apart; one that went before keeps its rounds if it is extended."""
    draw = random.Random(seed)
    steps, every, first = draw.randint(1, 60), draw.randint(1, 20), draw.randint(0, 70)
    ends = tuple(sorted(draw.sample(range(1, 80), draw.randint(0, 4))))
    settings = {"average_every": every, "average_from": first, "averaged_at": ends}
    calendar = Calendar(Config(steps=steps, **settings))
    for step in range(1, steps + 1):
        of = calendar.round_of(step)
        assert step in of
        assert all(calendar.round_of(other) == of for other in of)
        assert len(of) <= (every if step >= first else 1)
        assert {calendar.apart(other) for other in of} == {step >= first}
        assert not set(ends) & set(of[:-1])
    longer = Calendar(Config(steps=steps + 30, **settings | {"averaged_at": (*(e for e in ends if e < steps), steps)}))
    assert [calendar.round_of(step) for step in range(1, steps + 1)] == [
        longer.round_of(step) for step in range(1, steps + 1)
    ]


def due(**settings: Any) -> tuple[list[int], list[int], list[int]]:
    """The steps after which a run of 20 logs, saves and evaluates."""
    of = Calendar(Config(steps=20, **settings))
    dues = [of.due(step) for step in range(1, 21)]
    log, save, evaluation = ([n for n, one in enumerate(dues, 1) if one[kind]] for kind in range(3))
    return log, save, evaluation


def test_saving_and_evaluating_wait_for_the_end_of_a_round() -> None:
    log, save, evaluation = due(average_every=6, log_every=5, save_every=4, eval_every=7)
    assert log == [5, 10, 15, 20]
    assert save == [6, 12, 18, 20]  # each round, which is longer than 4 steps, passes one of 4, 8, 12, 16
    assert evaluation == [12, 18, 20]  # 7 is passed in the round to 12, 14 in that to 18


def test_what_is_due_seldom_is_due_after_few_rounds() -> None:
    log, save, evaluation = due(average_every=2, average_from=4, log_every=9, save_every=9, eval_every=0)
    assert log == [9, 18, 20]
    assert save == [9, 19, 20]  # rounds end after 5, 7, 9 and so on
    assert evaluation == []


def test_without_workers_everything_is_due_where_it_is_said() -> None:
    assert due(log_every=10, save_every=4, eval_every=6) == ([10, 20], [4, 8, 12, 16, 20], [6, 12, 18, 20])


def test_what_is_due_after_the_last_step_may_be_that_of_any_other() -> None:
    assert Calendar(Config(steps=7, log_every=5, save_every=5, eval_every=5)).due(7, last=False) == Due()

"""The accounts of workers in a round: their sum, and arrays of a checkpoint, of which hostile ones are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpiml.config import Config
from mpiml.errors import ConfigError, OutputError
from mpiml.training.accounts import ENDS, LINES, LOGGED, STEPS, WEIGHTS, check_left, summary
from mpiml.training.calendar import Calendar

CALENDAR = Calendar(Config(steps=8, average_every=4, workers=4))


def test_workers_without_rows_count_for_nothing() -> None:
    """Of loss, weight, rate, norm and one sum of the metric."""
    one, two, none = [6.0, 3.0, 0.1, 2.0, 1.0], [10.0, 2.0, 0.1, 4.0, 2.0], [0.0, 0.0, 0.1, 0.0, 0.0]
    of_all = summary(np.array([one, none, two]))
    assert of_all == (16.0, 5.0, [3.0], 0.1, 3.0, 2.0, 5.0)
    assert summary(np.array([none, none])) == (0.0, 0.0, [0.0], 0.1, 0.0, 0.0, 0.0)


def test_a_norm_that_was_not_computed_is_unknown() -> None:
    assert summary(np.array([[6.0, 3.0, 0.1, -1.0], [6.0, 3.0, 0.1, -1.0]])).norm is None


def arrays(**changes: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
    """Of 4 workers within steps 5 to 8, of which 6 is logged, with 3 columns of the metric."""
    good: dict[str, Any] = {
        STEPS: np.array([5, 6, 6, 7]),
        WEIGHTS: np.full(4, 16.0),
        LINES: np.zeros((4, 2, 7)),
        LOGGED: np.array([6]),
        ENDS: np.array([5, 8]),
    }
    good |= {f"round.{name}": array for name, array in changes.items()}
    return {name: array for name, array in good.items() if array is not None}


def test_good_arrays_are_taken() -> None:
    check_left(arrays(), 5, CALENDAR, 3, "c")
    check_left(arrays(logged=np.array([6, 8])), 5, CALENDAR, 3, "c")
    check_left(arrays(logged=np.empty(0, np.int64), lines=np.zeros((4, 1, 7))), 5, CALENDAR, 3, "c")


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": None},
        {"weights": None},
        {"lines": None},
        {"logged": None},
        {"steps": np.array([5.0, 6, 6, 4])},
        {"steps": np.array([5, 6, 6, 4], np.int32)},
        {"steps": np.array([[5, 6], [6, 4]])},
        {"steps": np.array([5, 6, 6, 3])},
        {"steps": np.array([5, 6, 6, 9])},
        {"steps": np.array([5, 6, 6, -(2**63)])},
        {"steps": np.empty(0, np.int64)},
        {"weights": np.zeros(3)},
        {"weights": np.zeros(4, np.float32)},
        {"weights": np.zeros(())},
        {"lines": np.zeros((4, 2, 6))},
        {"lines": np.zeros((4, 3, 7))},
        {"lines": np.zeros((4, 14))},
        {"lines": np.zeros((4, 2, 7), np.complex128)},
        {"logged": np.array([[6]])},
        {"logged": np.array(6)},
        {"logged": np.array([6.0])},
        {"logged": np.array([4])},
        {"logged": np.array([9]), "lines": np.zeros((4, 2, 7))},
        {"logged": np.array([True])},
        {"ends": None},
        {"ends": np.array([5, 7]), "lines": np.zeros((4, 2, 7))},
        {"ends": np.array([4, 8])},
        {"ends": np.array([5])},
        {"ends": np.array([5.0, 8.0])},
        {"ends": np.array(5)},
        {"logged": np.array([np.nan])},
    ],
)
def test_hostile_arrays_are_one_line_that_names_the_checkpoint(changes: dict[str, Any]) -> None:
    with pytest.raises(OutputError, match=r"^c[: ]") as error:
        check_left(arrays(**changes), 5, CALENDAR, 3, "c")
    assert any(text in str(error.value) for text in ["another round", *(f"round.{name}" for name in changes)])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_another_number_of_workers_is_refused_with_what_would_work() -> None:
    with pytest.raises(ConfigError, match=r"^--workers 2: c was saved within a round of 4 workers, .* --workers 4"):
        check_left(arrays(), 5, Calendar(Config(steps=8, average_every=4, workers=2)), 3, "c")


LINE = np.zeros((4, 1, 7))


@pytest.mark.parametrize("steps", [4, 5, 7])
def test_a_round_that_was_left_cannot_become_shorter(steps: int) -> None:
    shorter = Calendar(CALENDAR.config.replace(steps=steps))
    text = f"^--steps {steps}: c was saved within the round of steps 5 to 8, .* at least 8 would work"
    with pytest.raises(ConfigError, match=text):
        check_left(arrays(), 5, shorter, 3, "c")


@pytest.mark.parametrize(
    ("step", "changes", "text"),
    [
        (4, {}, "steps 4 to 4"),
        (9, {}, "steps 9 to 12"),
        (4, {"ends": np.array([4, 4]), "steps": np.full(4, 4), "logged": np.array([4]), "lines": LINE}, "steps 4 to 4"),
    ],
)
def test_a_round_of_other_steps_is_refused(step: int, changes: dict[str, Any], text: str) -> None:
    """Also of steps whose gradients are summed."""
    later = Calendar(CALENDAR.config.replace(steps=12, average_from=5))
    with pytest.raises(OutputError, match=f"^c was saved within another round than {text}"):
        check_left(arrays(**changes), step, later, 3, "c")


def test_workers_that_a_run_does_not_have_are_refused() -> None:
    with pytest.raises(OutputError, match=r"round\.steps is int64"):
        check_left(arrays(), 5, Calendar(Config(steps=8)), 3, "c")

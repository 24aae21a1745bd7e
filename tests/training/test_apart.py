"""A run in which gradients are summed at first and workers learn apart later, on one rank and on several."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import open_dataset
from mpiml.errors import ConfigError, OutputError, freed
from mpiml.nn.parameters import Parameter
from mpiml.training import accounts
from mpiml.training.calendar import Calendar
from mpiml.training.run import unsaved

WORLD = MPI.COMM_WORLD


@pytest.mark.mpi
def test_bytes_sent_go_on_when_workers_begin_to_learn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIML_NODES", ",".join("1" * WORLD.size))
    settings = Config(average_every=2, average_from=3, workers=WORLD.size, steps=8, log_every=1, eval_every=0)
    run = unsaved(WORLD, settings, open_dataset("digits"))
    with freed(run, WORLD.size), run.data.ahead:
        sent = [done.sent for step in (1, 2, 3, 5, 7) for done in run.advance(step).steps]
    assert sent == sorted(sent)
    assert WORLD.size == 1 or 0 < sent[0] < sent[1] < sent[3] < sent[5] < sent[7]
    assert sent[1] == sent[2]  # nothing within a round


def test_first_values_are_not_drawn_again_when_workers_begin_to_learn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch module's are those that it has, which are other ones by then."""
    drawn, draw = [], Parameter._draw

    def count(parameter: Parameter, *how: Any) -> int:
        drawn.append(parameter.name)
        return draw(parameter, *how)

    monkeypatch.setattr(Parameter, "_draw", count)
    run = unsaved(MPI.COMM_SELF, Config(average_every=2, average_from=2, workers=2, steps=3), open_dataset("digits"))
    before = len(drawn)
    with freed(run, 1), run.data.ahead:
        assert [len(run.advance(step).steps) for step in (1, 2)] == [1, 2]
    assert len(drawn) == before > 0


CALENDAR = Calendar(Config(average_every=40, average_from=5, workers=2, steps=80))


def left(**others: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a checkpoint within the round of steps 5 to 44, whose line of step 20 is logged."""
    arrays = {"steps": np.array([8, 7]), "weights": np.ones(2), "logged": np.array([20]), "ends": np.array([5, 44])}
    return {f"round.{name}": array for name, array in ({**arrays, "lines": np.zeros((2, 2, 6))} | others).items()}


def test_a_round_that_was_left_goes_on() -> None:
    accounts.check_left(left(), 7, CALENDAR, 2, "the file")


@pytest.mark.parametrize("steps", [6, 7, 43])
def test_a_round_that_was_left_cannot_become_shorter(steps: int) -> None:
    shorter = Calendar(CALENDAR.config.replace(steps=steps))
    text = f"--steps {steps}: the file was saved within the round of steps 5 to 44, .* at least 44 would work"
    with pytest.raises(ConfigError, match=text):
        accounts.check_left(left(), 7, shorter, 2, "the file")


@pytest.mark.parametrize(
    ("step", "others", "text"),
    [
        (7, {"logged": np.array(20)}, "round.logged is int64"),
        (7, {"logged": np.array([[20]])}, "round.logged is int64"),
        (7, {"logged": np.array([np.nan])}, "round.logged is float64"),
        (7, {"steps": np.array([], np.int64)}, "round.steps is int64"),
        (7, {"ends": np.array(5)}, "round.ends is int64"),
        (7, {"lines": np.zeros((2, 1, 6))}, "round.lines is float64"),
        (7, {"steps": np.array([8, 45])}, "another round than steps 5 to 44"),
        (4, {}, "another round than steps 4 to 4"),
        (46, {}, "another round than steps 45 to 80"),
        (4, {"ends": np.array([4, 4]), "steps": np.array([4, 4]), "logged": np.array([3])}, "another round than"),
    ],
)
def test_other_arrays_are_refused(step: int, others: dict[str, Any], text: str) -> None:
    with pytest.raises(OutputError, match=text):
        accounts.check_left(left(**others), step, CALENDAR, 2, "the file")


def test_workers_that_a_run_does_not_have_are_refused() -> None:
    with pytest.raises(OutputError, match=r"round\.steps is int64"):
        accounts.check_left(left(), 7, Calendar(Config(steps=80)), 2, "the file")


class OneAsks:
    """A request to stop that only rank 1 has got, after a few steps."""

    def __init__(self) -> None:
        self.steps = 0

    def now(self) -> bool:
        return False

    def within(self, rest: float, step: float, copies: int) -> bool:
        self.steps += 1
        time.sleep(0.002)
        return WORLD.rank == 1 and self.steps > 3


@pytest.mark.mpi
@pytest.mark.skipif(WORLD.size % 4 > 0, reason="needs two workers of two ranks")
def test_all_leave_a_round_if_a_neighbour_of_rank_0_asks() -> None:
    settings = Config(average_every=400, workers=2, microbatches=WORLD.size, steps=400, hidden=(4,), eval_every=0)
    run = unsaved(WORLD, settings, open_dataset("digits"))
    with freed(run, WORLD.size), run.data.ahead:
        left = run.advance(1, OneAsks()).left
    assert left
    assert left.progress[0].done < 200

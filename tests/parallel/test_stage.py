"""Messages between stages: as long as they must be, or refused on the rank that gets them; long ones in parts."""

from __future__ import annotations

import dataclasses
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.parallel import slices
from mpiml.parallel.schedules import Action, Schedule, one_f_one_b, zb_h1
from mpiml.parallel.stage import Computation, Stage, TrainingStage

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD


class Rows:
    """Three rows of four numbers."""

    index, rows = 0, 3

    def x(self) -> Any:
        return np.arange(12, dtype=np.float32).reshape(3, 4)

    def y(self) -> Any:
        return np.zeros(3, int)

    def w(self) -> None:
        return None


COMPUTATION = Computation(
    forward=lambda x, at: (x, lambda dy, grads: None),
    at=lambda *place: None,
    objective=lambda y, labels, weights, measured, at: ([float(y.sum()), 3.0], y),
    x_shape=(4,),
    y_shape=(4,),
    dtype=np.float32,
    learns=False,
    learned=False,
)


@pytest.mark.parametrize("columns", [4, 2, 0])
def test_a_message_that_is_too_short_is_refused(columns: int) -> None:
    """Its array would be memory that nobody has written to."""
    if WORLD.size < 2:
        return
    pair = WORLD.Split(WORLD.rank // 2, WORLD.rank)
    if pair.size == 2:
        shorter = lambda x, at: (x[:, :columns] if pair.rank == 0 else x, lambda dy, grads: None)  # noqa: E731
        computation = dataclasses.replace(COMPUTATION, forward=shorter)
        record = np.zeros((1, 2))
        if pair.rank == 1 and columns < 4:
            with pytest.raises(ValueError, match=rf"stage 0 sent {3 * columns} values, but 12 are needed"):
                Stage(pair, computation, Clock()).evaluate([(Rows(), record[0])])
        else:
            Stage(pair, computation, Clock()).evaluate([(Rows(), record[0])])
            assert record.tolist() == [[66.0, 3.0] if pair.rank == 1 else [0.0, 0.0]]
    pair.Free()


class Short(MPI.Intracomm):
    """A communicator of a library that takes no long messages."""

    def Isend(self, buf: Any, *place: int) -> MPI.Request:
        assert len(buf) <= slices.MESSAGE
        return super().Isend(buf, *place)


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_a_long_message_goes_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of MPI 3 count the elements of a message in C's int."""
    if WORLD.size < 2:
        return
    monkeypatch.setattr(slices, "MESSAGE", 4)
    pair = WORLD.Split(WORLD.rank // 2, WORLD.rank)
    if pair.size == 2:
        stage = Stage(Short(pair), COMPUTATION, Clock())
        if pair.rank == 0:
            stage._send(1, Rows().x()[:rows], Rows())
            stage._finish_sends()
        else:
            np.testing.assert_array_equal(stage._receive(0, (rows, 4)), Rows().x()[:rows])
    pair.Free()


class Slots:
    """A gradient sum with a slot for each micro-batch; it notes what each slot holds when that is added up."""

    def __init__(self) -> None:
        self.slots, self.plan, self.added = list(np.full((3, 1), 9.0)), SimpleNamespace(slots=[0, 1, 2]), []

    def accumulate(self, index: int) -> None:
        self.added.append(float(self.slots[index][0]))


class Parts:
    """Gradients that are written into `slot` in the second part of a backward pass."""

    def __init__(self, slot: Any):
        self.slot = slot

    def begin(self) -> None:
        self.slot.fill(0)

    def write(self) -> None:
        self.slot.fill(5)


@pytest.mark.parametrize(("deferred", "written"), [(lambda parts: parts, 5.0), (None, 0.0)])
def test_slots_are_written_in_the_second_part_of_a_backward_pass(deferred: Any, written: float) -> None:
    """A stage that cannot split its backward passes does whole ones instead."""
    sum_: Any = Slots()
    before: list[float] = []

    def schedule(*place: int) -> Any:
        yield from (Action("F", 0), Action("I", 0))
        before.append(float(sum_.slots[0][0]))
        yield Action("W", 0)

    parts = [Parts(slot) for slot in sum_.slots]
    computation = dataclasses.replace(COMPUTATION, learns=True, gradients=parts, deferred=deferred)
    TrainingStage(MPI.COMM_SELF, computation, sum_, schedule, Clock()).train(1, [Rows()], np.zeros((1, 2)), False)
    assert before == [9.0 if deferred else 0.0]
    assert sum_.added == [written]


@pytest.mark.parametrize("schedule", [one_f_one_b, zb_h1])
def test_a_stage_that_learns_nothing_keeps_nothing_either(schedule: Schedule) -> None:
    """After a micro-batch's turn for a backward pass: not even where there is none."""
    kept = weakref.WeakSet[Any]()
    most = []

    def forward(x: Any, at: Any) -> tuple[Any, Any]:
        def backward(dy: Any, grads: Any) -> None: ...

        kept.add(backward)
        most.append(len(kept))
        return x, backward

    sum_: Any = Slots()
    computation = dataclasses.replace(COMPUTATION, forward=forward)
    stage = TrainingStage(MPI.COMM_SELF, computation, sum_, schedule, Clock())
    stage.train(1, [Rows()] * 3, np.zeros((3, 2)), False)
    assert max(most) == 2  # the newest, and the one before until the newest has its name

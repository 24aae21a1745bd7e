"""A stage: runs a schedule's actions on its layers and exchanges messages with its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from mpiml.clock import Clock
from mpiml.parallel.gradient_sum import GradientSum
from mpiml.parallel.schedules import Schedule
from mpiml.team import until, wait

Array = NDArray[np.floating]
Backward = Callable[[Array, Any], Array | None]
Objective = Callable[[Array, NDArray[np.generic], bool], tuple[list[float], Array]]


class Batch(Protocol):
    """Rows that pass a stage at once (mpiml.data.dataset.Batch)."""

    index: int
    rows: int

    def x(self) -> Array: ...

    def y(self) -> NDArray[np.generic]: ...


@dataclass
class Part:
    """What a stage computes; it is all that a stage knows of a model.

    Attributes:
        forward: (x, at) -> (y, backward), where backward gives the gradient by x if that is `learned`.
        at: (training, step, micro-batch) -> what forward takes as `at`.
        objective: (y, labels, measured) -> (the micro-batch's row of sums for the step record, without the metric's
            unless it is to be measured; gradient by y).
        x_shape, y_shape: of a row that comes in and of one that goes out.
        learns: whether this stage has parameters, or one before it: whether it needs a gradient.
        learned: whether a stage before it has parameters, and so needs a gradient from this one.
        gradients: what backward writes into, by micro-batch of this replica; empty where nothing is trained.
    """

    forward: Callable[[Array, Any], tuple[Array, Backward]]
    at: Callable[[bool, int, int], Any]
    objective: Objective
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    dtype: DTypeLike
    learns: bool
    learned: bool
    gradients: Sequence[Any] = ()


class Stage:
    """One rank's stage of the pipeline of its replica.

    Args:
        comm: the stages of this replica; rank is the stage.
        part: what it computes.
        clock: is told what the stage does.
    """

    def __init__(self, comm: MPI.Intracomm, part: Part, clock: Clock):
        self.comm, self.part, self.clock = comm, part, clock
        self.stage, self.stages = comm.rank, comm.size
        self.first, self.last = self.stage == 0, self.stage == self.stages - 1
        self._sent: list[MPI.Request] = []

    def evaluate(self, batches: Iterable[tuple[Batch, NDArray[np.float64]]]) -> None:
        """Forward passes alone, each batch with the row for its sums, which the last stage fills in."""
        for batch, row in batches:
            y, _ = self.part.forward(self._input(batch), self.part.at(False, 0, batch.index))
            self._output(batch, y, row, measured=True)
        self._finish_sends()

    def _input(self, batch: Batch) -> Array:
        if self.first:
            self.clock("data")
            x = batch.x()
            self.clock("compute")
        else:
            x = self._receive(self.stage - 1, (batch.rows, *self.part.x_shape))
        self.clock.mark("forward", batch.index)
        return x

    def _output(self, batch: Batch, y: Array, row: NDArray[np.float64], measured: bool) -> Array | None:
        """Pass y on, or score it: then its sums go into `row`, and the gradient by y is returned."""
        if not self.last:
            self._send(self.stage + 1, y, batch)
            return None
        self.clock("data")
        labels = batch.y()
        self.clock("compute")
        self.clock.mark("loss", batch.index)
        sums, dy = self.part.objective(y, labels, measured)
        row[: len(sums)] = sums
        return dy

    def _receive(self, source: int, shape: tuple[int, ...]) -> Array:
        """A message into a fresh array: backward passes still read the arrays of earlier messages."""
        self.clock("waiting")
        array, status = np.empty(shape, self.part.dtype), MPI.Status()
        request = self.comm.Irecv(array, source)
        until(lambda: request.Test(status))
        self.clock("compute")
        count = status.Get_count(MPI.Datatype.fromcode(array.dtype.char))
        if count != array.size:
            raise ValueError(f"stage {source} sent {count} values, but {array.size} are needed, of shape {shape}")
        return array

    def _send(self, target: int, array: Array, batch: Batch) -> None:
        """Never blocks. The request keeps the array alive, so finished ones are dropped at every send."""
        self.clock.mark("send", batch.index)
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self.comm.Isend(np.ascontiguousarray(array), target))

    def _finish_sends(self) -> None:
        self.clock("waiting")
        wait(self._sent)
        self._sent = []
        self.clock("compute")


class TrainingStage(Stage):
    """A stage that also learns.

    Args:
        sum_: the gradient sum that the backward passes feed.
        schedule: of training.
    """

    def __init__(self, comm: MPI.Intracomm, part: Part, sum_: GradientSum, schedule: Schedule, clock: Clock):
        super().__init__(comm, part, clock)
        self.sum, self.schedule = sum_, schedule

    def train(self, step: int, batches: Sequence[Batch], record: NDArray[np.float64], measured: bool) -> None:
        """Forward and backward of this replica's micro-batches of a step.

        Gradients go into the gradient sum's slots; on the last stage the sums of micro-batch m go into record[m],
        those of the metric only if it is to be measured.
        """
        in_flight: dict[int, tuple[Backward, Array | None]] = {}
        for kind, index in self.schedule(self.stages, self.stage, len(batches)):
            batch = batches[index]
            if kind == "F" and batch.rows:
                y, backward = self.part.forward(self._input(batch), self.part.at(True, step, batch.index))
                in_flight[index] = backward, self._output(batch, y, record[batch.index], measured)
            elif kind == "B":
                self._backward(batch, index, *in_flight.pop(index, (None, None)))
        self._finish_sends()

    def _backward(self, batch: Batch, index: int, backward: Backward | None, dy: Array | None) -> None:
        if self.part.learns:
            gradients = self.part.gradients[index]
            if backward is None:
                self.sum.slots[self.sum.plan.slots[index]].fill(0)
            else:
                if dy is None:
                    dy = self._receive(self.stage + 1, (batch.rows, *self.part.y_shape))
                self.clock.mark("backward", batch.index)
                gradients.begin()
                dx = backward(dy, gradients)
                if self.part.learned:
                    assert dx is not None, "a part that is learned gives a gradient"
                    self._send(self.stage - 1, dx, batch)
        self.clock.mark("accumulate", batch.index)
        self.sum.accumulate(index)

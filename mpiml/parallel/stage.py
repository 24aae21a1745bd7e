"""A stage: does the passes of a schedule with its layers, and exchanges messages with its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike, NDArray

from mpiml.clock import Clock
from mpiml.parallel import slices
from mpiml.parallel.gradient_sum import GradientSum
from mpiml.parallel.schedules import Schedule, merged
from mpiml.team import until, wait
from mpiml.vectors import Vector

Array = NDArray[np.floating]
Backward = Callable[[Array, Any], Array | None]
Objective = Callable[[Array, NDArray[np.generic], Array | None, bool, Any], tuple[list[float], Array]]


class Batch(Protocol):
    """A micro-batch, or a chunk of an evaluation, as a stage uses it (mpiml.data.batch.Batch)."""

    index: int
    rows: int

    def x(self) -> Array: ...

    def y(self) -> NDArray[np.generic]: ...

    def w(self) -> Array | None: ...


def _parts(array: Array) -> list[Array]:
    """An array's elements, cut so that each part fits into a message."""
    elements = array.reshape(-1)
    if len(elements) <= slices.MESSAGE:
        return [elements]
    return [elements[start:stop] for start, stop in slices.cut([(0, len(elements))])]


@dataclass
class Computation:
    """The computation of a stage: all that a Stage knows of a model.

    Attributes:
        forward: (x, at) -> (y, backward); backward returns the gradient with respect to x if `learned`.
        at: (training, step, micro-batch) -> the argument `at` of forward and objective.
        objective: (y, labels, weights of the rows or None, measured, at) -> (the micro-batch's row of sums for the step
            record, with those of the metric if `measured`; the gradient with respect to y).
        x_shape, y_shape: of one row of input and of output.
        learns: whether this stage or one before it has values to update: then it needs a gradient.
        learned: whether a stage before it has some: then it passes a gradient back.
        gradients: for each micro-batch of this replica, where backward writes; empty where nothing is trained.
        array: of outputs or gradients of a device, on the host.
        deferred: makes, of a micro-batch's gradients, those of a backward pass in two parts, which `write` completes;
            None if this stage does whole backward passes whatever the schedule.
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
    deferred: Callable[[Any], Any] | None = None
    array: Callable[[Any], Array] = np.asarray


class Stage:
    """One rank's stage of the pipeline of its replica.

    Args:
        comm: the stages of this replica; rank is the stage.
        computation: of this stage.
        clock: of this rank; the stage tells it what it is doing.
    """

    def __init__(self, comm: MPI.Intracomm, computation: Computation, clock: Clock):
        self.comm, self.computation, self.clock = comm, computation, clock
        self.stage, self.stages = comm.rank, comm.size
        self.first, self.last = self.stage == 0, self.stage == self.stages - 1
        self._sent: list[MPI.Request] = []

    def evaluate(self, batches: Iterable[tuple[Batch, NDArray[np.float64]]]) -> None:
        """Forward passes only: of batches, each with the row into which the last stage writes the batch's sums."""
        for batch, row in batches:
            at = self.computation.at(False, 0, batch.index)
            y, _ = self.computation.forward(self._input(batch), at)
            self._output(batch, y, row, True, at)
        self._finish_sends()

    def _input(self, batch: Batch) -> Array:
        if self.first:
            self.clock("data")
            x = batch.x()
            self.clock("compute")
        else:
            x = self._receive(self.stage - 1, (batch.rows, *self.computation.x_shape))
        self.clock.mark("forward", batch.index)
        return x

    def _output(self, batch: Batch, y: Array, row: NDArray[np.float64], measured: bool, at: Any) -> Array | None:
        """Send y to the next stage. The last stage scores it instead: it writes the sums into `row` and returns the
        gradient with respect to y."""
        if not self.last:
            self._send(self.stage + 1, y, batch)
            return None
        self.clock("data")
        labels, weights = batch.y(), batch.w()
        self.clock("compute")
        self.clock.mark("loss", batch.index)
        sums, dy = self.computation.objective(y, labels, weights, measured, at)
        row[: len(sums)] = sums
        return dy

    def _receive(self, source: int, shape: tuple[int, ...]) -> Array:
        """Receive into a fresh array, because backward passes still read the arrays of earlier messages. Raises
        ValueError if the message has another size."""
        self.clock("waiting")
        array, status, count = np.empty(shape, self.computation.dtype), MPI.Status(), 0
        for part in _parts(array):
            request = self.comm.Irecv(part, source)
            until(lambda request=request: request.Test(status))  # type: ignore[misc]
            count += status.Get_count(MPI.Datatype.fromcode(array.dtype.char))
        self.clock("compute")
        if count != array.size:
            raise ValueError(f"stage {source} sent {count} values, but {array.size} are needed, of shape {shape}")
        return array

    def _send(self, target: int, array: Array, batch: Batch) -> None:
        """Send without blocking. A request keeps its array alive, so each send drops the requests that are complete."""
        self.clock.mark("send", batch.index)
        self._sent = [request for request in self._sent if not request.Test()]
        there = np.ascontiguousarray(self.computation.array(array))
        self._sent += [self.comm.Isend(part, target) for part in _parts(there)]

    def _finish_sends(self) -> None:
        if self._sent:
            self.clock("waiting")
            wait(self._sent)
            self._sent = []
            self.clock("compute")


class TrainingStage(Stage):
    """A stage that also learns: its passes follow a schedule, and write the gradients that `sum_` adds up.

    Steps that are measured give `observe` the gradient of each micro-batch that has rows.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        computation: Computation,
        sum_: GradientSum,
        schedule: Schedule,
        clock: Clock,
        observe: Callable[[Vector], None] | None = None,
    ):
        super().__init__(comm, computation, clock)
        self.sum, self.observe = sum_, observe
        self.schedule = schedule if computation.deferred else merged(schedule)

    def train(self, step: int, batches: Sequence[Batch], record: NDArray[np.float64], measured: bool) -> None:
        """Forward and backward passes of this replica's micro-batches of a step.

        Gradients go into the slots of the gradient sum. The last stage writes the sums of each micro-batch into its row
        of `record`, with those of the metric if `measured`.
        """
        in_flight: dict[int, tuple[Backward, Array | None]] = {}
        unwritten: dict[int, Any] = {}
        for kind, index in self.schedule(self.stages, self.stage, len(batches)):
            batch = batches[index]
            if kind == "F" and batch.rows:
                at = self.computation.at(True, step, batch.index)
                y, backward = self.computation.forward(self._input(batch), at)
                in_flight[index] = backward, self._output(batch, y, record[index], measured, at)
            elif kind == "I" and batch.rows and self.computation.learns:
                assert self.computation.deferred, "its schedule has whole backward passes"
                unwritten[index] = self.computation.deferred(self.computation.gradients[index])
                self._backward(batch, unwritten[index], *in_flight.pop(index))
            elif kind in ("B", "W"):
                self._write(batch, index, unwritten.pop(index, None), *in_flight.pop(index, (None, None)))
                if measured and self.observe and batch.rows and self.computation.learns:
                    # What the sum has added up by now has changed other slots, not that of the newest gradient.
                    self.observe(self.sum.gradients[self.sum.plan.slots[index]])
                self.clock.mark("accumulate", batch.index)
                self.sum.accumulate(index)
        self._finish_sends()

    def _write(self, batch: Batch, index: int, unwritten: Any, backward: Backward | None, dy: Array | None) -> None:
        """Write a micro-batch's gradients, if there are any, into its slot: what is `unwritten`, or those of a whole
        backward pass."""
        if not self.computation.learns:
            return
        if unwritten is not None:
            self.clock.mark("weights", batch.index)
            unwritten.write()
        elif backward is not None:
            self.computation.gradients[index].begin()
            self._backward(batch, self.computation.gradients[index], backward, dy)
        else:
            self.sum.gradients[self.sum.plan.slots[index]][...] = 0

    def _backward(self, batch: Batch, gradients: Any, backward: Backward, dy: Array | None) -> None:
        if dy is None:
            dy = self._receive(self.stage + 1, (batch.rows, *self.computation.y_shape))
        self.clock.mark("backward", batch.index)
        dx = backward(dy, gradients)
        if self.computation.learned:
            assert dx is not None, "no gradient for the stages before, which learn"
            self._send(self.stage - 1, dx, batch)

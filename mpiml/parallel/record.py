"""The step record: sums and requests that all ranks agree on before any of them updates, so that all decide alike."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.parallel import exact
from mpiml.parallel.exact import DIGITS, Digits
from mpiml.parallel.grid import Grid
from mpiml.parallel.memory import SharedMemory
from mpiml.partition import part
from mpiml.team import wait
from mpiml.vectors import ALIGNMENT

# (entries, columns): of each micro-batch of a rank, or chunk of an evaluation, its loss, its weight, and other sums.
Rows = NDArray[np.float64]
LARGE = 2.0**990  # so many of these do not occur that their sum would be beyond float64


@dataclass
class Record:
    """Sums over all rows of a step or an evaluation, and requests of any rank.

    Attributes:
        loss: sum of weight x row loss.
        weight: sum of weights.
        metric: the metric's sums; empty if it was not measured.
        broken: whether any rank's values were not finite after the update before this step.
        stop: whether any rank was asked to stop.
        bad_entry: if the loss is not finite, the first micro-batch, or chunk of an evaluation, of which it is not, or
            is that large.
    """

    loss: float
    weight: float
    metric: list[float]
    broken: bool = False
    stop: bool = False
    bad_entry: int | None = None

    @property
    def mean_loss(self) -> float:
        """The loss per weight; 0 for a step in which no row counts."""
        return self.loss / (self.weight or 1.0)


class Agreement:
    """Agrees on the step record like `agree` below, but through memory that the ranks of a node share: much faster.

    The ranks of a node meet at one barrier. Before it releases them, the first rank adds up what all have written,
    together with the first ranks of the other nodes if there are any. As ranks come to the barrier when their backward
    passes are done, a rank that has the record may also read the gradients of the others on its node.

    Each rank writes its rows, or what is less of many micro-batches: the digits of their sums.

    Args:
        grid: all ranks.
        memory: of all ranks of this node.
        microbatches: of a step, over all ranks.
        columns: the most that a step's rows have.
        leaf: micro-batches that replicas have at least, and whole runs of.
    """

    def __init__(self, grid: Grid, memory: SharedMemory, microbatches: int, columns: int, leaf: int = 1):
        self.comm, self.memory, self.leaders, ranks = grid.comm, memory, grid.leaders, memory.ranks
        self._first, _ = part(grid.replica, grid.replicas, microbatches, leaf)
        self._most = _numbers_a_column(grid.replicas, microbatches, leaf)
        self._flags = memory.common(ranks * 2, np.float64).reshape(ranks, 2)
        self._own_flags = self._flags[memory.rank]
        self._written = memory.common(ranks * self._most * columns, np.float64)
        self._result = memory.common(2 + columns, np.float64)

    @staticmethod
    def bytes_needed(ranks: int, replicas: int, microbatches: int, columns: int, leaf: int = 1) -> int:
        """The bytes that an Agreement allocates of the memory of a node's `ranks`, by `common`."""
        numbers = _numbers_a_column(replicas, microbatches, leaf)
        return 8 * (ranks * (2 + numbers * columns) + 2 + columns) + 3 * ALIGNMENT

    def __call__(self, rows: Rows, broken: bool = False, stop: bool = False) -> Record:
        """As `agree`, for a step."""
        memory, columns, flags = self.memory, rows.shape[1], self._own_flags
        flags[0], flags[1] = broken, stop
        size = memory.ranks * self._most * columns
        written: NDArray[Any] = self._written[:size].reshape(memory.ranks, self._most, columns)
        if self._most == DIGITS:
            _as_digits(written)[memory.rank] = exact.digits(rows)
        else:
            written[memory.rank, : len(rows)] = rows
            if len(rows) < self._most:
                written[memory.rank, len(rows) :] = 0
        memory.barrier(lambda: self._combine(written))
        return _record(self.comm, self._result[: 2 + columns].tolist(), lambda: _first_bad(rows, self._first))

    def _combine(self, written: NDArray[np.float64]) -> None:
        """Write the record into the result that all ranks of the node read; on its first rank."""
        broken, stop = map(max, zip(*self._flags.tolist(), strict=True))
        rows = written.reshape(-1, written.shape[2])
        if self.leaders is not None:
            total = _as_digits(written).sum(axis=0) if self._most == DIGITS else exact.digits(rows)
            result = _of_all(self.leaders, total, broken, stop)
        elif self._most == DIGITS:
            result = [broken, stop, *exact.rounded(_as_digits(written).sum(axis=0))]
        else:
            result = [broken, stop, *exact.sums(rows)]
        self._result[: len(result)] = result


class Sums:
    """The sums of this rank's rows, which come one after another, for a record over all ranks."""

    def __init__(self, columns: int, first: int = 0):
        """`first` is the number of the first entry."""
        self.columns, self._next, self._bad = columns, first, math.inf
        self._total = exact.digits(np.empty((0, columns)))

    def add(self, rows: Rows) -> None:
        """Add rows of the next entries."""
        exact.add(self._total, rows)
        self._bad = min(self._bad, _first_bad(rows, self._next))
        self._next += len(rows)

    def over_all(self, comm: MPI.Intracomm, broken: bool = False, stop: bool = False) -> Record:
        """The record over all ranks; collective over `comm`. The sums are exact, so no layout changes them."""
        return _record(comm, _of_all(comm, self._total, broken, stop), lambda: self._bad)


def agree(comm: MPI.Intracomm, rows: Rows, broken: bool = False, stop: bool = False, first: int = 0) -> Record:
    """The record of all ranks' rows, each with those of its entries from number `first` on; collective over `comm`."""
    sums = Sums(rows.shape[1], first)
    sums.add(rows)
    return sums.over_all(comm, broken, stop)


def _numbers_a_column(replicas: int, microbatches: int, leaf: int) -> int:
    """How many numbers a rank writes for each column."""
    return min(-(-microbatches // leaf // replicas) * leaf, DIGITS)


def _as_digits(written: NDArray[np.float64]) -> Digits:
    """What ranks have written, (ranks, DIGITS, columns), as digits, (ranks, columns, DIGITS)."""
    ranks, _, columns = written.shape
    digits: Digits = written.view(np.int64).reshape(ranks, columns, DIGITS)
    return digits


def _first_bad(rows: Rows, first: int) -> float:
    """The number of the first entry whose loss is not finite, or so large that a sum of such may not be; else inf."""
    good = np.abs(rows[:, 0]) <= LARGE
    return math.inf if good.all() else float(first + np.argmin(good))


def _of_all(comm: MPI.Intracomm, total: Digits, broken: float, stop: float) -> list[float]:
    """The flags and sums of all ranks of a communicator; collective."""
    message = np.concatenate([np.array([broken, stop], np.int64), total.ravel()])
    wait([comm.Iallreduce(MPI.IN_PLACE, message)])
    return [*message[:2].tolist(), *exact.rounded(message[2:].reshape(total.shape))]


def _record(comm: MPI.Intracomm, agreed: Sequence[float], first_bad: Callable[[], float]) -> Record:
    """The record of the flags and sums that all ranks of `comm` have; which entry was bad first they only find out if
    one was. Collective."""
    broken, stop, loss, weight, *metric = agreed
    record = Record(loss, weight, metric, bool(broken), bool(stop))
    if not math.isfinite(loss):
        lowest = np.array([first_bad()])
        wait([comm.Iallreduce(MPI.IN_PLACE, lowest, MPI.MIN)])
        record.bad_entry = int(lowest[0])
    return record

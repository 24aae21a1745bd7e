"""The step record: sums and requests that all ranks agree on before any of them updates, so that all decide alike."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.parallel.grid import Grid
from mpiml.parallel.memory import SharedMemory
from mpiml.partition import part
from mpiml.team import allgather, wait
from mpiml.vectors import ALIGNMENT


@dataclass
class Record:
    """Sums over all rows of a step or an evaluation, and requests of any rank.

    Attributes:
        loss: sum of weight x row loss.
        weight: sum of weights.
        metric: the metric's sums; empty if it was not measured.
        broken: whether any rank's values were not finite after the update before this step.
        stop: whether any rank was asked to stop.
        bad_entry: the first micro-batch, or chunk of an evaluation, whose loss is not finite.
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

    The ranks of a node meet at one barrier. Before it releases them, the first rank adds up the table, together with
    the first ranks of the other nodes if there are any. As ranks come to the barrier when their backward passes are
    done, a rank that has the record may also read the gradients of the others on its node.

    Args:
        grid: all ranks.
        memory: of all ranks of this node.
        microbatches, columns: the shape of a step's table with the metric's columns; without these it is narrower.
    """

    def __init__(self, grid: Grid, memory: SharedMemory, microbatches: int, columns: int):
        self.memory, self.leaders = memory, grid.leaders
        self._flags = memory.common(2 * memory.ranks, np.float64).reshape(memory.ranks, 2)
        self._own_flags = self._flags[memory.rank]
        self._table = memory.common(microbatches * columns, np.float64)
        self._result = memory.common(3 + columns, np.float64)
        last = grid.stage == grid.stages - 1
        own = part(grid.replica, grid.replicas, microbatches) if last else (0, 0)
        self._own_rows = slice(*own)
        self._node_rows = [slice(*rows) for rows in allgather(grid.node, own)]

    @staticmethod
    def bytes_needed(ranks: int, microbatches: int, columns: int) -> int:
        """The bytes that an Agreement allocates of the memory of a node's `ranks`, by `common`."""
        return 8 * (2 * ranks + microbatches * columns + 3 + columns) + 3 * ALIGNMENT

    def __call__(self, table: NDArray[np.float64], broken: bool, stop: bool) -> Record:
        """As `agree`, for a step."""
        self._own_flags[:] = broken, stop
        shared = self._table[: table.size].reshape(table.shape)
        shared[self._own_rows] = table[self._own_rows]
        self.memory.barrier(lambda: self._combine(shared))
        loss, weight, *metric = self._result[3 : 3 + table.shape[1]].tolist()
        any_broken, any_stop, bad = self._result[:3].tolist()
        return Record(loss, weight, metric, bool(any_broken), bool(any_stop), None if bad < 0 else int(bad))

    def _combine(self, table: NDArray[Any]) -> None:
        """Write the record into the result that all ranks of the node read; on its first rank."""
        flags = self._flags.max(axis=0)
        if self.leaders is not None:
            of_node = np.zeros_like(table)
            for rows in self._node_rows:
                of_node[rows] = table[rows]
            message = np.concatenate([flags, of_node.ravel()])
            wait([self.leaders.Iallreduce(MPI.IN_PLACE, message)])
            flags, table = message[:2], message[2:].reshape(table.shape)
        record = _record(table, *flags)
        bad = -1 if record.bad_entry is None else record.bad_entry
        result = record.broken, record.stop, bad, record.loss, record.weight, *record.metric
        self._result[: len(result)] = result


def agree(comm: MPI.Intracomm, table: NDArray[np.float64], broken: bool = False, stop: bool = False) -> Record:
    """Combine all ranks' tables; collective over `comm`.

    Args:
        table: a row (loss, weight, metric sums...) for every micro-batch of the step, of which this rank has filled in
            its own; the others are zero. Each row comes from one rank, so adding up the tables is exact; then the rows
            are added in their order. So no layout changes the result.
    """
    message = np.empty(2 + table.size)
    message[0], message[1], message[2:] = broken, stop, table.ravel()
    wait([comm.Iallreduce(MPI.IN_PLACE, message)])
    return _record(message[2:].reshape(table.shape), message[0], message[1])


def _record(table: NDArray[Any], broken: float, stop: float) -> Record:
    loss, weight, *metric = np.add.reduce(table, axis=0).tolist()
    bad = None if math.isfinite(loss) else int(np.argmin(np.isfinite(table[:, 0])))
    return Record(loss, weight, metric, bool(broken), bool(stop), bad)

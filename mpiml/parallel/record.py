"""The step record: what all ranks know of a step before any of them updates, so that all decide alike."""

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
        metric: the metric's sums, if it was measured.
        broken: whether some rank's values were not finite after the update before.
        stop: whether some rank was asked to stop.
        bad_entry: the first micro-batch, or chunk, whose loss is not finite.
    """

    loss: float
    weight: float
    metric: list[float]
    broken: bool = False
    stop: bool = False
    bad_entry: int | None = None

    @property
    def mean_loss(self) -> float:
        """The loss per weight; zero for a step without rows."""
        return self.loss / self.weight if self.weight else 0.0


class Agreement:
    """The step record over memory that the ranks of a node share: `agree` below, at a fraction of its time.

    The ranks of a node meet at one barrier. Before it lets them go, the first rank adds up, with the first ranks
    of the other nodes if there are any. As each rank comes only when its backward passes are done, whoever has the
    record may also read the gradients of the others on its node.

    Args:
        grid: all ranks.
        memory: of all ranks of this node.
        microbatches, columns: shape of a step's table, in which the metric is measured; others have fewer columns.
    """

    def __init__(self, grid: Grid, memory: SharedMemory, microbatches: int, columns: int):
        self.memory, self.leaders = memory, grid.leaders
        flags = memory.common(2 * memory.ranks, np.float64).reshape(memory.ranks, 2)
        self._flags, self._mine = flags, flags[memory.rank]
        self._board = memory.common(microbatches * columns, np.float64)
        self._result = memory.common(3 + columns, np.float64)
        last = grid.stage == grid.stages - 1
        block = part(grid.replica, grid.replicas, microbatches) if last else (0, 0)
        self._block = slice(*block)
        self._here = [slice(*other) for other in allgather(grid.node, block)]

    @staticmethod
    def bytes_needed(ranks: int, microbatches: int, columns: int) -> int:
        """What it allocates of the memory that all ranks of a node share."""
        return 8 * (2 * ranks + microbatches * columns + 3 + columns) + 3 * ALIGNMENT

    def __call__(self, table: NDArray[np.float64], broken: bool, stop: bool) -> Record:
        """As `agree`, for a step."""
        self._mine[:] = broken, stop
        everyones = self._board[: table.size].reshape(len(table), -1)
        everyones[self._block] = table[self._block]
        self.memory.barrier(lambda: self._combine(everyones))
        loss, weight, *metric = self._result[3 : 3 + table.shape[1]].tolist()
        broken_, stop_, bad = self._result[:3].tolist()
        return Record(loss, weight, metric, bool(broken_), bool(stop_), None if bad < 0 else int(bad))

    def _combine(self, table: NDArray[Any]) -> None:
        flags = self._flags.max(axis=0)
        if self.leaders is not None:
            mine = np.zeros_like(table)
            for block in self._here:
                mine[block] = table[block]
            message = np.concatenate([flags, mine.ravel()])
            wait([self.leaders.Iallreduce(MPI.IN_PLACE, message)])
            flags, table = message[:2], message[2:].reshape(table.shape)
        record = _record(table, *flags)
        bad = -1 if record.bad_entry is None else record.bad_entry
        whole = record.broken, record.stop, bad, record.loss, record.weight, *record.metric
        self._result[: len(whole)] = whole


def agree(comm: MPI.Intracomm, table: NDArray[np.float64], broken: bool = False, stop: bool = False) -> Record:
    """Combine all ranks' tables; collective over `comm`.

    Args:
        table: a row (loss, weight, metric sums...) for every micro-batch of the step, on all ranks; this rank has
            filled in its own, the others are zero. As each row comes from one rank, adding up tables is exact, and
            the rows are then added in their order: no layout can change the result.
    """
    message = np.empty(2 + table.size)
    message[0], message[1], message[2:] = broken, stop, table.ravel()
    wait([comm.Iallreduce(MPI.IN_PLACE, message)])
    return _record(message[2:].reshape(table.shape), message[0], message[1])


def _record(table: NDArray[Any], broken: float, stop: float) -> Record:
    loss, weight, *metric = np.add.reduce(table, axis=0).tolist()
    bad = None if math.isfinite(loss) else int(np.argmin(np.isfinite(table[:, 0])))
    return Record(loss, weight, metric, bool(broken), bool(stop), bad)

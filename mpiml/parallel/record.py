"""The step record: what all ranks know of a step before any of them updates, so that all decide alike."""

import math
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.waiting import wait


@dataclass
class Record:
    """Sums over all rows of a step or an evaluation, and requests of any rank.

    Attributes:
        loss: sum of weight x row loss.
        weight: sum of weights.
        metric: the metric's sums.
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


def agree(comm: MPI.Intracomm, table: NDArray[np.float64], broken: bool = False, stop: bool = False) -> Record:
    """Combine all ranks' tables; collective over `comm`.

    Args:
        table: a row (loss, weight, metric sums...) for every micro-batch of the step, on all ranks; this rank has
            filled in its own, the others are zero. As each row comes from one rank, adding up tables is exact, and
            the rows are then added by math.fsum, which is exact too: no layout can change the result.
    """
    message = np.empty(2 + table.size)
    message[0], message[1], message[2:] = broken, stop, table.ravel()
    wait([comm.Iallreduce(MPI.IN_PLACE, message)])
    rows = message[2:].reshape(table.shape)
    loss, weight, *metric = (_sum(column) for column in rows.T)
    bad = None if math.isfinite(loss) else int(np.argmin(np.isfinite(rows[:, 0])))
    return Record(loss, weight, metric, bool(message[0]), bool(message[1]), bad)


def _sum(column: NDArray[np.float64]) -> float:
    try:
        return math.fsum(column.tolist())
    except (OverflowError, ValueError):  # beyond float64, or inf - inf
        return math.nan

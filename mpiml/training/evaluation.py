"""An evaluation: test rows in chunks that are dealt to the replicas, and the sums over all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml.clock import Clock
from mpiml.data.batch import Batch
from mpiml.data.dataset import Split
from mpiml.data.shards import chunks
from mpiml.errors import NotFiniteError
from mpiml.nn.losses import Metric
from mpiml.parallel.grid import Grid
from mpiml.parallel.record import Record, Sums
from mpiml.parallel.stage import Stage
from mpiml.parallel.votes import Votes
from mpiml.partition import part


def not_finite(reason: str, rank: int | None = None) -> NotFiniteError:
    """The error of a run that diverges, which all ranks raise; `rank` is where it was seen first."""
    return NotFiniteError(f"{reason}; a smaller --lr, --warmup-steps, --clip or --normalize may help").on_all_ranks(
        rank
    )


class Evaluation:
    """The rows of a split, read from row 0 in `chunks` chunks of `chunk_rows` rows; each replica has a `block` of whole
    chunks, (first, last + 1). In messages the rows are called what is `evaluated`: test or validation."""

    def __init__(self, split: Split, chunk_rows: int, grid: Grid, dtype: DTypeLike, evaluated: str = "test"):
        self.split, self.chunk_rows, self.grid, self.dtype, self.evaluated = split, chunk_rows, grid, dtype, evaluated
        self.chunks = -(-len(split) // chunk_rows)
        self.block = part(grid.replica, grid.replicas, self.chunks)

    def rows(self) -> NDArray[np.int64]:
        """The numbers of this replica's rows."""
        first, last = self.block
        return np.arange(first * self.chunk_rows, min(last * self.chunk_rows, len(self.split)))

    def batches(self) -> list[Batch]:
        """The chunks of this replica."""
        return chunks(self.split, self.chunk_rows, *self.block, self.dtype)

    def score(
        self, stage: Stage, metric: Metric, clock: Clock, step: int, stop: Callable[[], bool] | None = None
    ) -> Record | None:
        """The sums over all rows with the weights after `step`, the same bits on every grid; collective. If no row
        counts the loss is not a number.

        `stop` is asked before each chunk: if it says yes on any rank, all leave off soon, and None is returned.

        Raises NotFiniteError, on all ranks alike, if the loss is not finite.
        """
        with clock.booked("evaluation"):
            sums = Sums(2 + metric.columns, self.block[0])
            votes = Votes(self.grid.team, self.grid.stages, stop) if stop else None
            stage.evaluate(self._chunks(sums, votes))
            if votes and not votes.finish():
                return None
            clock("communication")
            record = sums.over_all(self.grid.comm)
        if record.bad_entry is not None:
            raise not_finite(f"the {self.evaluated} loss is not finite after step {step} (chunk {record.bad_entry})")
        return record if record.weight else dataclasses.replace(record, loss=math.nan)

    def _chunks(self, sums: Sums, votes: Votes | None) -> Iterator[tuple[Batch, NDArray[np.float64]]]:
        """The chunks of this replica, each with a row for its sums, which are then added, while `votes` let it go on.

        There are as many votes as any replica has chunks.
        """
        batches = self.batches()
        for number in range(-(-self.chunks // self.grid.replicas)):
            if votes and not votes.go_on():
                return
            if number < len(batches):
                row = np.zeros((1, sums.columns))
                yield batches[number], row[0]
                sums.add(row)

"""An evaluation: test rows in chunks that are dealt to the replicas, and the sums over all of them in their order."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml.clock import Clock
from mpiml.data.dataset import Batch, Split
from mpiml.data.shards import chunks
from mpiml.errors import NotFiniteError
from mpiml.nn.losses import Metric
from mpiml.parallel.grid import Grid
from mpiml.parallel.record import Record, agree
from mpiml.parallel.stage import Stage
from mpiml.partition import part


class Evaluation:
    """The rows of a split, read from row 0 in chunks of `chunk_rows` rows; each replica has a block of whole chunks.

    Attributes:
        chunks: how many there are in all; block: those of this replica, as (first, last + 1).
    """

    def __init__(self, split: Split, chunk_rows: int, grid: Grid, dtype: DTypeLike):
        self.split, self.chunk_rows, self.grid, self.dtype = split, chunk_rows, grid, dtype
        self.chunks = -(-len(split) // chunk_rows)
        self.block = part(grid.replica, grid.replicas, self.chunks)

    def rows(self) -> NDArray[np.int64]:
        """The numbers of this replica's rows."""
        first, last = self.block
        return np.arange(first * self.chunk_rows, min(last * self.chunk_rows, len(self.split)))

    def batches(self) -> list[Batch]:
        """The chunks of this replica."""
        return chunks(self.split, self.chunk_rows, *self.block, self.dtype)

    def score(self, stage: Stage, metric: Metric, clock: Clock, step: int) -> Record:
        """The sums over all rows with the weights after `step`, the same bits on every grid; collective.

        Raises NotFiniteError, on all ranks alike, if the loss is not finite.
        """
        with clock.booked("evaluation"):
            table = np.zeros((self.chunks, 2 + metric.columns))
            stage.evaluate(self.batches(), table)
            clock("communication")
            record = agree(self.grid.comm, table)
        if record.bad_entry is not None:
            reason = f"the test loss is not finite after step {step} (chunk {record.bad_entry})"
            error = NotFiniteError(f"{reason}; a smaller --lr, --warmup-steps or --clip may help")
            error.everywhere = True
            raise error
        return record

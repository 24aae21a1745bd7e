"""An evaluation: test rows in chunks that are dealt to the replicas, and the sums over all of them in their order."""

from __future__ import annotations

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
from mpiml.parallel.record import Record
from mpiml.parallel.rounds import Rounds
from mpiml.parallel.stage import Stage
from mpiml.partition import part
from mpiml.team import wait


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
        """The sums over all rows with the weights after `step`, the same bits on every grid; collective.

        `stop` is asked before each chunk: if it says yes on any rank, all leave off soon, and None is returned.

        Raises NotFiniteError, on all ranks alike, if the loss is not finite.
        """
        with clock.booked("evaluation"):
            sums = Sums(self.grid, 2 + metric.columns)
            rounds = Rounds(self.grid.team, self.grid.stages, stop) if stop else None
            stage.evaluate(self._chunks(sums, rounds))
            if rounds and not rounds.finish():
                return None
            clock("communication")
            record = sums.over_all()
        if record.bad_entry is not None:
            raise not_finite(f"the {self.evaluated} loss is not finite after step {step} (chunk {record.bad_entry})")
        return record

    def _chunks(self, sums: Sums, rounds: Rounds | None) -> Iterator[tuple[Batch, NDArray[np.float64]]]:
        """The chunks of this replica, each with a row for its sums, while `rounds` goes on.

        There are as many rounds as any replica has chunks.
        """
        batches = self.batches()
        for number in range(-(-self.chunks // self.grid.replicas)):
            if rounds and not rounds.go_on():
                return
            if number < len(batches):
                row = np.zeros(sums.columns)
                yield batches[number], row
                sums.add(batches[number].index, row)


class Sums:
    """The sums of rows over all chunks, in the order of the chunks, whoever has them.

    A replica goes on from the sums of the one before it. Until these come it keeps its rows; the first keeps none. All
    this is the last stage's: the rows of others are empty.
    """

    def __init__(self, grid: Grid, columns: int):
        self.grid, self.columns = grid, columns
        self._rows: list[tuple[int, NDArray[np.float64]]] = []
        self._message = np.zeros(1 + columns)
        self._message[0] = math.inf  # the first chunk with which the loss is not finite

    def add(self, chunk: int, row: NDArray[np.float64]) -> None:
        """Add the row of this replica's next chunk."""
        if self.grid.stage == self.grid.stages - 1:
            self._rows.append((chunk, row))
        if self.grid.replica == 0:
            self._add_up()

    def _add_up(self) -> None:
        for chunk, row in self._rows:
            self._message[1:] += row
            if not math.isfinite(self._message[1]):
                self._message[0] = min(self._message[0], chunk)
        self._rows.clear()

    def over_all(self) -> Record:
        """Those of all replicas; collective over the grid, when all have added their rows. The loss is not a number if
        no row counts."""
        grid = self.grid
        last = grid.rank_of(grid.stages - 1, grid.replicas - 1)
        if grid.stage == grid.stages - 1:
            if grid.replica > 0:
                wait([grid.comm.Irecv(self._message, grid.comm.rank - 1)])
            self._add_up()
            if grid.comm.rank != last:
                wait([grid.comm.Isend(self._message, grid.comm.rank + 1)])
        wait([grid.comm.Ibcast(self._message, last)])
        bad, loss, weight, *metric = self._message.tolist()
        bad_entry = None if math.isfinite(loss) else int(bad)
        return Record(loss if weight else math.nan, weight, metric, bad_entry=bad_entry)

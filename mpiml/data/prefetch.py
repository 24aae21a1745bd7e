"""Reading ahead: a thread, which makes no MPI calls, prepares the rows of the next steps during a step."""

from __future__ import annotations

import math
import queue
import threading
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpiml.data.batch import Batch
from mpiml.data.dataset import Split
from mpiml.data.items import ItemSource
from mpiml.data.shards import Shards
from mpiml.data.sources import ArraySource, HeldSource
from mpiml.data.subsets import origins
from mpiml.data.text import Windows

if TYPE_CHECKING:
    from concurrent.futures import Future

AHEAD = 2  # steps to read ahead by default
HANDOVER = 2e-4  # seconds that it takes to pass the rows of a step from thread to thread
TRIES = 3  # timings, of which the fastest counts: others may have been disturbed
Prepared = list[tuple[Any, Any, Any]]  # x, y, w of micro-batches; None if not needed


@dataclass
class ReadyBatch:
    """A Batch whose rows the thread reads: x() and y() wait for them, and raise what went wrong in the thread.

    `position` is its position in `prepared`, the micro-batches of a step.
    """

    index: int
    rows: int
    position: int
    prepared: Future[Prepared]

    def x(self) -> NDArray[np.floating]:
        """The inputs, in the run's dtype."""
        x: NDArray[np.floating] = self.prepared.result()[self.position][0]
        return x

    def y(self) -> NDArray[np.generic]:
        """The labels."""
        y: NDArray[np.generic] = self.prepared.result()[self.position][1]
        return y

    def w(self) -> NDArray[np.floating] | None:
        """The weights of the rows; None if each counts 1."""
        w: NDArray[np.floating] | None = self.prepared.result()[self.position][2]
        return w


class ReadAhead:
    """Prepares the micro-batches of shards `steps` steps ahead, in a `with` statement, which ends the thread.

    Args:
        steps: 0 reads nothing ahead and starts no thread.
        last: the number of the last step.
        x, y: whether this rank needs inputs, and labels with their weights.
    """

    def __init__(self, shards: Shards, steps: int, last: int, x: bool, y: bool):
        self.shards, self.steps, self.last, self.needs = shards, steps, last, (x, y)
        self._pending: dict[int, tuple[list[Batch], Future[Prepared]]] = {}
        self._requests: queue.SimpleQueue[tuple[list[Batch], Future[Prepared]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ReadAhead:
        if self.steps:
            # Not a ThreadPoolExecutor: Python waits for its threads before it exits, and a read may hang.
            self._thread = threading.Thread(target=self._read, name="reading ahead", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._thread:
            for _, prepared in self._pending.values():
                prepared.cancel()
            self._requests.put(None)
            if kind is None:  # after an error, do not wait: the error may be that a read hangs
                self._thread.join()
        self._thread = None
        self._pending.clear()

    def batches(self, step: int) -> list[Batch] | list[ReadyBatch]:
        """The micro-batches of a step; requests those of the next steps."""
        if self._thread is None:
            return self.shards.batches(step)
        from concurrent.futures import Future

        for ahead in range(step, min(step + self.steps, self.last) + 1):
            if ahead not in self._pending:
                self._pending[ahead] = self.shards.batches(ahead), Future()
                self._requests.put(self._pending[ahead])
        batches, prepared = self._pending.pop(step)
        return [ReadyBatch(batch.index, batch.rows, position, prepared) for position, batch in enumerate(batches)]

    def _read(self) -> None:
        """The thread: serves requests until it gets None."""
        x, y = self.needs
        while request := self._requests.get():
            batches, prepared = request
            if prepared.set_running_or_notify_cancel():
                try:
                    prepared.set_result([_read(batch, x and batch.rows > 0, y and batch.rows > 0) for batch in batches])
                except BaseException as error:  # raised again by x() and y()
                    prepared.set_exception(error)


def _read(batch: Batch, x: bool, y: bool) -> tuple[Any, Any, Any]:
    return batch.x() if x else None, batch.y() if y else None, batch.w() if y else None


def steps_ahead(shards: Shards, asked: int | None = None, columns: str = "xyw") -> int:
    """How many steps to read ahead, on a rank that reads these columns: as many as are asked for; by default none if
    reading a step's rows takes less time than passing them from thread to thread.

    That holds for rows in memory, and often for mapped files that the system keeps in memory, which is measured. For
    this, the rows must be held. Sources of other kinds, such as a user's own, are not tried.

    Rows and transforms that draw from generators of the process are never read ahead: other threads draw from them.
    """
    if shards.draws or any(isinstance(source, ItemSource) and source.draws for source in shards.split.sources()):
        return 0
    if asked is not None:
        return asked
    sources = shards.split.sources(columns)
    if shards.transform or not all(isinstance(source, (ArraySource, HeldSource, Windows)) for source in sources):
        return AHEAD
    random = np.random.default_rng(0)
    times = (_seconds(shards, columns, random) for _ in range(TRIES))
    return 0 if in_memory(shards.split, columns) or any(seconds < HANDOVER for seconds in times) else AHEAD


def in_memory(split: Split, columns: str = "xyw") -> bool:
    """Whether all rows of these columns are in this process's own memory."""
    sources = split.sources(columns)
    mapped = (isinstance(source, ArraySource) and isinstance(source.array, np.memmap) for source in sources)
    return all(isinstance(source, (ArraySource, HeldSource)) for source in sources) and not any(mapped)


def _seconds(shards: Shards, names: str, random: np.random.Generator) -> float:
    """The time to read as many rows as a step does, drawn at random, micro-batch by micro-batch."""
    count = math.ceil(shards.rows_per_step / shards.microbatches)
    ranges = [rows for m in range(shards.first, shards.last) if (rows := shards.shard(m))]
    batches = [rows.start + rows.step * random.integers(0, len(rows), count) for rows in ranges]
    columns = shards.split.columns(names)
    reads = [read for numbers in batches for column in columns for read in origins(column, numbers)]
    began = perf_counter()
    for source, numbers in reads:
        source.rows(numbers)
    return perf_counter() - began

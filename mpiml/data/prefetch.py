"""Reading ahead: a thread prepares the rows of the next steps while this one computes. It makes no MPI calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpiml.data.dataset import Batch, Split
from mpiml.data.normalize import NormalizedSource
from mpiml.data.shards import Shards
from mpiml.data.sources import ArraySource, HeldSource, LabelSource, Source
from mpiml.data.text import Windows

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

AHEAD = 2  # steps
HANDED_OVER = 2e-4  # seconds that it takes to hand the rows of a step from thread to thread
TRIES = 3  # one that is quick will do: a machine has hiccups
Prepared = list[tuple[Any, Any]]  # of each micro-batch x and y, None where this rank needs none


@dataclass
class ReadyBatch:
    """A micro-batch whose rows are in memory, or will be: x() and y() wait for them.

    What went wrong in the thread is raised here, in the rank's own.
    """

    index: int
    rows: int
    place: int
    prepared: Future[Prepared]

    def x(self) -> NDArray[np.floating]:
        """The inputs, in the run's dtype."""
        x: NDArray[np.floating] = self.prepared.result()[self.place][0]
        return x

    def y(self) -> NDArray[np.generic]:
        """The labels."""
        y: NDArray[np.generic] = self.prepared.result()[self.place][1]
        return y


class ReadAhead:
    """The micro-batches of shards, `steps` steps ahead; for use in a `with` statement, which ends the thread.

    Args:
        steps: 0 reads nothing ahead, and starts no thread.
        last: the last step; none is read beyond it.
        x, y: what this rank needs of a batch.
    """

    def __init__(self, shards: Shards, steps: int, last: int, x: bool, y: bool):
        self.shards, self.steps, self.last, self.needs = shards, steps, last, (x, y)
        self._pending: dict[int, tuple[list[Batch], Future[Prepared]]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def __enter__(self) -> ReadAhead:
        if self.steps:
            from concurrent.futures import ThreadPoolExecutor

            self._thread = ThreadPoolExecutor(1, "reading ahead")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._thread:
            # After an error nobody waits for a read: it may be what hangs.
            self._thread.shutdown(wait=kind is None, cancel_futures=True)
        self._thread = None
        self._pending.clear()

    def batches(self, step: int) -> list[Batch] | list[ReadyBatch]:
        """The micro-batches of a step. Those of the next ones will be prepared from now on."""
        if self._thread is None:
            return self.shards.batches(step)
        for ahead in range(step, min(step + self.steps, self.last) + 1):
            if ahead not in self._pending:
                batches = self.shards.batches(ahead)
                self._pending[ahead] = batches, self._thread.submit(self._prepare, batches)
        batches, prepared = self._pending.pop(step)
        return [ReadyBatch(batch.index, batch.rows, place, prepared) for place, batch in enumerate(batches)]

    def _prepare(self, batches: list[Batch]) -> Prepared:
        x, y = self.needs
        return [(batch.x() if x and batch.rows else None, batch.y() if y and batch.rows else None) for batch in batches]


def steps_ahead(shards: Shards) -> int:
    """How many steps to read ahead where no setting says: none if the rows of a step are taken more quickly than one
    thread hands them to another.

    So it is with rows in memory, and mostly with those of a mapped file that the system keeps in memory: whether it
    does is found by taking some, for which they must have been looked at before. Other sources, of a user's own say,
    are not read for that.
    """
    sources = [_beneath(source) for source in (shards.split.x, shards.split.y)]
    if shards.transform or not all(isinstance(source, (ArraySource, HeldSource, Windows)) for source in sources):
        return AHEAD
    random = np.random.default_rng(0)
    tried = (_seconds(shards, sources, random) for _ in range(TRIES))
    return 0 if in_memory(shards.split) or any(seconds < HANDED_OVER for seconds in tried) else AHEAD


def in_memory(split: Split) -> bool:
    """Whether all rows are in this process's own memory."""
    return all(_in_memory(_beneath(source)) for source in (split.x, split.y))


def _in_memory(source: Source) -> bool:
    mapped = isinstance(source, ArraySource) and isinstance(source.array, np.memmap)
    return isinstance(source, (ArraySource, HeldSource)) and not mapped


def _beneath(source: Source) -> Source:
    return _beneath(source.source) if isinstance(source, (NormalizedSource, LabelSource)) else source


def _seconds(shards: Shards, sources: Sequence[Source], random: np.random.Generator) -> float:
    """How long it takes to take as many rows at random as a step does, micro-batch by micro-batch."""
    count = math.ceil(shards.rows_per_step / shards.microbatches)
    blocks = [rows for m in range(shards.first, shards.last) if (rows := shards.shard(m))]
    drawn = [rows.start + rows.step * random.integers(0, len(rows), count) for rows in blocks]
    began = perf_counter()
    for numbers in drawn:
        for source in sources:
            source.rows(numbers)
    return perf_counter() - began

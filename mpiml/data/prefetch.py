"""Reading ahead: a thread prepares the rows of the next steps while this one computes. It makes no MPI calls."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpiml.data.dataset import Batch, Split
from mpiml.data.normalize import NormalizedSource
from mpiml.data.shards import Shards
from mpiml.data.sources import ArraySource, HeldSource, Source

if TYPE_CHECKING:
    from concurrent.futures import Future

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
        self._asked: queue.SimpleQueue[tuple[list[Batch], Future[Prepared]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ReadAhead:
        if self.steps:
            # Not of a ThreadPoolExecutor: Python waits for its threads before it ends, and a read may hang.
            self._thread = threading.Thread(target=self._read, name="reading ahead", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._thread:
            for _, prepared in self._pending.values():
                prepared.cancel()
            self._asked.put(None)
            if kind is None:  # after an error nobody waits for a read: it may be what hangs
                self._thread.join()
        self._thread = None
        self._pending.clear()

    def batches(self, step: int) -> list[Batch] | list[ReadyBatch]:
        """The micro-batches of a step. Those of the next ones will be prepared from now on."""
        if self._thread is None:
            return self.shards.batches(step)
        from concurrent.futures import Future

        for ahead in range(step, min(step + self.steps, self.last) + 1):
            if ahead not in self._pending:
                self._pending[ahead] = self.shards.batches(ahead), Future()
                self._asked.put(self._pending[ahead])
        batches, prepared = self._pending.pop(step)
        return [ReadyBatch(batch.index, batch.rows, place, prepared) for place, batch in enumerate(batches)]

    def _read(self) -> None:
        """What the thread does until it is asked for nothing more."""
        while asked := self._asked.get():
            batches, prepared = asked
            if prepared.set_running_or_notify_cancel():
                try:
                    prepared.set_result(self._prepare(batches))
                except BaseException as error:  # raised again where the rows are wanted
                    prepared.set_exception(error)

    def _prepare(self, batches: list[Batch]) -> Prepared:
        x, y = self.needs
        return [(batch.x() if x and batch.rows else None, batch.y() if y and batch.rows else None) for batch in batches]


def in_memory(split: Split) -> bool:
    """Whether rows come from memory: handing them from thread to thread takes longer than taking them."""
    return all(_in_memory(source) for source in (split.x, split.y))


def _in_memory(source: Source) -> bool:
    if isinstance(source, NormalizedSource):
        return _in_memory(source.source)
    mapped = isinstance(source, ArraySource) and isinstance(source.array, np.memmap)
    return isinstance(source, (ArraySource, HeldSource)) and not mapped

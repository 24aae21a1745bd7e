"""Where the flat vectors of a node's replicas live: the one place that decides it."""

from typing import Protocol

from numpy.typing import DTypeLike

from mpiml import vectors
from mpiml.vectors import Vector


class Memory(Protocol):
    """Memory of the `ranks` replicas of a node; this one is number `rank` of them.

    `own` allocates `count` vectors for this rank and returns those of all ranks, by rank, for every rank may read
    the others'; `common` allocates one vector for all of them. Vectors start as zeros. `barrier` returns when all
    ranks have come to it, and what any of them wrote before can then be read.
    """

    rank: int
    ranks: int

    def own(self, count: int, size: int, dtype: DTypeLike) -> list[list[Vector]]: ...

    def common(self, size: int, dtype: DTypeLike) -> Vector: ...

    def barrier(self) -> None: ...


class PrivateMemory:
    """Each replica by itself, as if it were alone on its node."""

    rank = 0
    ranks = 1

    def own(self, count: int, size: int, dtype: DTypeLike) -> list[list[Vector]]:
        return [[vectors.zeros(size, dtype) for _ in range(count)]]

    def common(self, size: int, dtype: DTypeLike) -> Vector:
        return vectors.zeros(size, dtype)

    def barrier(self) -> None:
        pass

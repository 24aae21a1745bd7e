"""Where the flat vectors of a node's replicas live: the one place that decides it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike

from mpiml import vectors
from mpiml.errors import ConfigError
from mpiml.team import allgather, broadcast, until, wait
from mpiml.vectors import ALIGNMENT, Vector, bytes_of

PAGE = mmap.PAGESIZE
SHM = "/dev/shm/"
NAME = "mpiml-"  # begins the names of files there
LEFT_BEHIND = 3600.0  # seconds: a file that still has its name is of a job that was killed while it began


class Memory(Protocol):
    """Memory of the `ranks` replicas of a node; this one is number `rank` of them.

    `own` allocates `count` vectors for this rank and returns those of all ranks, by rank, for every rank may read
    the others'; `common` allocates one vector for all of them. Vectors start as zeros. `barrier` returns when all
    ranks have come to it, and what any of them wrote before can then be read. `post` says how far this rank is, by
    a number that never falls; how far all ranks are at least, `posted` says, and what each of them wrote before it
    posted that can then be read.
    """

    rank: int
    ranks: int

    def own(self, count: int, size: int, dtype: DTypeLike) -> list[list[Vector]]: ...

    def common(self, size: int, dtype: DTypeLike) -> Vector: ...

    def barrier(self) -> None: ...

    def post(self, count: int) -> None: ...

    def posted(self) -> int: ...


class PrivateMemory:
    """Each replica by itself, as if it were alone on its node."""

    rank = 0
    ranks = 1

    def __init__(self) -> None:
        self._posted = 0

    def own(self, count: int, size: int, dtype: DTypeLike) -> list[list[Vector]]:
        return [[vectors.zeros(size, dtype) for _ in range(count)]]

    def common(self, size: int, dtype: DTypeLike) -> Vector:
        return vectors.zeros(size, dtype)

    def barrier(self) -> None:
        pass

    def post(self, count: int) -> None:
        self._posted = count

    def posted(self) -> int:
        return self._posted


class SharedMemory:
    """One mapping for all ranks of a node. It has no name once all have opened it, so nothing can leave it behind.

    Args:
        comm: the ranks of the node; collective to make.
        own_bytes: what this rank will allocate by `own` in all, and common_bytes what all will by `common`.

    Raises OSError, on all ranks of the node, if the memory is not to be had.
    """

    def __init__(self, comm: MPI.Intracomm, own_bytes: int, common_bytes: int):
        self.comm, self.rank, self.ranks = comm, comm.rank, comm.size
        sizes = allgather(comm, _pages(own_bytes))
        slots = _pages((1 + 2 * comm.size) * ALIGNMENT)
        common = _pages(common_bytes)
        starts = [slots + common + sum(sizes[:rank]) for rank in range(comm.size)]
        self._map = _map(comm, starts[-1] + sizes[-1], starts[self.rank], sizes[self.rank], slots + common)
        self._free_own, self._free_common = starts, slots
        self._words = memoryview(self._map)[:slots].cast("Q")
        self._epoch = 0

    def own(self, count: int, size: int, dtype: DTypeLike) -> list[list[Vector]]:
        counts = allgather(self.comm, count)
        each, starts = bytes_of(size, dtype), self._free_own
        self._free_own = [start + count * each for start, count in zip(starts, counts, strict=True)]
        return [
            [self._vector(start + index * each, size, dtype) for index in range(count)]
            for start, count in zip(starts, counts, strict=True)
        ]

    def common(self, size: int, dtype: DTypeLike) -> Vector:
        vector = self._vector(self._free_common, size, dtype)
        self._free_common += bytes_of(size, dtype)
        return vector

    def barrier(self, action: Callable[[], None] | None = None) -> None:
        """As of Memory; `action` is what the first rank does when all have come, before any of them goes on.

        A slot per rank and a word that releases all, each on a cache line of its own, polled.
        """
        self._epoch += 1
        words, apart = self._words, ALIGNMENT // 8
        if self.rank:
            words[(1 + self.rank) * apart] = self._epoch
            until(self._reached(0))
            return
        for rank in range(1, self.ranks):
            until(self._reached((1 + rank) * apart))
        if action:
            action()
        words[0] = self._epoch

    def post(self, count: int) -> None:
        self._words[(1 + self.ranks + self.rank) * (ALIGNMENT // 8)] = count

    def posted(self) -> int:
        apart = ALIGNMENT // 8
        return min(self._words[index * apart] for index in range(1 + self.ranks, 1 + 2 * self.ranks))

    def _reached(self, index: int) -> Callable[[], bool]:
        words, epoch = self._words, self._epoch
        return lambda: words[index] >= epoch

    def _vector(self, start: int, size: int, dtype: DTypeLike) -> Vector:
        return np.frombuffer(self._map, dtype, size, start)


class FencedMemory(SharedMemory):
    """Shared memory on processors that may reorder stores, where a slot's store does not order those before it."""

    def barrier(self, action: Callable[[], None] | None = None) -> None:
        wait([self.comm.Ibarrier()])
        if action:
            if self.rank == 0:
                action()
            wait([self.comm.Ibarrier()])

    def posted(self) -> int:
        """Nothing is known before a barrier."""
        return 0


def share(
    everyone: MPI.Intracomm, node: MPI.Intracomm, own_bytes: int, common_bytes: int, kind: str
) -> tuple[Memory, str | None]:
    """Memory of a kind: shared by the ranks of `node` if all ranks of `everyone` can share, else private.

    Collective over `everyone`.

    Args:
        own_bytes, common_bytes: as of SharedMemory.
        kind: "shared", "private", or "auto": shared where it is to be had.

    Returns:
        The memory, and why it is not shared if it was to be.

    Raises:
        ConfigError: on all ranks, if it must be shared and cannot.
    """
    if kind == "private":
        return PrivateMemory(), None
    memory: Memory = PrivateMemory()
    problem = None
    try:
        shared = SharedMemory if platform.machine() in ("x86_64", "AMD64") else FencedMemory
        memory = shared(node, own_bytes, common_bytes)
    except OSError as error:
        needed = (own_bytes * node.size + common_bytes) / 2**20
        problem = f"{platform.node()}: {needed:,.0f} MiB of memory cannot be shared ({error.strerror or error})"
    problems = [text for text in allgather(everyone, problem) if text]
    if not problems:
        return memory, None
    if kind == "shared":
        refusal = ConfigError(f"--memory shared: {problems[0]}; auto or private would work")
        raise refusal.on_all_ranks()
    return PrivateMemory(), f"{problems[0]}: each rank keeps its own copy of the model"


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _map(comm: MPI.Intracomm, total: int, start: int, length: int, common: int) -> mmap.mmap:
    """Map `total` bytes on all ranks of a node, each of which claims its own part and its share of the first
    `common` bytes: what is not there is found out now, as an error, and not later as a crash; and a page lies
    near the core that claimed it.
    """
    shares = [_pages(common * rank // comm.size) for rank in range(comm.size)] + [common]
    claims = [(start, length), (shares[comm.rank], shares[comm.rank + 1] - shares[comm.rank])]
    problems: list[OSError] = []
    for create in (_nameless, _named):
        with _open_together(comm, create, total) as (descriptor, problem):
            try:
                for begin, claimed in claims if descriptor >= 0 else ():
                    if claimed:
                        os.posix_fallocate(descriptor, begin, claimed)
            except OSError as error:
                problem = error
            problems = [error for error in allgather(comm, problem) if error]
            if not problems:
                return mmap.mmap(descriptor, total)
    raise problems[0]


@contextmanager
def _open_together(
    comm: MPI.Intracomm, create: Callable[[], tuple[int, str]], total: int
) -> Iterator[tuple[int, OSError | None]]:
    """A file of `total` bytes that the node's first rank creates and all open: its descriptor, or -1."""
    descriptor, path, file, problem = -1, "", None, None
    try:
        if comm.rank == 0:
            descriptor, path = create()
            file = _identity(descriptor)
            os.ftruncate(descriptor, total)
    except OSError as error:
        problem = error
    path, file = broadcast(comm, (path, file))
    try:
        if comm.rank and file:
            descriptor = _open(path, file)
    except OSError as error:
        problem = error
    wait([comm.Ibarrier()])
    if comm.rank == 0 and path.startswith(SHM):
        Path(path).unlink(missing_ok=True)
    try:
        yield descriptor, problem
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _open(path: str, file: tuple[int, int]) -> int:
    """Open what is at a path if it is that very file. Raises OSError if it is another, which stays untouched.

    In containers each rank may have process numbers of its own: then /proc/PID/fd/N of one rank is, for another, its
    own file, or anybody's.
    """
    place = os.open(path, os.O_PATH)  # opens nothing yet
    try:
        if _identity(place) != file:
            raise OSError(errno.ENXIO, "ranks cannot open each other's files")
        return os.open(f"/proc/self/fd/{place}", os.O_RDWR)
    finally:
        os.close(place)


def _identity(descriptor: int) -> tuple[int, int]:
    """What tells a file from all others of this machine."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _nameless() -> tuple[int, str]:
    """Memory that never has a name; others open it through this process."""
    if not hasattr(os, "memfd_create"):  # Pythons that were built for an old C library
        raise OSError(errno.ENOSYS, "this Python has no os.memfd_create")
    descriptor = os.memfd_create("mpiml")
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"


def _named() -> tuple[int, str]:
    """For where processes cannot look at each other: a file in memory, whose name goes when all have opened it."""
    import tempfile

    for file in Path(SHM).glob(f"{NAME}*"):
        with contextlib.suppress(OSError):  # somebody else's, or gone
            if time.time() - file.stat().st_mtime > LEFT_BEHIND:
                file.unlink()
    return tempfile.mkstemp(prefix=NAME, dir=SHM)

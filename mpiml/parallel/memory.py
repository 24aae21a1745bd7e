"""Memory for the flat vectors of a node's replicas: each replica's own, or shared by all of them."""

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
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike

from mpiml import vectors
from mpiml.errors import ConfigError
from mpiml.team import allgather, broadcast, until, wait
from mpiml.vectors import ALIGNMENT, Vector, bytes_of

MEMORIES = ("auto", "shared", "private")  # kinds of memory that can be asked for, as --memory has them
PAGE = mmap.PAGESIZE
APART = ALIGNMENT // 8  # words of 8 bytes, each in a cache line of its own
SHM = "/dev/shm/"
NAME = "mpiml-"  # how names of files in SHM begin
LEFT_BEHIND = 3600.0  # seconds: a file older than this was left behind by a job that was killed at its start


class Memory(Protocol):
    """Memory that `ranks` replicas of a node share; this one is number `rank` of them. Vectors start as zeros."""

    rank: int
    ranks: int

    @property
    def vectors(self) -> Any:
        """What computes with these vectors: mpiml.vectors, or functions of the same names."""

    def own(self, count: int, size: int, dtype: DTypeLike) -> list[list[Vector]]:
        """Allocate `count` vectors for this rank. Returns those of all ranks, by rank: each may read the others'.
        Collective."""

    def common(self, size: int, dtype: DTypeLike) -> Vector:
        """Allocate one vector for all ranks together; all of them call it in the same order."""

    def barrier(self) -> None:
        """Return when all ranks have called it. All can then read what any of them wrote before."""

    def post(self, count: int) -> None:
        """Publish this rank's progress, a number that never falls."""

    def posted(self) -> int:
        """The least progress of all ranks. What each of them wrote before it posted that number can be read."""


class PrivateMemory:
    """Memory of one replica, which shares with nobody."""

    rank = 0
    ranks = 1

    def __init__(self, vectors: Any = vectors) -> None:
        self.vectors = vectors  # which make those of a device, if it is its memory
        self._posted = 0

    def own(self, count: int, size: int, dtype: DTypeLike) -> list[list[Vector]]:
        return [[self.vectors.zeros(size, dtype) for _ in range(count)]]

    def common(self, size: int, dtype: DTypeLike) -> Vector:
        vector: Vector = self.vectors.zeros(size, dtype)
        return vector

    def barrier(self) -> None:
        pass

    def post(self, count: int) -> None:
        self._posted = count

    def posted(self) -> int:
        return self._posted


class SharedMemory:
    """One mapping for all ranks of a node; collective to make. It has no name once all have opened it: when they end,
    however they end, the memory is free again.

    Args:
        comm: the ranks of the node.
        own_bytes: all that this rank will allocate by `own`.
        common_bytes: all that the ranks will allocate by `common`.

    Raises OSError, on all ranks of the node, if it cannot be had.
    """

    vectors = vectors

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
        """As Memory.barrier; the first rank calls `action` when all have come, before any of them goes on.

        Each rank writes a word of its own; the first rank waits for all of these and writes the word that releases the
        others. Each word has a cache line for itself.
        """
        self._epoch += 1
        words = self._words
        if self.rank:
            words[(1 + self.rank) * APART] = self._epoch
            until(self._reached(0))
            return
        for rank in range(1, self.ranks):
            until(self._reached((1 + rank) * APART))
        if action:
            action()
        words[0] = self._epoch

    def post(self, count: int) -> None:
        self._words[(1 + self.ranks + self.rank) * APART] = count

    def posted(self) -> int:
        return min(self._words[index * APART] for index in range(1 + self.ranks, 1 + 2 * self.ranks))

    def _reached(self, index: int) -> Callable[[], bool]:
        words, epoch = self._words, self._epoch
        return lambda: words[index] >= epoch

    def _vector(self, start: int, size: int, dtype: DTypeLike) -> Vector:
        return np.frombuffer(self._map, dtype, size, start)


class FencedMemory(SharedMemory):
    """Shared memory on processors that may reorder stores: a rank's word may be seen before what it wrote earlier."""

    def barrier(self, action: Callable[[], None] | None = None) -> None:
        wait([self.comm.Ibarrier()])
        if action:
            if self.rank == 0:
                action()
            wait([self.comm.Ibarrier()])

    def posted(self) -> int:
        """Nothing: only a barrier makes sure that what others wrote can be read."""
        return 0


def share(
    everyone: MPI.Intracomm, node: MPI.Intracomm, own_bytes: int, common_bytes: int, kind: str
) -> tuple[Memory, str | None]:
    """Memory for the ranks of `node`; collective over `everyone`, who all get the same kind.

    Args:
        own_bytes, common_bytes: as of SharedMemory.
        kind: "shared", "private", or "auto": shared if all nodes can, else private.

    Returns the memory; and if "auto" made it private, why it could not be shared.

    Raises ConfigError, on all ranks, if `kind` is "shared" and some node cannot.
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
        raise ConfigError(f"--memory shared: {problems[0]}; auto or private would work").on_all_ranks()
    return PrivateMemory(), f"{problems[0]}: each rank keeps its own copy of the model"


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _map(comm: MPI.Intracomm, total: int, start: int, length: int, common: int) -> mmap.mmap:
    """Map `total` bytes on all ranks of a node. Each claims its own part and its share of the first `common` bytes: if
    there is too little memory, that is an error now and not a crash later, and a page lies near the core that claimed
    it.
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
    """A file of `total` bytes that the node's first rank creates and all open.

    Yields its descriptor, or -1, and this rank's error, if there was one.
    """
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
    """Open the file at a path if its identity is `file`. Raises OSError if it is another file, which stays untouched.

    In containers each rank may have process numbers of its own: then the path /proc/PID/fd/N of one rank leads another
    rank to a file of its own, or of some other process.
    """
    place = os.open(path, os.O_PATH)  # opens nothing yet
    try:
        if _identity(place) != file:
            raise OSError(errno.ENXIO, "ranks cannot open each other's files")
        return os.open(f"/proc/self/fd/{place}", os.O_RDWR)
    finally:
        os.close(place)


def _identity(descriptor: int) -> tuple[int, int]:
    """The device and inode numbers of a file: no two files of a machine have the same."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _nameless() -> tuple[int, str]:
    """A file in memory that never has a name; the other ranks open it through this process."""
    if not hasattr(os, "memfd_create"):  # in Pythons built for an old C library
        raise OSError(errno.ENOSYS, "this Python has no os.memfd_create")
    descriptor = os.memfd_create("mpiml")
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"


def _named() -> tuple[int, str]:
    """A file in memory with a name, which is removed when all have opened it; for machines on which processes cannot
    open each other's files."""
    import tempfile

    for file in Path(SHM).glob(f"{NAME}*"):
        with contextlib.suppress(OSError):  # another user's, or already removed
            if time.time() - file.stat().st_mtime > LEFT_BEHIND:
                file.unlink()
    return tempfile.mkstemp(prefix=NAME, dir=SHM)

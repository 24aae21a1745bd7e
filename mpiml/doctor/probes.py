"""Rates and latencies of the machine, measured on the ranks of the job."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from mpi4py import MPI

from mpiml.team import quiet_barrier

GEMM = 768  # rows and columns: large enough for the BLAS library's full rate, small enough to be quick
COPY = 1 << 25  # bytes: more than a core's caches hold
PATIENCE = 0.05  # seconds for which a measurement is repeated
T = TypeVar("T")


def medians(measure: Callable[[], Sequence[float]], fewest: int = 5) -> list[float]:
    """Call `measure` once to warm up, then until PATIENCE is over and `fewest` times at least; returns the median of
    each of its figures."""
    measure()
    results: list[Sequence[float]] = []
    began = time.perf_counter()
    while len(results) < fewest or time.perf_counter() - began < PATIENCE:
        results.append(measure())
    return [statistics.median(figures) for figures in zip(*results, strict=True)]


def timed(action: Callable[[], object]) -> Callable[[], list[float]]:
    """A function that calls `action` and returns its seconds, as a list of one."""

    def measure() -> list[float]:
        began = time.perf_counter()
        action()
        return [time.perf_counter() - began]

    return measure


def gemm_rate(dtype: str = "float32", shape: tuple[int, int, int] = (GEMM, GEMM, GEMM)) -> float:
    """Floating-point operations per second of a product of matrices on this rank; `shape`: rows, inner, columns."""
    rng, (rows, inner, columns) = np.random.default_rng(0), shape
    a, b = (rng.random(size).astype(dtype) for size in ((rows, inner), (inner, columns)))
    out = np.empty((rows, columns), dtype)
    return 2.0 * rows * inner * columns / medians(timed(lambda: np.matmul(a, b, out=out)))[0]


def copy_rate() -> float:
    """Bytes per second that this rank reads and writes while it copies memory."""
    source, target = np.ones(COPY, np.uint8), np.zeros(COPY, np.uint8)
    return 2.0 * COPY / medians(timed(lambda: np.copyto(target, source)))[0]


def alone(comm: MPI.Intracomm, rank: int, probe: Callable[[], T]) -> T:
    """The result of a probe on one rank while the others rest; collective, known to all."""
    quiet_barrier(comm)
    result = probe() if comm.rank == rank else None
    quiet_barrier(comm)
    return comm.bcast(result, rank)  # type: ignore[no-any-return]


def at_once(comm: MPI.Intracomm, probe: Callable[[], T]) -> list[T]:
    """The result of a probe on each rank while all run it; collective, known to all."""
    comm.Barrier()
    return comm.allgather(probe())


def message_time(comm: MPI.Intracomm, one: int, other: int, size: int) -> float:
    """Seconds of a message of `size` bytes from one rank to another while the rest wait: half of the median time there
    and back. Collective, known to all."""
    quiet_barrier(comm)
    buffer = np.zeros(max(size, 1), np.uint8)[:size]
    first, second = (comm.Send, comm.Recv) if comm.rank == one else (comm.Recv, comm.Send)
    times = []
    if comm.rank in (one, other):
        partner = other if comm.rank == one else one
        for _ in range(50 if size < 1 << 20 else 10):
            began = time.perf_counter()
            first(buffer, partner)
            second(buffer, partner)
            times.append(time.perf_counter() - began)
    quiet_barrier(comm)
    return float(comm.bcast(statistics.median(times) / 2 if times else 0.0, one))


def allreduce_time(comm: MPI.Intracomm, size: int) -> float:
    """Seconds of an MPI_Allreduce of `size` bytes of float32 in place: the median over calls of the slowest rank's."""
    vector = np.zeros(max(size // 4, 1), np.float32)
    times = np.zeros(20 if size < 1 << 22 else 5)
    comm.Allreduce(MPI.IN_PLACE, vector)
    for index in range(len(times)):
        begin = time.perf_counter()
        comm.Allreduce(MPI.IN_PLACE, vector)
        times[index] = time.perf_counter() - begin
    comm.Allreduce(MPI.IN_PLACE, times, MPI.MAX)
    return float(statistics.median(times))


def seconds_since_start() -> float:
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")

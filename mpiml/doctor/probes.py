"""What the machine under a job can do: rates and latencies, each measured on the job's own ranks."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpiml.team import quiet_barrier

GEMM = 768  # rows and columns: large enough for the BLAS library's full rate, small enough for a blink
COPY = 1 << 25  # bytes: more than a core's caches hold
PATIENCE = 0.05  # seconds that a rate is measured for


def gemm_rate(dtype: str = "float32", shape: tuple[int, int, int] = (GEMM, GEMM, GEMM)) -> float:
    """Floating-point operations per second of a product of matrices on this rank; `shape`: rows, inner, columns."""
    rng, (rows, inner, columns) = np.random.default_rng(0), shape
    a, b = (rng.random(size).astype(dtype) for size in ((rows, inner), (inner, columns)))
    out = np.empty((rows, columns), dtype)
    return 2.0 * rows * inner * columns / typical(lambda: np.matmul(a, b, out=out))


def copy_rate() -> float:
    """Bytes per second that this rank reads and writes in copying memory."""
    source, target = np.ones(COPY, np.uint8), np.zeros(COPY, np.uint8)
    return 2.0 * COPY / typical(lambda: np.copyto(target, source))


def typical(action: Callable[[], object]) -> float:
    """The median time of a call, of as many as fit into PATIENCE, five at least."""
    action()
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < 5 or time.perf_counter() - began < PATIENCE:
        begin = time.perf_counter()
        action()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def alone(comm: MPI.Intracomm, rank: int, probe: Callable[[], float]) -> float:
    """What a probe finds on one rank while the others rest; collective, known to all."""
    quiet_barrier(comm)
    found = probe() if comm.rank == rank else 0.0
    quiet_barrier(comm)
    result: float = comm.bcast(found, rank)
    return result


def at_once(comm: MPI.Intracomm, probe: Callable[[], float]) -> list[float]:
    """What a probe finds on each rank while all of them run it; collective, known to all."""
    comm.Barrier()
    found: list[float] = comm.allgather(probe())
    return found


def message_time(comm: MPI.Intracomm, one: int, other: int, size: int) -> float:
    """Seconds that a message of `size` bytes takes from one rank to another, the others resting; known to all.

    Half of the median time there and back.
    """
    quiet_barrier(comm)
    found = 0.0
    buffer = np.zeros(max(size, 1), np.uint8)[:size]
    if comm.rank in (one, other):
        partner = other if comm.rank == one else one
        times = []
        for _ in range(50 if size < 1 << 20 else 10):
            begin = time.perf_counter()
            if comm.rank == one:
                comm.Send(buffer, partner)
                comm.Recv(buffer, partner)
            else:
                comm.Recv(buffer, partner)
                comm.Send(buffer, partner)
            times.append(time.perf_counter() - begin)
        found = statistics.median(times) / 2
    quiet_barrier(comm)
    result: float = comm.bcast(found, one)
    return result


def allreduce_time(comm: MPI.Intracomm, size: int) -> float:
    """Seconds of an MPI_Allreduce of `size` bytes of float32 in place: the median of the slowest rank's."""
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
    """The age of this process: asked at once after the imports, what they took."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")

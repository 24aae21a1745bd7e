"""The facts about a job: where its ranks run, with what software, and how fast they compute, copy and send."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from mpi4py import MPI

from mpiml.devices.choice import is_host
from mpiml.doctor import probes
from mpiml.doctor.devices import Devices, examine_devices
from mpiml.parallel.grid import nodes_of_ranks
from mpiml.run import environment, one_job
from mpiml.run.offsets import clock_offset

SIZES = (8, 1 << 16, 1 << 20, 1 << 24)  # bytes of the all-reduces
MESSAGE = 1 << 22  # bytes of the message that measures bandwidth


@dataclass
class Place:
    """Where one rank runs.

    Attributes:
        cores: the cores that it may use, of the `node_cores` that its node has.
        shared_memory: bytes that are free in /dev/shm.
        age: seconds from the start of its process until all was imported.
        software: versions that have to be the same on all ranks.
    """

    host: str
    cpu: str
    cores: list[int]
    node_cores: int
    blas: str
    shared_memory: int
    age: float
    software: dict[str, str]


@dataclass
class Facts:
    """All facts about a job. Rates are per second, by rank; times are seconds.

    Attributes:
        threads: whether MPI supports MPI_THREAD_MULTIPLE.
        node: for each rank, the first rank on its node.
        copy: bytes read and written by each rank while all copy.
        gemm_alone: floating-point operations of rank 0 while the others rest; `gemm`: of each while all compute.
        inside, between: latency and bytes per second of messages on a node and between two; None without such.
        allreduce: (bytes, seconds) of MPI_Allreduce.
        skew: by the first rank of a node, how far its clock is ahead of rank 0's.
        blas_threads: BLAS threads of a rank.
        launch: the error in the way the job was started; empty if there is none.
        devices: those that ranks take, if these are asked for.
    """

    mpi: str
    threads: bool
    node: list[int]
    places: list[Place]
    gemm_alone: float
    gemm: list[float]
    copy: list[float]
    allreduce: list[tuple[int, float]]
    inside: tuple[float, float] | None
    between: tuple[float, float] | None
    skew: dict[int, float]
    blas_threads: int = 1
    launch: str = ""
    devices: Devices | None = None

    def nodes(self) -> dict[int, list[int]]:
        """The ranks of each node, by its first rank."""
        nodes: dict[int, list[int]] = {}
        for rank, first in enumerate(self.node):
            nodes.setdefault(first, []).append(rank)
        return nodes

    def cores(self, ranks: Sequence[int]) -> set[int]:
        """The cores that any of these ranks, all on one node, may use."""
        return set[int]().union(*(self.places[rank].cores for rank in ranks))

    def crowded(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks, all on one node, have more threads than cores and must take turns."""
        return len(ranks) * self.blas_threads > len(self.cores(ranks))


def examine(
    comm: MPI.Intracomm, age: float, blas_threads: int, wrong: str, device: str = "auto", share: bool = False
) -> Facts:
    """Gather and measure all facts; collective, known to all ranks. `wrong`: see Facts.launch; `device`, `share`: as
    --device and --share-devices."""
    node = nodes_of_ranks(comm)
    firsts = sorted(set(node))
    neighbour = next((rank for rank in range(1, comm.size) if node[rank] == node[0]), None)
    return Facts(
        mpi=one_job.mpi_library(),
        threads=MPI.Query_thread() == MPI.THREAD_MULTIPLE,
        node=node,
        places=comm.allgather(_place(age)),
        gemm_alone=probes.alone(comm, 0, probes.gemm_rate),
        gemm=probes.at_once(comm, probes.gemm_rate),
        copy=probes.at_once(comm, probes.copy_rate),
        allreduce=[(size, probes.allreduce_time(comm, size)) for size in SIZES] if comm.size > 1 else [],
        skew=_skew(comm, firsts),
        inside=None if neighbour is None else _link(comm, neighbour),
        between=_link(comm, firsts[1]) if len(firsts) > 1 else None,
        blas_threads=blas_threads,
        launch=wrong,
        devices=None if is_host(device) else examine_devices(comm, node, device, share),
    )


def _skew(comm: MPI.Intracomm, firsts: Sequence[int]) -> dict[int, float]:
    offsets = comm.allgather(clock_offset(comm, firsts)[0])
    return {first: offsets[first] for first in firsts}


def _place(age: float) -> Place:
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    here = environment.of_rank(threads=0)
    cores, node_cores = sorted(os.sched_getaffinity(0)), os.cpu_count() or 1
    return Place(here["host"], here["cpu"], cores, node_cores, environment.blas(), free, age, one_job.software())


def _link(comm: MPI.Intracomm, other: int) -> tuple[float, float]:
    return probes.message_time(comm, 0, other, 8), MESSAGE / probes.message_time(comm, 0, other, MESSAGE)

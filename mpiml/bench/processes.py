"""Memory of a training process, and speed of its first small product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpiml.bench.models import on_arrays
from mpiml.bench.rows import Ratio
from mpiml.doctor.probes import gemm_rate
from mpiml.errors import ConfigError
from mpiml.nn.layers import Linear
from mpiml.team import quiet_barrier

WORLD = MPI.COMM_WORLD


def resident(field: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most; "Pss" now, of shared pages its share."""
    file = "smaps_rollup" if field == "Pss" else "status"
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"this kernel does not report {field} in /proc/self/{file}")


def memory(parameters: str) -> Ratio:
    """Resident memory of a node that trains with Adam, over one copy of values and state and a gradient a rank."""
    width = int(float(parameters) ** 0.5) // 16 * 16
    rng = np.random.default_rng(0)
    x, y = (rng.random((2 * WORLD.size, width), dtype=np.float32) for _ in range(2))
    before = resident("Pss")
    settings = {"batch": WORLD.size, "microbatches": WORLD.size, "optimizer": "adam", "loss": "mse"}
    trainer = on_arrays(WORLD, [Linear(width, width)], x, y, **settings)
    for _ in range(3):
        trainer.step()
    quiet_barrier(WORLD)
    used = np.array([resident("Pss") - before], np.float64)
    WORLD.Allreduce(MPI.IN_PLACE, used)
    needed = 4.0 * (width * width + width) * (3 + WORLD.size)
    return Ratio.of([float(used[0] / needed)])


def small_product(rows: str, inner: str, columns: str) -> Ratio:
    """Rate of a small product of matrices in a fresh process over its rate after a large one."""
    shape = int(rows), int(inner), int(columns)
    fresh = gemm_rate(shape=shape)
    gemm_rate()
    return Ratio.of([fresh / gemm_rate(shape=shape)])

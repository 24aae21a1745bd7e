"""The benchmark's measurements: each is a function for some ranks, of which rank 0 prints the result as JSON.

`python -m mpiml.bench.measurements NAME ARGUMENTS...`, under mpirun where more than one rank is meant.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpiml.bench.byhand import Perceptron
from mpiml.bench.formats import from_file
from mpiml.bench.layers import torch_memory, torch_step
from mpiml.bench.measure import Ratio, times
from mpiml.bench.models import (
    MOMENTUM,
    RATE,
    Trainer,
    images,
    on_arrays,
    perceptron,
    perceptron_operations,
    repeats,
    tower,
)
from mpiml.clock import Clock
from mpiml.doctor.probes import gemm_rate
from mpiml.nn.layers import Linear
from mpiml.nn.optimizers import SGD, Optimizer
from mpiml.nn.parameters import Layout, Parameter, constant
from mpiml.parallel import grid as grids
from mpiml.parallel.gradient_sum import OrderedSum
from mpiml.parallel.memory import SharedMemory, share
from mpiml.parallel.update import Update
from mpiml.parallel.values import Values
from mpiml.run.process import prepare_process
from mpiml.team import Team, quiet_barrier, share_cores
from mpiml.vectors import PIECE, Operands, bytes_of

WORLD = MPI.COMM_WORLD


def widths(text: str) -> list[int]:
    """Hidden widths, written 256-256."""
    return [int(width) for width in text.split("-")]


def by_hand(hidden: str, batch: str, microbatches: str, optimizer: str) -> Ratio:
    """Time of one rank's step over that of the same arithmetic by hand."""
    rows, parts = int(batch), int(microbatches)
    trainer = perceptron(MPI.COMM_SELF, widths(hidden), rows, parts, optimizer)
    hand = Perceptron([784, *widths(hidden), 10])
    x, y = images()
    orders = itertools.cycle(np.split(np.random.default_rng(1).permutation(len(x)), len(x) // rows))

    def step() -> None:
        pieces = [(x[part], y[part]) for part in np.array_split(next(orders), parts)]
        hand.step(pieces, RATE, MOMENTUM if optimizer == "momentum" else 0.0)

    count = repeats(perceptron_operations(widths(hidden), rows))
    mine, other = times(WORLD, [trainer.step, step], [count, count])
    return Ratio.of(mine, other)


def page_faults(hidden: str, batch: str) -> Ratio:
    """Page faults of a step, after some steps."""
    trainer = perceptron(WORLD, widths(hidden), int(batch), WORLD.size)
    counts = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            trainer.step()
        counts.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
    return Ratio.of(counts[2:], [1.0] * 4)


def traced(hidden: str, batch: str, microbatches: str) -> Ratio:
    """Time of one rank's step of which a timeline is kept over that of one without."""
    size = widths(hidden), int(batch), int(microbatches)
    noted, plain = (perceptron(MPI.COMM_SELF, *size, trace=path) for path in ("timeline.json", None))
    count = repeats(perceptron_operations(*size[:2]))
    mine, other = times(WORLD, [noted.step, plain.step], [count, count])
    return Ratio.of(mine, other)


class Copy(Optimizer):
    """The sum itself as the new value, which makes an update a bare all-reduce."""

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        np.copyto(on.value, on.total)


def ordered(size: int, memory_kind: str, optimizer: Optimizer) -> tuple[OrderedSum, Update]:
    """The ordered sum of one vector of `size` float32, one micro-batch per rank, and its update."""
    layout = Layout([Parameter((size,), constant(0.0))], np.float32)
    grid = grids.build(Team(WORLD, Clock()), 1)
    each = bytes_of(layout.size, layout.dtype)
    memory, problem = share(grid.comm, grid.local, each, each, memory_kind)
    if problem:
        raise SystemExit(problem)
    sum_ = OrderedSum(Values(grid.data, memory, layout.size, layout.blocks(), layout.dtype), WORLD.size)
    sum_.slots[0][:] = WORLD.rank
    return sum_, Update(grid.team, grid.replica, sum_, optimizer, 0.0, lambda step: WORLD.size)


def allreduce(megabytes: str, what: str, memory_kind: str) -> Ratio:
    """Time of the ordered sum over that of MPI_Allreduce; `what`: "bare", or "update" with SGD on both sides."""
    size = int(float(megabytes) * 2**20 / 4)
    sum_, update = ordered(size, memory_kind, SGD() if what == "update" else Copy())
    other = Everywhere(size, SGD() if what == "update" else None)

    count = max(4, min(200, int(64 / float(megabytes))))
    ours, theirs = times(WORLD, [lambda: one_step(sum_, update), other.step], [count, count])
    return Ratio.of(ours, theirs)


def bandwidth(megabytes: str, what: str) -> Ratio:
    """Rate at which a sum moves what it must over that of all ranks copying at once.

    The "sum" alone reads a vector per rank and writes one; with an "update" by SGD, the values are read as well.
    """
    size = int(float(megabytes) * 2**20 / 4)
    sum_, update = ordered(size, "shared", SGD())
    source, target = np.ones(size, np.float32), np.zeros(size, np.float32)
    values = [sum_.values.vector[piece.start : piece.stop] for piece in sum_.values.pieces]

    def add() -> None:
        for index, value in enumerate(values):
            sum_.total(index, value)

    action, moved = (add, WORLD.size + 1) if what == "sum" else (lambda: one_step(sum_, update), WORLD.size + 2)
    mine, copying = times(WORLD, [action, lambda: np.copyto(target, source)], [8, 8])
    return Ratio.of(copying, mine, moved / (2 * WORLD.size))


def one_step(sum_: OrderedSum, update: Update) -> None:
    """Sum and update, with the barrier that a step's record needs anyway."""
    sum_.values.memory.barrier()
    update.step(0.0, 1.0, 1, False)


class Everywhere:
    """The usual way: MPI_Allreduce of the whole gradient, then the same update, if any, on every rank in pieces."""

    def __init__(self, size: int, optimizer: Optimizer | None):
        self.optimizer = optimizer
        values, self.gradient = np.zeros(size, np.float32), np.zeros(size, np.float32)
        grad, spare = np.empty((2, PIECE), np.float32)
        self.pieces = []
        for start in range(0, size, PIECE):
            value, total = values[start : start + PIECE], self.gradient[start : start + PIECE]
            self.pieces.append(Operands(value, [], (grad[: len(value)], spare[: len(value)]), total, False))

    def step(self) -> None:
        """Sum, divide, update."""
        WORLD.Allreduce(MPI.IN_PLACE, self.gradient)
        if self.optimizer is None:
            return
        for piece in self.pieces:
            self.optimizer.update(piece, 1.0, 0.0, 1)


def torch_ddp(hidden: str, rows: str) -> Ratio:
    """Samples/s over PyTorch's DistributedDataParallel; `rows` per rank."""
    from mpiml.bench.torch_distributed import DataParallel

    trainer = perceptron(WORLD, widths(hidden), int(rows) * WORLD.size, WORLD.size)
    peer = DataParallel(WORLD, widths(hidden), int(rows))
    count = repeats(perceptron_operations(widths(hidden), int(rows)))
    mine, other = times(WORLD, [trainer.step, peer.step], [count, count])
    return Ratio.of(other, mine)


def torch_pipeline(width: str, batch: str) -> Ratio:
    """Samples/s of a pipeline over PyTorch's."""
    from mpiml.bench.torch_distributed import Pipeline

    trainer = tower(WORLD, int(width), int(batch), 8, WORLD.size)
    peer = Pipeline(WORLD, int(width), int(batch), 8)
    count = repeats(24.0 * int(batch) * int(width) ** 2)
    mine, other = times(WORLD, [trainer.step, peer.step], [count, count])
    return Ratio.of(other, mine)


def pipeline(width: str, batch: str, microbatches: str) -> Ratio:
    """Throughput of S stages over that of one rank x S x (1 - bubble), with bubble (S - 1) / (M + S - 1)."""
    stages, parts = WORLD.size, int(microbatches)
    whole = tower(WORLD, int(width), int(batch), parts, stages)
    alone = tower(MPI.COMM_SELF, int(width), int(batch), parts, 1) if WORLD.rank == 0 else None
    count = repeats(48.0 * int(batch) * int(width) ** 2)
    both = times(WORLD, [whole.step, alone.step if alone else None], [count, count])
    ideal = stages * (1 - (stages - 1) / (parts + stages - 1))
    return Ratio.of(both[1], both[0], 1 / ideal)


def weak_scaling(hidden: str, rows: str, how: str) -> Ratio:
    """Time of one rank alone over that of all ranks with as many rows each.

    They train "together", or each by itself but that they meet after every step ("apart"): what they lose then, they
    lose to the machine, which lets now one rank wait and now another.
    """
    comm = WORLD if how == "together" else MPI.COMM_SELF
    everyone = perceptron(comm, widths(hidden), int(rows) * comm.size, comm.size)
    alone = solo(hidden, rows, "1", "momentum")
    share_cores(WORLD.size, len(os.sched_getaffinity(0)))
    meeting = SharedMemory(WORLD, 0, 0)

    def step() -> None:
        everyone.step()
        if how == "apart":
            meeting.barrier()

    count = repeats(perceptron_operations(widths(hidden), int(rows)))
    together, single = times(WORLD, [step, alone.step if alone else None], [count, count])
    return Ratio.of(single, together)


def oversubscribed(hidden: str, batch: str, microbatches: str) -> Ratio:
    """Samples/s of more ranks than cores over that of one rank with as many micro-batches."""
    everyone = perceptron(WORLD, widths(hidden), int(batch), int(microbatches), "sgd")
    alone = solo(hidden, batch, microbatches, "sgd")
    together, single = times(WORLD, [everyone.step, alone.step if alone else None], [50, 50])
    return Ratio.of(single, together)


def solo(hidden: str, batch: str, microbatches: str, optimizer: str) -> Trainer | None:
    """A trainer for rank 0 alone."""
    if WORLD.rank:
        return None
    return perceptron(MPI.COMM_SELF, widths(hidden), int(batch), int(microbatches), optimizer)


def memory(parameters: str) -> Ratio:
    """Resident memory of a node's model and Adam over one copy of values and state and a gradient per rank."""
    width = int(float(parameters) ** 0.5) // 16 * 16
    rng = np.random.default_rng(0)
    x, y = (rng.random((2 * WORLD.size, width), dtype=np.float32) for _ in range(2))
    before = resident()
    settings = {"batch": WORLD.size, "microbatches": WORLD.size, "optimizer": "adam", "loss": "mse"}
    trainer = on_arrays(WORLD, [Linear(width, width)], x, y, **settings)
    for _ in range(3):
        trainer.step()
    quiet_barrier(WORLD)
    used = np.array([resident() - before], np.float64)
    WORLD.Allreduce(MPI.IN_PLACE, used)
    needed = 4.0 * (width * width + width) * (3 + WORLD.size)
    return Ratio(*[float(used[0] / needed)] * 3)


def small_product(rows: str, inner: str, columns: str) -> Ratio:
    """Rate of a small product of matrices in a fresh process over its rate once a large one has been made."""
    shape = int(rows), int(inner), int(columns)
    fresh = gemm_rate(shape=shape)
    gemm_rate()
    return Ratio(*[fresh / gemm_rate(shape=shape)] * 3)


def resident() -> int:
    """Bytes in memory of this process; of what it shares with others, its part."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not tell the proportional set size")


MEASUREMENTS: list[Callable[..., Ratio]] = [
    by_hand,
    page_faults,
    traced,
    allreduce,
    bandwidth,
    torch_ddp,
    torch_pipeline,
    pipeline,
    weak_scaling,
    oversubscribed,
    memory,
    small_product,
    from_file,
    torch_step,
    torch_memory,
]


def main() -> None:
    """Measure one row."""
    prepare_process(1)
    named = {measurement.__name__: measurement for measurement in MEASUREMENTS}
    result = named[sys.argv[1]](*sys.argv[2:])
    quiet_barrier(WORLD)
    if WORLD.rank == 0:
        print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()

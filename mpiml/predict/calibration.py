"""The job that measures what a prediction needs: `mpirun -n RANKS python -m mpiml.predict.calibration FILE [settings]`.

Each piece of a training step is measured by itself on the package's own layers, sums and messages: on one rank while
the others rest, and on all of them at once. No step of the model that is to be predicted is timed.
"""

from __future__ import annotations

if __name__ == "__main__":
    from mpiml.run import start

    start.begin("mpiml.predict.calibration")
    start.start_mpi()

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import mpiml
from mpiml import vectors
from mpiml.clock import Clock
from mpiml.config import Config, parse
from mpiml.data.dataset import Batch, Dataset
from mpiml.doctor import probes
from mpiml.nn.base import Array, At, Layer
from mpiml.nn.layers import Linear
from mpiml.parallel.grid import nodes_of_ranks
from mpiml.predict.machine import Link, Machine, Pace
from mpiml.run import alarm, environment
from mpiml.run.directory import write_atomically
from mpiml.run.failure import Guard
from mpiml.run.process import prepare_process
from mpiml.team import Team, quiet_barrier
from mpiml.training.data import open_data
from mpiml.training.job import job_of, kind
from mpiml.training.run import Run, unsaved

SIZES = (8, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)  # bytes of messages
PATIENCE = 0.05  # seconds for a piece, of which there are some dozens
FEW = 7  # the fewest times that a piece is measured
MANY = 8  # micro-batches for each rank, beside one: what a micro-batch takes besides computing
EPOCH = 64  # steps of an epoch without arithmetic
STEPS = 200  # such steps that are timed, a fifth of them to warm up
Seconds = Callable[[], list[float]]  # of the parts of something, measured once
Measure = Callable[..., list[float]]


def typical(parts: Seconds, few: int) -> list[float]:
    """The median of each part, of as many measurements as fit into PATIENCE, and one for a part that ranks do
    together."""
    if few == 1:
        return parts()
    parts()
    found: list[list[float]] = []
    began = time.perf_counter()
    while len(found) < few or time.perf_counter() - began < PATIENCE:
        found.append(parts())
    return [statistics.median(column) for column in zip(*found, strict=True)]


def timed(action: Callable[[], object]) -> Seconds:
    """An action as something with one part."""

    def parts() -> list[float]:
        began = time.perf_counter()
        action()
        return [time.perf_counter() - began]

    return parts


class Pieces:
    """The pieces of a step of a run on one rank by itself.

    Args:
        layers: those that the run trains.
    """

    def __init__(self, run: Run, layers: Sequence[Layer]):
        self.run, self.layers = run, layers
        self._random = np.random.default_rng(0)

    def step(self, rows: int) -> Seconds:
        """Measures inputs, each layer forward, the loss, each layer backward, and sum and update, in this order: of
        `rows` random rows. One after the other as in training, for each finds in cache what the others leave there."""
        computation, split, dtype = self.run.stage.computation, self.run.data.shards.split, self.run.config.dtype
        gradients, transform = computation.gradients[0], self.run.data.shards.batches(1)[0].transform

        def parts() -> list[float]:
            chosen = self._random.integers(0, len(split), rows)
            batch = Batch(0, rows, split, lambda: chosen, dtype, transform)
            marks, backwards = [time.perf_counter()], []
            x = batch.x()
            marks.append(time.perf_counter())
            for layer in self.layers:
                y, backward = layer(x, At(True))
                x = np.ascontiguousarray(y, x.dtype)
                backwards.append(backward)
                marks.append(time.perf_counter())
            dy: Array | None = computation.objective(x, batch.y(), False)[1]
            marks.append(time.perf_counter())
            for backward in reversed(backwards):
                dx = backward(dy, gradients) if dy is not None else None
                dy = None if dx is None else np.ascontiguousarray(dx, dtype)
                marks.append(time.perf_counter())
            self.run.update.step(0.0, 1.0, 1, False)
            marks.append(time.perf_counter())
            return np.diff(marks).tolist()

        return parts

    def add(self) -> None:
        slots = self.run.stage.sum.slots
        vectors.add(slots[0], slots[1], out=slots[0])


def in_parts(found: Sequence[Sequence[float]], layers: int) -> dict[str, Any]:
    """What Pieces.step has measured for some numbers of rows, as curves; those of layers in the order of layers."""
    inputs, *middle, update = (list(curve) for curve in zip(*found, strict=True))
    forward, loss, backward = middle[:layers], middle[layers], middle[layers + 1 :]
    return {"inputs": inputs, "forward": forward, "loss": loss, "backward": backward[::-1], "update": update}


class Idle:
    """A run of next to nothing: what its steps take is not arithmetic."""

    def __init__(self, comm: MPI.Intracomm, config: Config, microbatches: int):
        x, layers = np.zeros((EPOCH * microbatches, 1), np.float32), [Linear(1, 1)]
        settings = Config(
            batch=microbatches, microbatches=microbatches, optimizer=config.optimizer, dtype=config.dtype, steps=STEPS
        )
        self.run = unsaved(comm, settings, Dataset.from_arrays(x, x, x, x), layers)
        self.pieces = Pieces(self.run, layers)

    def step(self) -> float:
        """The median time of a step; every rank does as many."""
        found = [self.run.step(step).seconds for step in range(1, STEPS + 1)]
        return statistics.median(found[STEPS // 5 :])


class Calibration:
    """All that is measured; collective over `comm`. Every measurement is done by `here` or by `everywhere`."""

    def __init__(self, comm: MPI.Intracomm, config: Config, data: Dataset):
        self.comm, self.config, self.data = comm, config, data
        self.nodes = nodes_of_ranks(comm)
        self.node = MPI.Intracomm(comm.Split(self.nodes[comm.rank]))
        self.job = job_of(config.replace(pipe=1, cuts=(), microbatches=2), 1, 1, data)
        self.layers = self.job.stages[0].layers
        self.rows = [1 << power for power in range((config.batch - 1).bit_length())] + [config.batch]

    def machine(self) -> Machine:
        """Measure."""
        comm, cores = self.comm, len(set[int]().union(*self.node.allgather(os.sched_getaffinity(0))))
        alone = self._pace(MPI.COMM_SELF, self._here)
        busy = self._pace(self.node, self._everywhere) if comm.size > 1 else alone
        other = next((rank for rank, node in enumerate(self.nodes) if node != self.nodes[0]), None)
        return Machine(
            mpiml=mpiml.__version__,
            cpu=environment.of_rank(self.config.threads)["cpu"],
            settings=self.config.to_toml(),
            layers=[f"{layer.path} {kind(layer)}" for layer in self.layers],
            rows=self.rows,
            cores=cores,
            ranks=self.node.size,
            alone=alone,
            busy=busy,
            inside=self._link(1) if self.nodes.count(self.nodes[0]) > 1 else None,
            between=None if other is None else self._link(other),
        )

    def _pace(self, comm: MPI.Intracomm, measure: Measure) -> Pace:
        """What the ranks of `comm` need if they compute by themselves, and meet as `comm` at every step."""
        config = self.config.replace(pipe=1, cuts=(), microbatches=2, bucket=0.0)
        run = unsaved(MPI.COMM_SELF, config, self.data, self.layers)
        own = Pieces(run, self.layers)
        curves = [measure(own.step(rows)) for rows in self.rows]
        parts = in_parts(curves, len(self.layers))
        add = measure(timed(own.add))[0]
        size = max(run.stage.sum.values.vector.size, 1)
        run.free()
        step, microbatch, fixed = self._overhead(comm, measure)
        return Pace(
            inputs=parts["inputs"],
            forward=parts["forward"],
            loss=parts["loss"],
            backward=parts["backward"],
            update=max(parts["update"][-1] - fixed, 0.0) / size,
            add=add / size,
            microbatch=microbatch,
            step=step,
        )

    def _overhead(self, comm: MPI.Intracomm, measure: Measure) -> tuple[float, float, float]:
        """Seconds of a step, of a micro-batch, and of an update, of a model without arithmetic."""
        one, many = (Idle(comm, self.config, count * comm.size) for count in (1, MANY))
        alone = Idle(MPI.COMM_SELF, self.config, 1)
        few, more = (measure(lambda idle=idle: [idle.step()], 1)[0] for idle in (one, many))
        *passes, update = measure(alone.pieces.step(1))
        for idle in (one, many, alone):
            idle.run.free()
        microbatch = (more - few) / (MANY - 1)
        return max(few - microbatch, 0.0), max(microbatch - sum(passes), 0.0), update

    def _here(self, parts: Seconds, few: int = FEW) -> list[float]:
        """Measured on rank 0 alone, known to all."""
        quiet_barrier(self.comm)
        found = typical(parts, few) if self.comm.rank == 0 else []
        quiet_barrier(self.comm)
        result: list[float] = self.comm.bcast(found)
        return result

    def _everywhere(self, parts: Seconds, few: int = FEW) -> list[float]:
        """Measured on all ranks at once: that of the slowest."""
        self.comm.Barrier()
        found: list[float] = np.max(self.comm.allgather(typical(parts, few)), axis=0).tolist()
        return found

    def _link(self, other: int) -> Link:
        return Link(SIZES, [probes.message_time(self.comm, 0, other, size) for size in SIZES])


def main() -> None:
    """Measure, and let rank 0 write what is found."""
    comm = MPI.COMM_WORLD
    team = Team(comm, Clock())
    with Guard(team, "mpiml.predict.calibration"):
        config = parse(sys.argv[2:])
        prepare_process(config.threads)
        data = open_data(config, team, None)
        machine = Calibration(comm, config, data).machine()
        if comm.rank == 0:
            write_atomically(Path(sys.argv[1]), machine.to_json())


if __name__ == "__main__":
    start.begun()
    alarm.off()  # what is measured may take long
    main()
    start.end(0)

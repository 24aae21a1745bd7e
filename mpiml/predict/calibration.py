"""The job that calibrates predictions: `mpirun -n RANKS python -m mpiml.predict.calibration FILE [settings]`.

Each piece of a training step is measured by itself, on the package's own layers, sums and messages: on one rank while
the others rest, and on all ranks at once. No step of the predicted model is timed.
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
from mpiml.config import Config, parse
from mpiml.data.batch import Batch
from mpiml.data.dataset import Dataset
from mpiml.devices import choice
from mpiml.doctor import probes
from mpiml.errors import ConfigError
from mpiml.nn.base import Array, At, Layer
from mpiml.nn.layers import Linear
from mpiml.parallel.grid import nodes_of_ranks
from mpiml.predict.machine import Link, Machine, Speeds
from mpiml.run import environment
from mpiml.run.directory import write_atomically
from mpiml.run.failure import run_job
from mpiml.run.process import prepare_process
from mpiml.team import Team
from mpiml.training.data import open_data
from mpiml.training.job import job_of, kind
from mpiml.training.run import Run, unsaved

if __name__ == "__main__":
    start.begun()

SIZES = (8, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)  # bytes of messages
FEW = 7  # the fewest times that a piece is measured
MANY = 8  # micro-batches for each rank, compared with one: the difference is the overhead of a micro-batch
EPOCH = 64  # steps of an epoch without arithmetic
STEPS = 200  # such steps to time, of which a fifth warm up
Times = Callable[[], list[float]]  # measures the parts of something
Measure = Callable[[Times], list[float]]  # calls that on one rank or on all


def repeated(times: Times) -> Times:
    """The medians of several calls."""
    return lambda: probes.medians(times, FEW)


class Pieces:
    """The pieces of a step of a run on one rank by itself; `layers` are those that it trains."""

    def __init__(self, run: Run, layers: Sequence[Layer]):
        self.run, self.layers = run, layers
        self._random = np.random.default_rng(0)

    def step(self, rows: int) -> Times:
        """Times, on random rows, of inputs, each layer forward, the loss, each layer backward, and sum and update: in
        this order as in training, because each piece runs on the caches that the one before leaves."""
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
            dy: Array | None = computation.objective(x, batch.y(), batch.w(), False, At(True))[1]
            marks.append(time.perf_counter())
            for backward in reversed(backwards):
                dx = backward(dy, gradients) if dy is not None else None
                dy = None if dx is None else np.ascontiguousarray(dx, dtype)
                marks.append(time.perf_counter())
            self.run.update.step(0.0, 1.0, 1, False)
            marks.append(time.perf_counter())
            return np.diff(marks).tolist()

        return parts


def curves_of(times: Sequence[Sequence[float]], layers: int) -> dict[str, Any]:
    """The times of Pieces.step for several numbers of rows as a curve for each piece, layers in their order."""
    inputs, *middle, update = (list(curve) for curve in zip(*times, strict=True))
    forward, loss, backward = middle[:layers], middle[layers], middle[layers + 1 :]
    return {"inputs": inputs, "forward": forward, "loss": loss, "backward": backward[::-1], "update": update}


class Idle(Pieces):
    """A run of a model of two parameters: its steps are all overhead."""

    def __init__(self, comm: MPI.Intracomm, like: Config, microbatches: int):
        x, layers = np.zeros((EPOCH * microbatches, 1), np.float32), [Linear(1, 1)]
        config = Config(batch=microbatches, microbatches=microbatches, steps=STEPS)
        config = config.replace(optimizer=like.optimizer, dtype=like.dtype)
        super().__init__(unsaved(comm, config, Dataset.from_arrays(x, x, x, x), layers), layers)

    def whole_step(self) -> list[float]:
        """The median time of a step; all ranks of its communicator call it together."""
        times = [self.run.step(step).seconds for step in range(1, STEPS + 1)]
        return [statistics.median(times[STEPS // 5 :])]


class Calibration:
    """All measurements of a machine; collective over `comm`."""

    def __init__(self, comm: MPI.Intracomm, config: Config, data: Dataset):
        together = {"average_every": 0, "workers": None, "average_from": 0, "outer_lr": 1.0, "outer_momentum": 0.0}
        self.comm, self.config, self.data = comm, config.replace(**together), data
        self.nodes = nodes_of_ranks(comm)
        self.node = MPI.Intracomm(comm.Split(self.nodes[comm.rank]))
        self.layers = job_of(self.config.replace(pipe=1, cuts=(), microbatches=2, leaf=1), 1, 1, data).stages[0].layers
        self.rows = [1 << power for power in range((config.batch - 1).bit_length())] + [config.batch]

    def machine(self) -> Machine:
        """Measure all."""
        cores = len(set[int]().union(*self.node.allgather(os.sched_getaffinity(0))))
        alone = self._speeds(MPI.COMM_SELF, self._here)
        busy = self._speeds(self.node, self._everywhere) if self.comm.size > 1 else alone
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

    def _speeds(self, comm: MPI.Intracomm, measure: Measure) -> Speeds:
        """The speeds of ranks that each compute a model of their own, and meet in `comm` at every step."""
        config = self.config.replace(pipe=1, cuts=(), microbatches=2, leaf=1, bucket=0.0)
        run = unsaved(MPI.COMM_SELF, config, self.data, self.layers)
        own = Pieces(run, self.layers)
        curves = curves_of([measure(repeated(own.step(rows))) for rows in self.rows], len(self.layers))
        one, other, *_ = run.stage.sum.slots
        (add,) = measure(repeated(probes.timed(lambda: np.add(one, other, out=one))))
        size = max(run.stage.sum.values.updated, 1)
        run.free()
        step, microbatch, fixed = self._overhead(comm, measure)
        update = max(curves["update"][-1] - fixed, 0.0) / size
        return Speeds(**curves | {"update": update, "add": add / size, "microbatch": microbatch, "step": step})

    def _overhead(self, comm: MPI.Intracomm, measure: Measure) -> tuple[float, float, float]:
        """Seconds of a step, of a micro-batch, and of an update, all without arithmetic."""
        one, many = (Idle(comm, self.config, count * comm.size) for count in (1, MANY))
        alone = Idle(MPI.COMM_SELF, self.config, 1)
        few, more = (measure(idle.whole_step)[0] for idle in (one, many))  # once: ranks of `comm` step together
        *passes, update = measure(repeated(alone.step(1)))
        for idle in (one, many, alone):
            idle.run.free()
        microbatch = (more - few) / (MANY - 1)
        return max(few - microbatch, 0.0), max(microbatch - sum(passes), 0.0), update

    def _here(self, times: Times) -> list[float]:
        """Called on rank 0 while the others rest; known to all."""
        return probes.alone(self.comm, 0, times)

    def _everywhere(self, times: Times) -> list[float]:
        """Called on all ranks at once: of each part the slowest rank's time, known to all."""
        slowest: list[float] = np.max(probes.at_once(self.comm, times), axis=0).tolist()
        return slowest

    def _link(self, other: int) -> Link:
        return Link(SIZES, [probes.message_time(self.comm, 0, other, size) for size in SIZES])


def calibrate(team: Team, path: Path, config: Config) -> None:
    """Measure; rank 0 writes the result to `path`. Collective."""
    if not choice.is_host(config.device):
        raise ConfigError(f"--device {config.device}: predictions are of processors; leave it out").on_all_ranks()
    prepare_process(config.threads)
    machine = Calibration(team.comm, config, open_data(config, team, None)).machine()
    if team.rank == 0:
        write_atomically(path, machine.to_json())


def main() -> int:
    """The job. Returns the exit code."""
    path, *settings = sys.argv[1:]
    return run_job("mpiml.predict.calibration", lambda team: calibrate(team, Path(path), parse(settings)))


if __name__ == "__main__":
    start.end(main())

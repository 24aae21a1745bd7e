"""The rows of the benchmark: each is a program for some ranks, that prints its measurement as JSON from rank 0.

`python -m mpiml.study.rows NAME ARGUMENTS...`, under mpirun where more than one rank is meant.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml import assemble
from mpiml.clock import Clock
from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.nn.layers import Layer
from mpiml.nn.models import mlp
from mpiml.nn.optimizers import SGD, Optimizer
from mpiml.nn.parameters import Layout, Parameter, constant
from mpiml.parallel import grid as grids
from mpiml.parallel.allreduce import OrderedSum
from mpiml.parallel.memory import PrivateMemory
from mpiml.parallel.update import Update
from mpiml.run.process import prepare_process
from mpiml.study.byhand import Perceptron
from mpiml.study.measure import Ratio, of_pairs, paired
from mpiml.vectors import PIECE, Vector

PAIRS = 9
RATE, MOMENTUM = 0.01, 0.9


def step(hidden: str, batch: str, microbatches: str, optimizer: str = "momentum") -> Ratio:
    """One rank's step against the same arithmetic by hand; `hidden` widths joined by dashes."""
    widths = [int(width) for width in hidden.split("-")]
    rows, parts = int(batch), int(microbatches)
    trainer = Trainer(widths, rows, parts, optimizer)
    hand = Perceptron([784, *widths, 10])
    x, y = trainer.x, trainer.y
    orders = itertools.cycle(np.split(np.random.default_rng(1).permutation(len(x)), len(x) // rows))

    def by_hand() -> None:
        pieces = [(x[part], y[part]) for part in np.array_split(next(orders), parts)]
        hand.step(pieces, RATE, MOMENTUM if optimizer == "momentum" else 0.0)

    return paired(trainer.step, by_hand, PAIRS, trainer.repeats)


class Trainer:
    """The package's own loop on a perceptron 784-hidden-10 and random images, without log and checkpoints."""

    def __init__(self, hidden: list[int], batch: int, microbatches: int, optimizer: str, pipe: int = 1):
        rng = np.random.default_rng(0)
        self.x = rng.random((8192, 784), dtype=np.float32)
        self.y = rng.integers(0, 10, 8192)
        data = Dataset.from_arrays(self.x, self.y, self.x[:256], self.y[:256])
        config = Config(
            batch=batch,
            microbatches=microbatches,
            optimizer=optimizer,
            lr=RATE,
            momentum=MOMENTUM,
            steps=10**9,
            pipe=pipe,
        )
        comm = MPI.COMM_WORLD
        config = assemble.resolve(config, len(self.x), True, comm.size // pipe)

        def model(shape: tuple[int, ...], outputs: int) -> list[Layer]:
            return mlp(shape, outputs, hidden)

        self.run = assemble.assemble(config, data, grids.build(comm, pipe), Clock(), model)
        self.number = 0
        operations = 6 * batch * sum(a * b for a, b in zip([784, *hidden], [*hidden, 10], strict=True))
        self.repeats = max(1, int(0.15 * 4e10 / operations))

    def step(self) -> None:
        """One step, as in mpiml.train."""
        self.number += 1
        run = self.run
        table = run.record(run.config.microbatches or 1)
        run.stage.train(self.number, run.shards.batches(self.number), table)
        record = run.agree(table, not run.update.finite, False)
        run.update.step(run.learning_rate(self.number), record.weight, self.number, False)


class Copy(Optimizer):
    """The sum itself as the new value, which makes an update a bare all-reduce."""

    def update(
        self, value: Vector, grad: Vector, spare: Vector, states: Sequence[Vector], rate: float, decay: bool, step: int
    ) -> None:
        np.copyto(value, grad)


def allreduce(megabytes: str, what: str) -> Ratio:
    """The ordered sum in private memory: "bare" against bare MPI_Allreduce, or "update", each with an SGD update."""
    comm = MPI.COMM_WORLD
    size = int(float(megabytes) * 2**20 / 4)
    layout = Layout([Parameter((size,), constant(0.0))], np.float32)
    ordered = OrderedSum(
        comm, PrivateMemory(), [1] * comm.size, comm.size, layout.size, layout.blocks(), np.dtype(np.float32)
    )
    ordered.slots[0][:] = comm.rank
    update = Update(comm, comm.rank, ordered, SGD() if what == "update" else Copy(), 0.0)
    everywhere = Everywhere(comm, size, SGD() if what == "update" else None)

    def mine() -> None:
        update.step(0.0, 1.0, 1, False)

    return together(comm, mine, everywhere.step, max(1, int(4 / float(megabytes))))


class Everywhere:
    """The usual way: MPI_Allreduce of the whole gradient, then the same update, if any, on every rank in pieces."""

    def __init__(self, comm: MPI.Intracomm, size: int, optimizer: Optimizer | None):
        self.comm, self.optimizer = comm, optimizer
        self.values, self.gradient = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self.states = [np.zeros(size, np.float32) for _ in (optimizer.states if optimizer else ())]
        self.scratch = np.empty((2, PIECE), np.float32)

    def step(self) -> None:
        """Sum, divide, update."""
        self.comm.Allreduce(MPI.IN_PLACE, self.gradient)
        if self.optimizer is None:
            return
        for start in range(0, len(self.values), PIECE):
            piece = slice(start, start + PIECE)
            value = self.values[piece]
            grad, spare = self.scratch[:, : len(value)]
            np.multiply(self.gradient[piece], 1.0, out=grad)
            states = [state[piece] for state in self.states]
            self.optimizer.update(value, grad, spare, states, 0.0, False, 1)


def together(comm: MPI.Intracomm, mine: Callable[[], None], other: Callable[[], None], repeats: int) -> Ratio:
    """As measure.paired, on all ranks at once: each takes part `repeats` times, the slowest rank's time counts."""
    times: list[tuple[float, float]] = []
    for pair in range(PAIRS + 1):
        both = []
        for action in (mine, other) if pair % 2 else (other, mine):
            comm.Barrier()
            begin = time.perf_counter()
            for _ in range(repeats):
                action()
            spent = np.array([(time.perf_counter() - begin) / repeats])
            comm.Allreduce(MPI.IN_PLACE, spent, MPI.MAX)
            both.append(float(spent[0]))
        if pair:
            times.append((both[0], both[1]) if pair % 2 else (both[1], both[0]))
    return of_pairs(times)


ROWS: dict[str, Callable[..., Any]] = {"step": step, "allreduce": allreduce}


def main() -> None:
    """Measure one row."""
    prepare_process(1)
    result = ROWS[sys.argv[1]](*sys.argv[2:])
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()

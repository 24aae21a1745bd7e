"""Gradient sums, with and without an update, and the step record, against MPI_Allreduce and copying memory."""

from __future__ import annotations

import math

import numpy as np
from mpi4py import MPI

from mpiml.bench.pairs import Action, milliseconds, ratio
from mpiml.bench.rows import Ratio
from mpiml.clock import Clock
from mpiml.errors import ConfigError
from mpiml.loop.sums import Sum
from mpiml.nn.optimizers import SGD, Optimizer
from mpiml.nn.parameters import Layout, Parameter, constant
from mpiml.parallel import grid as grids
from mpiml.parallel.gradient_sum import OrderedSum
from mpiml.parallel.memory import SharedMemory, share
from mpiml.parallel.record import Agreement, Record, Rows
from mpiml.parallel.update import Update
from mpiml.parallel.values import Values
from mpiml.partition import part
from mpiml.team import Team
from mpiml.vectors import PIECE, Operands, bytes_of

WORLD = MPI.COMM_WORLD


class Copy(Optimizer):
    """An optimizer that takes the sum itself as the new value: an update is then a bare all-reduce."""

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        np.copyto(on.value, on.total)


def ordered(size: int, memory_kind: str, optimizer: Optimizer) -> tuple[OrderedSum, Update]:
    """The ordered sum of one vector of `size` float32, one micro-batch per rank, and its update."""
    layout = Layout([Parameter((size,), constant(0.0))], np.float32)
    grid = grids.build(Team(WORLD, Clock()), 1)
    each = bytes_of(layout.size, layout.dtype)
    memory, problem = share(grid.comm, grid.local, each, each, memory_kind)
    if problem:
        raise ConfigError(problem)
    sum_ = OrderedSum(Values(grid.data, memory, layout.size, layout.blocks(), layout.dtype), WORLD.size)
    sum_.slots[0][:] = WORLD.rank
    return sum_, Update(grid.team, grid.replica, sum_, optimizer, 0.0, lambda step: WORLD.size)


def library_step(size: int, optimizer: Optimizer | None) -> Action:
    """The usual way: MPI_Allreduce of the whole gradient, then the whole update, if any, on every rank."""
    values, gradient = np.zeros((2, size), np.float32)
    grad, spare = np.empty((2, PIECE), np.float32)
    pieces = []
    for start in range(0, size, PIECE):
        value, total = values[start : start + PIECE], gradient[start : start + PIECE]
        pieces.append(Operands(value, [], (grad[: len(value)], spare[: len(value)]), total, False))

    def step() -> None:
        WORLD.Allreduce(MPI.IN_PLACE, gradient)
        if optimizer:
            for piece in pieces:
                optimizer.update(piece, 1.0, 0.0, 1)

    return step


def ordered_step(sum_: OrderedSum, update: Update) -> None:
    """Sum and update, after the barrier that the step record brings in training."""
    sum_.values.memory.barrier()
    update.step(0.0, 1.0, 1, False)


def allreduce(megabytes: str, what: str, memory_kind: str) -> Ratio:
    """Time of the ordered sum over that of MPI_Allreduce; `what`: "bare", or "update" with SGD on both sides."""
    size = int(float(megabytes) * 2**20 / 4)
    sum_, update = ordered(size, memory_kind, SGD() if what == "update" else Copy())
    other = library_step(size, SGD() if what == "update" else None)
    return ratio(WORLD, lambda: ordered_step(sum_, update), other, max(4, min(200, int(64 / float(megabytes)))))


def sum_by_hand(megabytes: str) -> Ratio:
    """Time of a sum in private memory by hand on two ranks over that of MPI_Allreduce: each rank gets the other's
    gradient of its half, adds it piece by piece to its own, and gets the other's half of the sum."""
    size = int(float(megabytes) * 2**20 / 4)
    gradient, total, reduced = np.zeros((3, size), np.float32)
    halves = slice(size // 2), slice(size // 2, size)
    other, (own, others) = 1 - WORLD.rank, halves[:: 1 - 2 * WORLD.rank]
    received = np.zeros(gradient[own].size, np.float32)

    def step() -> None:
        WORLD.Sendrecv(gradient[others], other, 0, received, other, 0)
        for start in range(0, received.size, PIECE):
            piece = slice(start, start + PIECE)
            np.add(gradient[own][piece], received[piece], out=total[own][piece])
        WORLD.Sendrecv(total[own], other, 0, total[others], other, 0)

    repeats = max(4, min(200, int(64 / float(megabytes))))
    return ratio(WORLD, step, lambda: WORLD.Allreduce(MPI.IN_PLACE, reduced), repeats)


def passes(megabytes: str) -> Ratio:
    """Time of an ordered sum in shared memory with SGD over that of its additions and updates alone: each rank passes
    over as many numbers of its own, piece by piece, and waits for nobody."""
    size = int(float(megabytes) * 2**20 / 4)
    sum_, update = ordered(size, "shared", SGD())
    gradients, values = np.zeros((WORLD.size, size // WORLD.size), np.float32), np.zeros(size // WORLD.size, np.float32)
    total, *scratch = np.empty((3, PIECE), np.float32)

    def alone() -> None:
        for start in range(0, values.size, PIECE):
            value, first, *others = (vector[start : start + PIECE] for vector in (values, *gradients))
            count = len(value)
            for other in others:
                first = np.add(first, other, out=total[:count])
            SGD().update(Operands(value, [], (scratch[0][:count], scratch[1][:count]), first, False), 1.0, 0.0, 1)

    return ratio(WORLD, lambda: ordered_step(sum_, update), alone, max(4, min(200, int(64 / float(megabytes)))))


def own_sum(megabytes: str, how: str) -> Ratio:
    """Time of a Sum over that of MPI_Allreduce in place, of one array on as many ranks; the first half of the ranks has
    the Sum, because it changes how its process allocates memory. `how`: "with copies" into the sum and out of it, or
    "without copies"."""
    half, size = WORLD.size // 2, int(float(megabytes) * 2**20 / 4)
    first = WORLD.rank < half
    comm, gradient = MPI.Intracomm(WORLD.Split(int(first), WORLD.rank)), np.zeros(size, np.float32)
    repeats = max(4, min(200, int(64 / float(megabytes))))
    if not first:
        return ratio(WORLD, None, lambda: comm.Allreduce(MPI.IN_PLACE, gradient), repeats)
    with Sum(comm, like=gradient, memory="shared") as total:
        copies, (m,) = how == "with copies", total.own

        def step() -> None:
            total.put(m, gradient if copies else None)
            total.sum(copy=copies)

        return ratio(WORLD, step, None, repeats)


def bandwidth(megabytes: str, what: str) -> Ratio:
    """Bytes per second that a sum must move over those of all ranks copying at once.

    The "sum" alone reads a vector for each rank and writes one; an "update" by SGD reads the values as well.
    """
    size = int(float(megabytes) * 2**20 / 4)
    sum_, update = ordered(size, "shared", SGD())
    source, target = np.ones(size, np.float32), np.zeros(size, np.float32)
    values = [sum_.values.vector[piece.start : piece.stop] for piece in sum_.values.pieces]

    def add() -> None:
        for index, value in enumerate(values):
            sum_.total(index, value)

    action, vectors = (add, WORLD.size + 1) if what == "sum" else (lambda: ordered_step(sum_, update), WORLD.size + 2)
    return ratio(WORLD, lambda: np.copyto(target, source), action, 8, vectors / (2 * WORLD.size))


def agreement(microbatches: int) -> tuple[Action, Rows]:
    """What a step does for its record, with a loss and a weight for each micro-batch; and this rank's rows of it."""
    grid, (first, last) = grids.build(Team(WORLD, Clock()), 1), part(WORLD.rank, WORLD.size, microbatches)
    memory = SharedMemory(grid.node, 0, Agreement.bytes_needed(grid.node.size, WORLD.size, microbatches, 2))
    agree = Agreement(grid, memory, microbatches, 2)
    rows = np.random.default_rng(WORLD.rank).random((last - first, 2))

    def step() -> None:
        agree(rows)

    return step, rows


def record(microbatches: str) -> Ratio:
    """Time of the agreement on the step record over that of the same by MPI_Allreduce: of a table with a row for each
    micro-batch, and one for the two flags, whose columns every rank then adds up by math.fsum."""
    total = int(microbatches)
    agree, rows = agreement(total)
    (first, last), table = part(WORLD.rank, WORLD.size, total), np.zeros((total + 1, 2))

    def by_table() -> None:
        table[:] = 0
        table[first:last] = rows
        WORLD.Allreduce(MPI.IN_PLACE, table)
        broken, stop = table[-1].tolist()
        loss, weight = map(math.fsum, table[:-1].T.tolist())
        Record(loss, weight, [], bool(broken), bool(stop), None if math.isfinite(loss) else 0)

    return ratio(WORLD, agree, by_table, 500 if total < 1000 else 50)


def record_milliseconds(microbatches: str) -> Ratio:
    """Milliseconds of the agreement on the step record."""
    return milliseconds(WORLD, agreement(int(microbatches))[0], 100)

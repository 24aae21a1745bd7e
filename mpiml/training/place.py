"""Where the vectors of a stage lie in memory: its gradient sum, and the agreement on the step record."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mpiml.config import Config
from mpiml.nn.parameters import Gradients, Layout
from mpiml.parallel.gradient_sum import GradientSum, LibrarySum, OrderedSum
from mpiml.parallel.grid import Grid
from mpiml.parallel.memory import PrivateMemory, SharedMemory, share
from mpiml.parallel.record import Agreement, Record, agree
from mpiml.parallel.tree import depth
from mpiml.vectors import bytes_of

Agree = Callable[[NDArray[np.float64], bool, bool], Record]


def place(config: Config, grid: Grid, layout: Layout, columns: int) -> tuple[GradientSum, Agree, list[str]]:
    """The stage's gradient sum and the agreement on the step record, in the memory that `config` asks for.

    Collective. `columns` are those of the record's table. Also returns what there is to say.
    """
    microbatches = config.microbatches or 1
    sum_arguments = (microbatches, layout.size, layout.blocks(), layout.dtype)
    private = functools.partial(agree, grid.comm)
    if config.allreduce == "mpi":
        return LibrarySum(grid.data, PrivateMemory(), [1] * grid.replicas, *sum_arguments), private, []
    slots = depth(grid.replica, grid.replicas, microbatches)
    vector_bytes = bytes_of(layout.size, layout.dtype)
    memory, problem = share(grid.comm, grid.local, slots * vector_bytes, vector_bytes, config.memory)
    board_bytes = Agreement.bytes_needed(grid.node.size, microbatches, columns)
    board, also = share(grid.comm, grid.node, 0, board_bytes, "private" if problem else config.memory)
    notes = [f"warning: {text}" for text in (problem, also) if text]
    nodes = [1] * grid.replicas if isinstance(memory, PrivateMemory) else grid.nodes
    bucket = math.ceil(config.bucket * 2**20 / layout.dtype.itemsize)
    sum_ = OrderedSum(grid.data, memory, nodes, *sum_arguments, bucket, grid.team.clock)
    if isinstance(board, SharedMemory):
        return sum_, Agreement(grid, board, microbatches, columns), notes
    return sum_, private, notes


def gradients(layout: Layout, sum_: GradientSum) -> list[Gradients]:
    """For each of this replica's micro-batches what its backward pass writes into; the sum watches the last."""
    of_slot = [Gradients(layout, slot) for slot in sum_.slots]
    *slots, last = sum_.plan.slots
    return [*(of_slot[slot] for slot in slots), Gradients(layout, sum_.slots[last], sum_.complete)]

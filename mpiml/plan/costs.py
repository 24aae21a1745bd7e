"""What a step of a job needs on any grid, from its settings alone: memory, and bytes that move; no MPI."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpiml.nn import optimizers
from mpiml.parallel.schedules import SCHEDULES
from mpiml.parallel.simulator import Simulation, simulate
from mpiml.parallel.slices import bounds, buckets, owned
from mpiml.parallel.tree import depth, partials, shift_reduce
from mpiml.training.job import Job
from mpiml.vectors import bytes_of

Bytes = NDArray[np.int64]  # of each replica of a stage
BACKWARD = 2.0  # times the operations of a forward pass: the gradients by the input, and by the parameters


@functools.cache
def node_partials(first: int, count: int, replicas: int, microbatches: int) -> tuple[int, int]:
    """The partial sums that `count` replicas of one memory are left with, and how many of them add up several."""
    ranges = [covers for replica in range(first, first + count) for covers in partials(replica, replicas, microbatches)]
    left = shift_reduce(ranges, microbatches)[1]
    return len(left), len(set(left) - set(ranges))


@functools.cache
def depths(replicas: int, microbatches: int) -> NDArray[np.int64]:
    """For each replica, the gradient vectors that it needs (mpiml.parallel.tree)."""
    return np.array([depth(replica, replicas, microbatches) for replica in range(replicas)])


@dataclass(frozen=True)
class Exchange:
    """The messages of a stage's gradient sum in a step (mpiml.parallel.exchange), by replica, in bytes.

    Attributes:
        slices: what it owns of a vector.
        gradients_out, gradients_in: partial sums that it sends and receives; values_out, values_in: new values.
        packed: buffers for sums that it makes only to send them.
        gradients_abroad, values_abroad: what of it goes to other nodes, as a mean over its group.
        messages: that it sends.
    """

    slices: Bytes
    gradients_out: Bytes
    gradients_in: Bytes
    values_out: Bytes
    values_in: Bytes
    packed: Bytes
    gradients_abroad: NDArray[np.float64]
    values_abroad: NDArray[np.float64]
    messages: NDArray[np.int64]

    @classmethod
    def without_messages(cls, slices: Bytes) -> Exchange:
        """Nothing but slices."""
        none, zero = (np.zeros((5, len(slices)), kind) for kind in (np.int64, np.float64))
        return cls(slices, none[0], none[1], none[2], none[3], none[4], zero[0], zero[1], np.zeros_like(slices))


def exchange(job: Job, stage: int) -> Exchange:
    """The messages of the canonical sum; nothing is sent with --allreduce mpi, where the library decides."""
    layout, replicas, groups = job.stages[stage].layout, job.replicas, job.groups(stage)
    item = layout.dtype.itemsize
    runs = _slices(job, stage) if job.config.allreduce == "ordered" else np.full((1, replicas), layout.size)
    slices, parts = runs.sum(axis=0) * item, (runs > 0).sum(axis=0)
    found = Exchange.without_messages(slices)
    if job.config.allreduce == "mpi":
        return found
    homes, owner = job.homes(stage), np.arange(replicas)
    left = [node_partials(sum(groups[:g]), groups[g], replicas, job.microbatches) for g in range(len(groups))]
    everyone, of_node = sum(count for count, _ in left), np.bincount(homes, slices)
    groups_of_node = np.bincount(homes[np.cumsum([0, *groups[:-1]])], minlength=len(of_node))
    all_lanes = {
        count: np.array([np.bincount(owner % count, amounts) for amounts in (slices, parts)], np.int64)
        for count in set(groups)
    }
    first = 0
    for count, (partial, added) in zip(groups, left, strict=True):
        mine = slice(first, first + count)
        lanes = all_lanes[count].copy()  # bytes, and parts, of others' slices that each rank speaks for
        for row, amounts in enumerate((slices, parts)):
            lanes[row] -= np.bincount(owner[mine] % count, amounts[mine], count).astype(np.int64)
        others = len(groups) - 1
        found.gradients_out[mine], found.values_in[mine] = partial * lanes[0], lanes[0]
        found.packed[mine], found.messages[mine] = added * lanes[0], partial * lanes[1] + others * parts[mine]
        found.gradients_in[mine] = (everyone - partial) * slices[mine]
        found.values_out[mine] = others * slices[mine]
        node = homes[first]
        found.gradients_abroad[mine] = partial * (slices.sum() - of_node[node]) / count
        found.values_abroad[mine] = slices[mine].sum() * (len(groups) - groups_of_node[node]) / count
        first += count
    return found


def _slices(job: Job, stage: int) -> NDArray[np.int64]:
    """Elements that each replica owns of each bucket: (buckets, replicas)."""
    layout, several = job.stages[stage].layout, len(job.groups(stage)) > 1
    bucket = math.ceil(job.config.bucket * 2**20 / layout.dtype.itemsize) if several else 0
    rows = []
    for run in buckets(layout.blocks(), bucket):
        limits = [bounds(mine) for mine in owned(run, job.replicas)]
        rows.append([stop - start for start, stop in limits])
    return np.array(rows, np.int64).reshape(-1, job.replicas)


@dataclass(frozen=True)
class Memory:
    """Bytes that the ranks of a stage hold, by replica; `values` for each rank, or for all on a node together."""

    values: int
    gradients: Bytes
    state: Bytes
    activations: Bytes
    messages: Bytes

    @property
    def own(self) -> Bytes:
        """What each rank holds besides the values."""
        return self.gradients + self.state + self.activations + self.messages


def memory(job: Job, stage: int, activations: float) -> Memory:
    """What a stage holds, if backward passes of a micro-batch need `activations` bytes for each of its rows."""
    layout, moved = job.stages[stage].layout, exchange(job, stage)
    vector = bytes_of(layout.size, layout.dtype)
    states = len(optimizers.build(job.config.optimizer, 0.0, 0.0).states)
    flights = np.array([in_flight(job, stage, job.passes(replica)) for replica in range(job.replicas)])
    return Memory(
        values=vector,
        gradients=depths(job.replicas, job.microbatches) * vector,
        state=states * moved.slices,
        activations=(flights * job.microbatch_rows * activations).astype(np.int64),
        messages=moved.gradients_in + moved.packed,
    )


def fullest_node(job: Job, memories: Sequence[Memory]) -> int:
    """The bytes that the fullest node holds."""
    held = np.zeros(job.nodes)
    for stage, found in enumerate(memories):
        homes = job.homes(stage)
        held += np.bincount(homes, found.own, minlength=job.nodes)
        copies = np.bincount(homes, minlength=job.nodes)
        held += found.values * (np.minimum(copies, 1) if job.shared else copies)
    return int(held.max())


def busiest_node(job: Job) -> float:
    """The bytes that the busiest node sends to others for the gradient sums."""
    sent = np.zeros(job.nodes)
    for stage in range(len(job.stages)):
        found = exchange(job, stage)
        sent += np.bincount(job.homes(stage), found.gradients_abroad + found.values_abroad, job.nodes)
    return float(sent.max())


def in_flight(job: Job, stage: int, passes: int) -> int:
    """The most micro-batches of a stage whose forward passes are done and whose backward passes are not."""
    return _in_flight(job.config.schedule, len(job.stages), stage, passes)


@functools.cache
def _in_flight(schedule: str, stages: int, stage: int, passes: int) -> int:
    now = most = 0
    for action in SCHEDULES[schedule](stages, stage, passes):
        now += 1 if action.kind == "F" else -1
        most = max(most, now)
    return most


def pipeline(job: Job) -> Simulation:
    """The step's passes on the replica with the most micro-batches, in units of time that are operations."""
    forward = [float(max(stage.flops, 1)) for stage in job.stages]
    passes = max(job.passes(replica) for replica in range(job.replicas))
    schedule = SCHEDULES[job.config.schedule]
    return simulate(schedule, len(job.stages), passes, forward, [BACKWARD * one for one in forward])


@dataclass(frozen=True)
class Boundary:
    """Messages between two stages in a step: bytes forward and back of all replicas, and the part between nodes."""

    forward: float
    backward: float
    abroad: float


def boundaries(job: Job) -> list[Boundary]:
    """What stages tell each other."""
    found = []
    rows = job.rows / job.steps_per_epoch
    for number, (stage, following) in enumerate(zip(job.stages, job.stages[1:], strict=False)):
        row = math.prod(stage.y_shape) * stage.layout.dtype.itemsize
        crossing = float(np.mean(job.homes(number) != job.homes(number + 1)))
        found.append(Boundary(rows * row, rows * row if following.learned else 0.0, crossing))
    return found


def record_bytes(job: Job) -> int:
    """Of the table that all nodes add up in a step, so that everyone knows loss and weight."""
    return 8 * (2 + job.microbatches * job.columns)

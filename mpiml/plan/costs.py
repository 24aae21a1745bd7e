"""The costs of a job's step on any grid, from its settings alone: memory, messages, passes of the pipeline; no MPI."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpiml.nn import base as nn
from mpiml.nn import optimizers
from mpiml.parallel.exact import DIGITS
from mpiml.parallel.schedules import SCHEDULES
from mpiml.parallel.simulator import Simulation, simulate
from mpiml.parallel.slices import bounds, buckets, elements, owned
from mpiml.parallel.tree import depth, partials, shift_reduce
from mpiml.training.job import Job
from mpiml.training.stages import StageDesign
from mpiml.vectors import bytes_of

# Bytes of the step record, which all nodes add up in every step: loss and weight; in logged steps the metric, too.
RECORD = 8 * (2 + 2 * DIGITS)

Counts = NDArray[np.int64]  # bytes or messages: a number for each replica of a stage, or for each node
BACKWARD = 2.0  # operations of a backward pass over those of a forward pass: gradients of inputs and of parameters


@functools.cache
def node_partials(first: int, count: int, replicas: int, microbatches: int) -> tuple[int, int]:
    """How many partial sums `count` replicas of one memory are left with, and how many of them have several sources."""
    ranges = [covers for replica in range(first, first + count) for covers in partials(replica, replicas, microbatches)]
    left = shift_reduce(ranges, microbatches)[1]
    return len(left), len(set(left) - set(ranges))


@functools.cache
def depths(replicas: int, microbatches: int) -> Counts:
    """For each replica, how many gradient vectors it needs (mpiml.parallel.tree)."""
    return np.array([depth(replica, replicas, microbatches) for replica in range(replicas)])


@dataclass(frozen=True)
class Traffic:
    """Messages of a stage's gradient sum in a step (mpiml.parallel.exchange); all in bytes but `messages`.

    Attributes:
        slices: by replica, what it owns of the vector.
        gradients_out, gradients_in: by replica, partial sums that it sends and receives.
        values_out: by replica, new values that it sends.
        packed: by replica, buffers for partial sums that it adds up only to send them.
        messages: by replica, how many it sends.
        gradients_abroad, values_abroad: by node of the job, what its replicas send to other nodes.
    """

    slices: Counts
    gradients_out: Counts
    gradients_in: Counts
    values_out: Counts
    packed: Counts
    messages: Counts
    gradients_abroad: Counts
    values_abroad: Counts


def traffic(job: Job, stage: int) -> Traffic:
    """The messages of the canonical sum; none with --allreduce mpi, where the library decides.

    mpiml.parallel.tree.plan lists every message of one replica: too many to list for thousands of replicas, which need
    their number alone. A test holds that both agree.
    """
    layout, replicas, item = job.stages[stage].layout, job.replicas, job.stages[stage].layout.dtype.itemsize
    if job.config.allreduce == "mpi":
        none, nobody = np.zeros(replicas, np.int64), np.zeros(job.nodes, np.int64)
        return Traffic(none + layout.updated * item, none, none, none, none, none, nobody, nobody)
    owned_elements = _slices(job, stage)
    slices, parts = owned_elements.sum(axis=0) * item, (owned_elements > 0).sum(axis=0)
    counts = np.array(job.groups(stage))  # replicas of each group that shares a memory
    firsts, others = np.cumsum(counts) - counts, len(counts) - 1
    left = [node_partials(*group, replicas, job.microbatches) for group in zip(firsts, counts, strict=True)]
    partial, added = np.repeat(np.array(left), counts, axis=0).T  # of each replica's group
    lane_bytes, lane_parts = _of_lanes(counts, slices), _of_lanes(counts, parts)

    def of_nodes(nodes: Counts, amounts: Counts) -> Counts:
        return np.bincount(nodes, amounts, job.nodes).astype(np.int64)

    homes = job.homes(stage)
    node_bytes = of_nodes(homes, slices)
    node_partial_sums, node_groups = (of_nodes(homes[firsts], each) for each in (partial[firsts], np.ones_like(firsts)))
    return Traffic(
        slices=slices,
        gradients_out=partial * lane_bytes,
        gradients_in=(partial[firsts].sum() - partial) * slices,
        values_out=others * slices,
        packed=added * lane_bytes,
        messages=partial * lane_parts + others * parts,
        gradients_abroad=node_partial_sums * (slices.sum() - node_bytes),
        values_abroad=node_bytes * (len(counts) - node_groups),
    )


def _of_lanes(counts: Counts, amounts: Counts) -> Counts:
    """For each replica, the sum of `amounts` over the replicas of other groups whose lane it is (parallel.tree.lanes):
    those whose number modulo the size of its group is its own number in the group."""
    owners = np.arange(len(amounts))
    sizes, firsts = np.repeat(counts, counts), np.repeat(np.cumsum(counts) - counts, counts)
    lanes = owners - firsts
    everyone = np.zeros_like(amounts)
    for size in set(counts.tolist()):
        alike = sizes == size
        everyone[alike] = np.bincount(owners % size, amounts, size)[lanes[alike]]
    everyone -= amounts[firsts + (lanes - firsts) % sizes]  # each lane has one replica of the group itself
    return everyone


def _slices(job: Job, stage: int) -> Counts:
    """Elements that each replica owns of each bucket: (buckets, replicas)."""
    layout, several = job.stages[stage].layout, len(job.groups(stage)) > 1
    bucket = elements(job.config.bucket, layout.dtype) if several else 0
    limits = [[bounds(blocks) for blocks in owned(run, job.replicas)] for run in buckets(layout.blocks(), bucket)]
    return np.diff(np.array(limits, np.int64).reshape(-1, job.replicas, 2))[..., 0]


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a stage's ranks hold: `values` for each rank, or for all on a node together; the others by replica.
    `in_flight`: of each replica, the most micro-batches in flight."""

    in_flight: Counts
    values: int
    gradients: Counts
    state: Counts
    activations: Counts
    messages: Counts

    @property
    def own(self) -> Counts:
        """Bytes that each rank holds besides the values."""
        return self.gradients + self.state + self.activations + self.messages


def stage_memory(job: Job, stage: int, row_bytes: float) -> StageMemory:
    """What a stage holds if it keeps `row_bytes` for each row of a micro-batch in flight."""
    layout, sums = job.stages[stage].layout, traffic(job, stage)
    values, vector = (bytes_of(size, layout.dtype) for size in (layout.size, layout.updated))
    states = len(optimizers.build(job.config.optimizer, 0.0, 0.0).states) + (job.config.ema > 0)
    passes = map(job.passes, range(job.replicas))
    flights = np.array([in_flight(job.config.schedule, len(job.stages), stage, count) for count in passes])
    return StageMemory(
        in_flight=flights,
        values=values,
        gradients=depths(job.replicas, job.microbatches) * vector,
        state=states * sums.slices,
        activations=(flights * job.microbatch_rows * row_bytes).astype(np.int64),
        messages=sums.gradients_in + sums.packed,
    )


def fullest_node(job: Job, memories: Sequence[StageMemory]) -> int:
    """The bytes that the fullest node holds."""
    held = np.zeros(job.nodes)
    for stage, memory in enumerate(memories):
        homes = job.homes(stage)
        held += np.bincount(homes, memory.own, minlength=job.nodes)
        copies = np.bincount(homes, minlength=job.nodes)
        held += memory.values * (np.minimum(copies, 1) if job.shared else copies)
    return int(held.max())


def busiest_node(job: Job) -> float:
    """The bytes that the busiest node sends to others for the gradient sums."""
    sums = [traffic(job, stage) for stage in range(len(job.stages))]
    return float(np.sum([stage.gradients_abroad + stage.values_abroad for stage in sums], axis=0).max())


@functools.cache
def in_flight(schedule: str, stages: int, stage: int, passes: int) -> int:
    """The most micro-batches of a stage whose forward passes are done and whose backward passes are not."""
    actions = SCHEDULES[schedule](stages, stage, passes)
    return max(itertools.accumulate((1 if action.kind == "F" else -1 for action in actions), initial=0))


def pipeline(job: Job) -> Simulation:
    """The passes of a step on the replica with the most micro-batches; the unit of time is an operation."""
    forward = [float(max(stage.flops, 1)) for stage in job.stages]
    passes = max(job.passes(replica) for replica in range(job.replicas))
    schedule = SCHEDULES[job.config.schedule]
    return simulate(schedule, len(job.stages), passes, forward, [max(backward(stage), 1) for stage in job.stages])


def backward(stage: StageDesign) -> float:
    """Operations of a stage's backward pass for a row: none for layers before the first that training changes."""
    flops = nn.stack_flops(stage.layers, stage.x_shape)
    changed = (index for index, layer in enumerate(stage.layers) if nn.updated([layer]))
    return BACKWARD * sum(flops[0 if stage.learned else next(changed, len(flops)) :])


@dataclass(frozen=True)
class Boundary:
    """Messages between a stage and the next: bytes of all replicas in a step, and the part that leaves its node."""

    forward: float
    backward: float
    abroad: float


def boundaries(job: Job) -> list[Boundary]:
    """The messages from each stage but the last to the next, and back."""
    edges = []
    rows = job.rows / job.steps_per_epoch
    for number, (stage, following) in enumerate(zip(job.stages, job.stages[1:], strict=False)):
        sent = rows * math.prod(stage.y_shape) * stage.layout.dtype.itemsize
        crossing = float(np.mean(job.homes(number) != job.homes(number + 1)))
        edges.append(Boundary(sent, sent if following.learned else 0.0, crossing))
    return edges

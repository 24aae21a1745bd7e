"""The messages of a job's sums on any grid: of gradients in every step, and of workers' averages; no MPI."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from mpiml.nn import optimizers
from mpiml.nn.parameters import Layout
from mpiml.parallel.exact import DIGITS
from mpiml.parallel.slices import bounds, buckets, elements, owned
from mpiml.parallel.tree import depth, partials, shift_reduce
from mpiml.training.job import Job, sharers
from mpiml.vectors import Block, bytes_of, padded

# Bytes of the step record, which all nodes add up in every step: loss and weight; in logged steps the metric, too.
RECORD = 8 * (2 + 2 * DIGITS)

Counts = NDArray[np.int64]  # bytes or messages: a number for each replica of a stage, or for each node


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
    """Messages of one sum over replicas (mpiml.parallel.exchange); all in bytes but `messages`.

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

    @classmethod
    def none(cls, replicas: int, nodes: int) -> Traffic:
        """No messages."""
        return cls(*np.zeros((6, replicas), np.int64), *np.zeros((2, nodes), np.int64))

    def add(self, other: Traffic, replicas: slice) -> None:
        """Have the messages of a sum over some of the replicas, too."""
        for field in fields(self):
            of_nodes = field.name.endswith("abroad")
            getattr(self, field.name)[slice(None) if of_nodes else replicas] += getattr(other, field.name)


def traffic(job: Job, stage: int) -> Traffic:
    """The messages of the canonical sums of a stage's gradients in a step; none with --allreduce mpi, where the library
    decides."""
    layout, everything = job.stages[stage].layout, Traffic.none(job.replicas, job.nodes)
    item = layout.dtype.itemsize
    if job.config.allreduce == "mpi" or job.members == 1:
        everything.slices[:] = layout.updated * item if job.config.allreduce == "mpi" else _of_one(layout) * item
        return everything
    runs = [owned(run, job.members) for run in _buckets(job, stage)]
    limits = np.array([[bounds(blocks) for blocks in run] for run in runs], np.int64).reshape(-1, job.members, 2)
    for group, homes in enumerate(job.group_homes(stage)):
        part = _traffic(np.diff(limits)[..., 0], item, homes, job.nodes, job.shared, job.worker_microbatches)
        everything.add(part, slice(group * job.members, (group + 1) * job.members))
    return everything


def _traffic(
    owned_elements: Counts, item: int, homes: Counts, all_nodes: int, shared: bool, contributions: int
) -> Traffic:
    """The messages of a sum.

    mpiml.parallel.tree.plan lists every message of one replica: too many to list for thousands of replicas, which need
    their number alone. A test holds that both agree.

    Args:
        owned_elements: what each replica owns of each bucket: (buckets, replicas); `item` bytes each.
        homes: the node of each replica, of `all_nodes`; shared: whether those of a node have one memory.
        contributions: of all replicas together.
    """
    replicas = len(homes)
    slices, parts = owned_elements.sum(axis=0) * item, (owned_elements > 0).sum(axis=0)
    counts = np.array(sharers(homes, shared))  # replicas of each group that shares a memory
    firsts, others = np.cumsum(counts) - counts, len(counts) - 1
    left = [node_partials(*group, replicas, contributions) for group in zip(firsts, counts, strict=True)]
    partial, added = np.repeat(np.array(left), counts, axis=0).T  # of each replica's group
    lane_bytes, lane_parts = _of_lanes(counts, slices), _of_lanes(counts, parts)

    def of_nodes(nodes: Counts, amounts: Counts) -> Counts:
        return np.bincount(nodes, amounts, all_nodes).astype(np.int64)

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


def _buckets(job: Job, stage: int) -> list[Sequence[Block]]:
    """The runs of blocks that are exchanged at once."""
    layout = job.stages[stage].layout
    several = any(len(sharers(homes, job.shared)) > 1 for homes in job.group_homes(stage))
    return buckets(layout.blocks(), elements(job.config.bucket, layout.dtype) if several else 0)


def _of_one(layout: Layout) -> int:
    """The elements of a vector that one replica alone owns, from its first block to its last."""
    start, stop = bounds(layout.blocks())
    return stop - start


@dataclass(frozen=True)
class Averaging:
    """The average over the workers of a stage (mpiml.parallel.average).

    Attributes:
        mean: the messages of the mean of a vector.
        memory: by replica, bytes of its slots, of the buffers of its messages, and of its part of the values at the
            round's start and of the velocity.
        vector, sharers: by replica, bytes of the mean, and how many replicas have it together.
    """

    mean: Traffic
    memory: Counts
    vector: Counts
    sharers: Counts


def averaging(job: Job, stage: int) -> Averaging:
    """What the average takes that workers have at the end of a round."""
    layout, shared, homes = job.stages[stage].layout, job.config.memory != "private", job.group_homes(stage)
    mean, (slots, vector, having) = Traffic.none(job.replicas, job.nodes), np.zeros((3, job.replicas), np.int64)
    workers = job.config.workers or 1
    for member, blocks in enumerate(_held(job, stage)):
        lane = slice(member, None, job.members)  # the replicas that hold this part of the vector for other workers
        parts = [bounds(run) for run in owned(blocks, job.groups)] if blocks else [(0, 0)] * job.groups
        mean.add(_traffic(np.diff(parts).T, layout.dtype.itemsize, homes[:, member], job.nodes, shared, workers), lane)
        vector[lane] = bytes_of(padded(blocks[-1].stop, layout.dtype), layout.dtype) if blocks else 0
        slots[lane] = depths(job.groups, workers) * vector[lane]
        of_nodes = sharers(homes[:, member], shared)
        having[lane] = np.repeat(of_nodes, of_nodes)
    return Averaging(mean, slots + mean.gradients_in + mean.packed + (1 + outer(job)) * mean.slices, vector, having)


def _held(job: Job, stage: int) -> list[list[Block]]:
    """For each member of a group, the blocks of the parts that it holds, one after another."""
    alone = job.config.allreduce == "mpi"  # each holds everything
    held: list[list[Block]] = [[] for _ in range(job.members)]
    for run in _buckets(job, stage):
        for blocks, part in zip(held, [run] * job.members if alone else owned(run, job.members), strict=True):
            shift = (blocks[-1].stop if blocks else 0) - bounds(part)[0]
            blocks += [replace(block, start=block.start + shift, stop=block.stop + shift) for block in part]
    return held


def states(job: Job) -> int:
    """How many vectors are kept for each vector of values that is updated."""
    return len(optimizers.build(job.config.optimizer, 0.0, 0.0).states) + (job.config.ema > 0)


def outer(job: Job) -> bool:
    """Whether workers have an outer step, with a velocity."""
    return job.config.outer_step is not None


@dataclass(frozen=True)
class Sent:
    """Bytes that all ranks send; and by node of the job, what they send to other nodes."""

    total: int
    abroad: Counts

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.total + other.total, self.abroad + other.abroad)

    def times(self, count: int) -> Sent:
        """The same several times."""
        return Sent(count * self.total, count * self.abroad)


def of_sums(job: Job) -> tuple[Sent, Sent]:
    """The partial sums and the values of a step's gradient sums."""
    return _sent([traffic(job, stage) for stage in range(len(job.stages))])


def of_averages(job: Job) -> tuple[Sent, Sent]:
    """What workers send at the end of a round for the averages of values, and of states. Means go to all ranks of a
    lane, those of values once more after an outer step, and then to all ranks of each worker."""
    partials, means = _sent([averaging(job, stage).mean for stage in range(len(job.stages))])
    values = partials + means.times(1 + outer(job)) + of_sums(job)[1]
    return values, (partials + means).times(states(job))


def _sent(sums: Sequence[Traffic]) -> tuple[Sent, Sent]:
    """The partial sums and the values of sums."""

    def of(what: str) -> Sent:
        amounts = [(getattr(one, f"{what}_out").sum(), getattr(one, f"{what}_abroad")) for one in sums]
        return Sent(int(sum(total for total, _ in amounts)), np.sum([abroad for _, abroad in amounts], axis=0))

    return of("gradients"), of("values")

"""The messages of a job's sums on any grid: of gradients in every step, and of workers' averages; no MPI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpiml.nn import optimizers
from mpiml.parallel.exact import DIGITS
from mpiml.parallel.slices import bounds, owned
from mpiml.plan.exchanges import Counts, Traffic, depths, direct, owned_runs, runs_of_buckets, traffic
from mpiml.training.job import Job, sharers
from mpiml.vectors import Block, bytes_of, padded

# Bytes of the step record, which all nodes add up in every step: loss and weight; in logged steps the metric, too.
RECORD = 8 * (2 + 2 * DIGITS)


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
        mean.add(direct(np.diff(parts).T, layout.dtype.itemsize, homes[:, member], job.nodes, shared, workers), lane)
        vector[lane] = bytes_of(padded(blocks[-1].stop, layout.dtype), layout.dtype) if blocks else 0
        slots[lane] = depths(job.groups, workers) * vector[lane]
        of_nodes = sharers(homes[:, member], shared)
        having[lane] = np.repeat(of_nodes, of_nodes)
    return Averaging(mean, slots + mean.gradients_in + mean.packed + (1 + outer(job)) * mean.slices, vector, having)


def _held(job: Job, stage: int) -> list[list[Block]]:
    """For each member of a group, the blocks of the parts that it holds, one after another."""
    alone = job.config.allreduce == "mpi"  # each holds everything
    held: list[list[Block]] = [[] for _ in range(job.members)]
    runs = [[run] * job.members for run in runs_of_buckets(job, stage)] if alone else owned_runs(job, stage)
    for run in runs:
        for blocks, part in zip(held, run, strict=True):
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
    """Bytes that all ranks send; and by node of the job, what they send to other nodes and receive from them."""

    total: int
    abroad: Counts
    received: Counts

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.total + other.total, self.abroad + other.abroad, self.received + other.received)

    def times(self, count: int) -> Sent:
        """The same several times."""
        return Sent(count * self.total, count * self.abroad, count * self.received)


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
        total = sum(getattr(one, f"{what}_out").sum() for one in sums)
        return Sent(int(total), *(sum(getattr(one, f"{what}_{way}") for one in sums) for way in ("abroad", "received")))

    return of("gradients"), of("values")

"""The time of a training step on any grid, put together from measured pieces (mpiml.predict.machine); no MPI.

A step is: the passes of a pipeline, by the simulator; the meeting of all ranks; the exchange of gradients between
nodes; the sum and the update of what each rank owns; the exchange of values. What overlaps in time of one rank is
counted once, and the slowest rank counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpiml.parallel.schedules import SCHEDULES
from mpiml.parallel.simulator import simulate
from mpiml.parallel.tree import partials
from mpiml.plan import costs
from mpiml.predict.machine import Link, Machine, Pace
from mpiml.training.job import Job


@dataclass(frozen=True)
class Step:
    """Seconds of a step: what a rank computes on average, what it waits for neighbours of its pipeline, what the ranks
    need for the step record and for messages of the sum, and for sum and update."""

    compute: float
    waiting: float
    communication: float
    update: float

    @property
    def seconds(self) -> float:
        return self.compute + self.waiting + self.communication + self.update


def step(job: Job, machine: Machine, network: Link) -> Step:
    """What a step takes if each thread has a core."""
    pace = machine.pace(min(job.ranks, job.node_ranks))
    forward, backward = passes(job, machine, pace)
    count = max(job.passes(replica) for replica in range(job.replicas))
    ways = [_way(job, machine, network, stage) for stage in range(len(job.stages) - 1)]
    run = simulate(SCHEDULES[job.config.schedule], len(job.stages), count, forward, backward, ways)
    compute = count * (sum(forward) + sum(backward)) / len(job.stages)
    adds = [_merges(job, count) * stage.layout.size * pace.add for stage in job.stages]
    exchanged, updated = zip(*(_sum(job, stage, pace, network) for stage in range(len(job.stages))), strict=True)
    meeting = pace.step + (_all_nodes(job, network, costs.record_bytes(job)) if job.nodes > 1 else 0.0)
    return Step(compute + max(adds), run.makespan - compute, meeting + max(exchanged), max(updated))


def passes(job: Job, machine: Machine, pace: Pace) -> tuple[list[float], list[float]]:
    """Seconds of a forward and of a backward pass of a micro-batch, of each stage."""
    rows = job.rows / job.steps_per_epoch / job.microbatches
    forward, backward = [], []
    for number, stage in enumerate(job.stages):
        numbers = range(stage.first, stage.first + len(stage.layers))
        ends = [pace.inputs] * (number == 0) + [pace.loss] * (number == len(job.stages) - 1)
        there = sum(machine.seconds(curve, rows) for curve in [*ends, *(pace.forward[n] for n in numbers)])
        back = sum(machine.seconds(pace.backward[n], rows) for n in numbers)
        forward.append(there + pace.microbatch / 2)
        backward.append(back + pace.microbatch / 2)
    return forward, backward


def _merges(job: Job, count: int) -> int:
    """Additions of whole vectors that a replica makes of its own micro-batches."""
    return count - min(len(partials(replica, job.replicas, job.microbatches)) for replica in (0, job.replicas - 1))


def _way(job: Job, machine: Machine, network: Link, stage: int) -> float:
    """Seconds of a message from a stage to the next; those that leave a node at once share its link."""
    rows = job.rows / job.steps_per_epoch / job.microbatches
    size = rows * math.prod(job.stages[stage].y_shape) * job.stages[stage].layout.dtype.itemsize
    here, there = job.homes(stage), job.homes(stage + 1)
    leaving = np.bincount(here[here != there], minlength=1).max()
    if leaving:
        return network.time(size * leaving)
    return machine.inside.time(size) if machine.inside else 0.0


def _sum(job: Job, stage: int, pace: Pace, network: Link) -> tuple[float, float]:
    """Seconds of a stage's exchange between nodes, and of the sum and update of the rank with the largest part."""
    found, groups = costs.exchange(job, stage), job.groups(stage)
    layout = job.stages[stage].layout
    item = layout.dtype.itemsize
    if job.config.allreduce == "mpi":  # as a ring between nodes, at best
        nodes = len(set(job.homes(stage).tolist()))
        moved = 2 * layout.size * item * (nodes - 1) / nodes
        rounds = 2 * (nodes - 1) * network.latency
        return moved / network.bandwidth + rounds, layout.size * (pace.update + pace.add)
    own = partials(0, job.replicas, job.microbatches)
    sources = len(own) * groups[0] + len(groups) - 1
    largest = float(found.slices.max()) / item
    update = largest * pace.update + largest * (sources - 1) * pace.add
    update += float(found.packed.max()) / item * (groups[0] - 1) * pace.add
    gradients = np.bincount(job.homes(stage), found.gradients_abroad).max()
    values = np.bincount(job.homes(stage), found.values_abroad).max()
    each = float(found.messages.max()) * network.latency if len(groups) > 1 else 0.0
    return float(gradients + values) / network.bandwidth + each, update


def _all_nodes(job: Job, network: Link, size: float) -> float:
    """Seconds of an MPI_Allreduce of the nodes' first ranks, by recursive doubling: Thakur, Rabenseifner and Gropp,
    "Optimization of collective communication operations in MPICH", 2005."""
    return math.ceil(math.log2(job.nodes)) * network.time(size)

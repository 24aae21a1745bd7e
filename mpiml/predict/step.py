"""The predicted time of a training step on any grid, from measured pieces (mpiml.predict.machine); no MPI.

A step is: the passes of a pipeline, by the simulator; the step record; the exchange of gradients between nodes; the sum
and the update of what each rank owns; the exchange of values. The slowest rank counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpiml.parallel.schedules import SCHEDULES
from mpiml.parallel.simulator import simulate
from mpiml.parallel.tree import partials
from mpiml.plan import costs
from mpiml.predict.machine import Link, Machine, Speeds
from mpiml.training.job import Job


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: a rank's computing on average, its waiting for other stages, communication for the step record
    and the gradient sum, and sum and update."""

    compute: float
    waiting: float
    communication: float
    update: float

    @property
    def seconds(self) -> float:
        return self.compute + self.waiting + self.communication + self.update


def step_time(job: Job, machine: Machine, network: Link) -> StepTime:
    """The time of a step if each thread has a core; `network` is between nodes."""
    speeds = machine.speeds(min(job.ranks, job.node_ranks))
    forward, backward = passes(job, machine, speeds)
    count = max(job.passes(replica) for replica in range(job.replicas))
    sends = [_send(job, machine, network, stage) for stage in range(len(job.stages) - 1)]
    run = simulate(SCHEDULES[job.config.schedule], len(job.stages), count, forward, backward, sends)
    compute = count * (sum(forward) + sum(backward)) / len(job.stages)
    fewest = min(len(partials(replica, job.replicas, job.microbatches)) for replica in (0, job.replicas - 1))
    adds = [(count - fewest) * stage.layout.updated * speeds.add for stage in job.stages]  # of its own micro-batches
    exchanged, updated = zip(*(_sum(job, stage, speeds, network) for stage in range(len(job.stages))), strict=True)
    record = speeds.step + (_all_nodes(job, network, costs.RECORD) if job.nodes > 1 else 0.0)
    return StepTime(compute + max(adds), run.makespan - compute, record + max(exchanged), max(updated))


def passes(job: Job, machine: Machine, speeds: Speeds) -> tuple[list[float], list[float]]:
    """Seconds of a forward and of a backward pass of a micro-batch, for each stage."""
    rows = job.rows / job.steps_per_epoch / job.microbatches
    forward: list[float] = []
    backward: list[float] = []
    for number, stage in enumerate(job.stages):
        layers = slice(stage.first, stage.first + len(stage.layers))
        ends = [speeds.inputs] * (number == 0) + [speeds.loss] * (number == len(job.stages) - 1)
        for seconds, curves in ((forward, [*ends, *speeds.forward[layers]]), (backward, speeds.backward[layers])):
            seconds.append(sum(machine.seconds(curve, rows) for curve in curves) + speeds.microbatch / 2)
    return forward, backward


def _send(job: Job, machine: Machine, network: Link, stage: int) -> float:
    """Seconds of a message from a stage to the next; messages that leave a node at once share its link."""
    rows = job.rows / job.steps_per_epoch / job.microbatches
    size = rows * math.prod(job.stages[stage].y_shape) * job.stages[stage].layout.dtype.itemsize
    homes = job.homes(stage)
    leaving = np.bincount(homes[homes != job.homes(stage + 1)], minlength=1).max()
    if leaving:
        return network.time(size * leaving)
    return machine.inside.time(size) if machine.inside else 0.0


def _sum(job: Job, stage: int, speeds: Speeds, network: Link) -> tuple[float, float]:
    """Seconds of a stage's exchange between nodes, and of sum and update on the rank with the largest slice."""
    traffic, groups = costs.traffic(job, stage), job.groups(stage)
    layout = job.stages[stage].layout
    item = layout.dtype.itemsize
    if job.config.allreduce == "mpi":  # at best, a ring of nodes
        nodes = len(set(job.homes(stage).tolist()))
        sent = 2 * layout.updated * item * (nodes - 1) / nodes
        rounds = 2 * (nodes - 1) * network.latency
        return sent / network.bandwidth + rounds, layout.updated * (speeds.update + speeds.add)
    own = partials(0, job.replicas, job.microbatches)
    sources = len(own) * groups[0] + len(groups) - 1
    largest = float(traffic.slices.max()) / item
    update = largest * speeds.update + largest * (sources - 1) * speeds.add
    update += float(traffic.packed.max()) / item * (groups[0] - 1) * speeds.add
    sent = float(traffic.gradients_abroad.max() + traffic.values_abroad.max())
    latencies = float(traffic.messages.max()) * network.latency if len(groups) > 1 else 0.0
    return sent / network.bandwidth + latencies, update


def _all_nodes(job: Job, network: Link, size: float) -> float:
    """Seconds of an MPI_Allreduce over one rank of each node, by recursive doubling: Thakur, Rabenseifner and Gropp,
    "Optimization of collective communication operations in MPICH", 2005."""
    return math.ceil(math.log2(job.nodes)) * network.time(size)

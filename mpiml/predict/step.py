"""The predicted time of a training step on any grid, from measured pieces (mpiml.predict.machine); no MPI.

A step is: the passes of a pipeline, by the simulator (a backward pass in two parts has equal ones); the step record;
the exchange of gradients between nodes; the sum and the update of what each rank owns; the exchange of values. The
slowest rank counts. A rank with several workers does all this for one after the other, among the ranks of each; of the
average at the end of a round, a step has its part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpiml.parallel.schedules import SCHEDULES, of_stages
from mpiml.parallel.simulator import simulate
from mpiml.parallel.tree import partials
from mpiml.plan import sums
from mpiml.plan.exchanges import Traffic, halved, traffic
from mpiml.predict.machine import Link, Machine, Speeds
from mpiml.training.job import Job, sharers


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
    """The time of a step if each thread has a core; `network` is between nodes. Where there are workers, of one that
    they take apart."""
    speeds = machine.speeds(min(job.ranks, job.node_ranks))
    forward, backward = passes(job, machine, speeds)
    count = max(job.passes(replica) for replica in range(job.members))
    stages = range(len(job.stages))
    sends = [_send(job, machine, network, stage) for stage in stages[:-1]]
    schedule, weights = of_stages(SCHEDULES[job.config.schedule], job.splits), [seconds / 2 for seconds in backward]
    run = simulate(schedule, len(stages), count, forward, backward, sends, weights)
    compute = count * (sum(forward) + sum(backward)) / len(stages)
    ends = (0, job.members - 1)
    fewest = min(len(partials(replica, job.members, job.worker_leaves)) for replica in ends)
    adds = [(count - fewest) * stage.layout.summed * speeds.add for stage in job.stages]  # of its own micro-batches
    exchanged, updated = zip(*(_sum(job, stage, speeds, network) for stage in stages), strict=True)
    record = speeds.step + _all_nodes(_nodes(job), network, sums.RECORD)
    turns, averaged, mean = job.copies, 0.0, 0.0
    if job.config.workers:
        parts = zip(*(_average(job, stage, speeds, network) for stage in stages), strict=True)
        averaged, mean = (max(part) / job.config.average_every for part in parts)
    return StepTime(
        turns * (compute + max(adds)),
        turns * (run.makespan - compute),
        turns * (record + max(exchanged)) + averaged,
        turns * max(updated) + mean,
    )


def passes(job: Job, machine: Machine, speeds: Speeds) -> tuple[list[float], list[float]]:
    """Seconds of a forward and of a backward pass of a micro-batch, for each stage."""
    rows = job.rows / job.steps_per_epoch / job.microbatches
    forward: list[float] = []
    backward: list[float] = []
    for number, stage in enumerate(job.stages):
        layers = slice(stage.first, stage.first + len(stage.layers))
        ends = [speeds.inputs] * (number == 0) + [speeds.loss] * (number == len(job.stages) - 1)
        again = [of for of, layer in zip(speeds.forward[layers], stage.layers, strict=True) if layer.block is not None]
        of_passes = (forward, [*ends, *speeds.forward[layers]]), (backward, [*speeds.backward[layers], *again])
        for seconds, curves in of_passes:
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
    layout = job.stages[stage].layout
    if job.config.allreduce == "mpi":  # at best, a ring of nodes
        nodes = max(len(set(homes.tolist())) for homes in job.group_homes(stage))
        sent = 2 * layout.updated * layout.dtype.itemsize * (nodes - 1) / nodes
        rounds = 2 * (nodes - 1) * network.latency
        return sent / network.bandwidth + rounds, layout.updated * (speeds.update + speeds.add)
    own = partials(0, job.members, job.worker_leaves)
    groups = max((sharers(homes, job.shared) for homes in job.group_homes(stage)), key=len)
    messages, item = traffic(job, stage), layout.dtype.itemsize
    update = float(messages.slices.max()) / item * speeds.update
    if halved(job, stage):
        added = messages.packed.max() * (len(own) * groups[0] - 1) + messages.gradients_in.max()
        return _exchange(messages, network), update + float(added) / item * speeds.add
    return _exchange(messages, network), update + _added(messages, item, speeds.add, len(own), groups)


def _average(job: Job, stage: int, speeds: Speeds, network: Link) -> tuple[float, float]:
    """Seconds of the exchange between nodes at the end of a round, and of adding up, on the rank with the largest
    slice. Each copy is written to a slot and gets the mean, which takes as long as two additions."""
    averaging, item = sums.averaging(job, stage), job.stages[stage].layout.dtype.itemsize
    means, mean = 1 + sums.states(job), averaging.mean
    workers, shared = job.config.workers or 1, job.config.memory != "private"
    groups = max((sharers(homes, shared) for homes in job.group_homes(stage).T), key=len)
    copying = float(averaging.vector.max()) / item * 2 * job.copies * speeds.add
    adding = _added(mean, item, speeds.add, len(partials(0, job.groups, workers)), groups)
    own = float(averaging.vector.max()) / item * (job.copies - 1) * speeds.add
    step = traffic(job, stage)
    sent = mean.values_abroad * sums.outer(job) + step.values_abroad
    received = mean.values_received * sums.outer(job) + step.values_received
    exchanged = means * _exchange(mean, network) + float(max(sent.max(), received.max())) / network.bandwidth
    return exchanged, means * (copying + own + adding)


def _exchange(messages: Traffic, network: Link) -> float:
    """Seconds of the messages of a sum: the bytes of the node that sends or receives most, one after the other."""
    gradients = max(messages.gradients_abroad.max(), messages.gradients_received.max())
    values = max(messages.values_abroad.max(), messages.values_received.max())
    return float(gradients + values) / network.bandwidth + float(messages.messages.max()) * network.latency


def _added(messages: Traffic, item: int, add: float, own: int, groups: list[int]) -> float:
    """Seconds of adding up the slice of the rank with the largest: `own` partial sums of each rank that shares its
    memory, of `groups`, and one of each other memory."""
    largest = float(messages.slices.max()) / item
    sources = own * groups[0] + len(groups) - 1
    return add * (largest * (sources - 1) + float(messages.packed.max()) / item * (groups[0] - 1))


def _nodes(job: Job) -> int:
    """The most nodes that a worker's ranks are on, or all ranks."""
    homes = np.stack([job.group_homes(stage) for stage in range(len(job.stages))])  # (stages, groups, members)
    return max(len(np.unique(homes[:, group])) for group in range(job.groups))


def _all_nodes(nodes: int, network: Link, size: float) -> float:
    """Seconds of an MPI_Allreduce over one rank of each node, by recursive doubling: Thakur, Rabenseifner and Gropp,
    "Optimization of collective communication operations in MPICH", 2005."""
    return math.ceil(math.log2(nodes)) * network.time(size)

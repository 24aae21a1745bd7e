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
from mpiml.parallel.schedules import SCHEDULES
from mpiml.parallel.simulator import Simulation, simulate
from mpiml.plan.exchanges import Counts, depths, traffic
from mpiml.plan.saving import copies
from mpiml.plan.sums import averaging, states
from mpiml.training.job import Job, sharers
from mpiml.training.stages import StageDesign
from mpiml.vectors import bytes_of

BACKWARD = 2.0  # operations of a backward pass over those of a forward pass: gradients of inputs and of parameters


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a stage's ranks hold, by replica but for `values`.

    Attributes:
        in_flight: the most micro-batches in flight.
        values: of one copy of the model.
        average: what the average of workers takes.
        copies: of what is saved, so that training goes on meanwhile.
        common: a rank's share of what it has together with others: of the values of its copies, and of means.
    """

    in_flight: Counts
    values: int
    gradients: Counts
    state: Counts
    activations: Counts
    messages: Counts
    average: Counts
    copies: Counts
    common: NDArray[np.float64]

    @property
    def held(self) -> NDArray[np.float64]:
        """All that is a rank's, or its share."""
        every = self.gradients + self.state + self.activations + self.messages + self.average + self.copies
        return every + self.common


def stage_memory(job: Job, stage: int, row_bytes: float) -> StageMemory:
    """What a stage holds if it keeps `row_bytes` for each row of a micro-batch in flight."""
    layout, sums = job.stages[stage].layout, traffic(job, stage)
    values, vector = (bytes_of(size, layout.dtype) for size in (layout.size, layout.updated))
    passes = map(job.passes, range(job.replicas))
    flights = np.array([in_flight(job.config.schedule, len(job.stages), stage, count) for count in passes])
    having = np.concatenate([np.repeat(n, n) for n in (sharers(h, job.shared) for h in job.group_homes(stage))])
    common, average = job.copies * values / having, np.zeros(job.replicas, np.int64)
    of_average = averaging(job, stage) if job.config.workers else None
    if of_average:
        common, average = common + of_average.vector / of_average.sharers, of_average.memory
    return StageMemory(
        in_flight=flights,
        values=values,
        gradients=np.tile(depths(job.members, job.worker_microbatches, job.config.leaf), job.groups) * vector,
        state=states(job) * job.copies * sums.slices,
        activations=(flights * job.microbatch_rows * row_bytes).astype(np.int64),
        messages=sums.gradients_in + sums.packed,
        average=average,
        copies=copies(job, stage, of_average),
        common=common,
    )


def fullest_node(job: Job, memories: Sequence[StageMemory]) -> int:
    """The bytes that the fullest node holds."""
    held = [np.bincount(job.homes(stage), memory.held, job.nodes) for stage, memory in enumerate(memories)]
    return round(float(np.sum(held, axis=0).max()))


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

"""The costs of a job's step on any grid, from its settings alone: memory, messages, passes of the pipeline; no MPI."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpiml.nn import base as nn
from mpiml.parallel.schedules import SCHEDULES, Schedule, of_stages
from mpiml.parallel.simulator import Simulation, held, simulate
from mpiml.plan import devices, ties
from mpiml.plan.activations import RowBytes
from mpiml.plan.exchanges import Counts, traffic
from mpiml.plan.saving import copies, mirror
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
        mirror: of values and state that lie on the rank's device, for checkpoints.
        copies: of what is saved, so that training goes on meanwhile.
        common: a rank's share of what it has together with others: of the values of its copies, and of means.
        device: what ranks hold on their devices, and thus not here; None without devices.
    """

    in_flight: Counts
    values: int
    gradients: Counts
    state: Counts
    activations: Counts
    messages: Counts
    average: Counts
    mirror: Counts
    copies: Counts
    common: NDArray[np.float64]
    device: devices.DeviceMemory | None = None

    @property
    def held(self) -> NDArray[np.float64]:
        """All that is a rank's, or its share, on the host."""
        every = self.gradients + self.state + self.activations + self.messages + self.average + self.mirror
        return every + self.copies + self.common


def stage_memory(job: Job, stage: int, of_row: RowBytes) -> StageMemory:
    """What a stage holds if it keeps so much of each row of a micro-batch."""
    layout, sums = job.stages[stage].layout, traffic(job, stage)
    whole, updated, vector = (bytes_of(size, layout.dtype) for size in (layout.size, layout.updated, layout.summed))
    alone = job.owners and job.members == 1  # then the host has nothing, else gradients and their sum
    values = (0 if alone else updated) if job.owners else whole
    flights, activations = _passes(job, stage, of_row)
    device = devices.memory_of(job, stage, activations) if job.on_device else None
    if device:  # the host keeps the inputs
        design = job.stages[stage]
        activations = _passes(job, stage, RowBytes(math.prod(design.x_shape) * layout.dtype.itemsize, 0))[1]
    having = np.concatenate([np.repeat(n, n) for n in (sharers(h, job.shared) for h in job.group_homes(stage))])
    common, average = job.copies * values / having, np.zeros(job.replicas, np.int64)
    of_average = averaging(job, stage) if job.config.workers else None
    if of_average:
        common, average = common + of_average.vector / of_average.sharers, of_average.memory
    return StageMemory(
        in_flight=flights,
        values=values,
        gradients=devices.slots(job) * vector * (not alone),
        state=states(job) * job.copies * sums.slices * (not job.owners),
        activations=activations,
        messages=sums.gradients_in + sums.packed + ties.received(job, stage),
        average=average,
        mirror=np.full(job.replicas, mirror(job, stage)),
        copies=copies(job, stage, of_average),
        common=common,
        device=device,
    )


def _passes(job: Job, stage: int, of_row: RowBytes) -> tuple[Counts, Counts]:
    """By replica, the most micro-batches in flight of a stage, and the most bytes of those and of what waits for W."""
    passes = map(job.passes, range(job.replicas))
    most = [most_held(job.config.schedule, job.splits, stage, count, of_row) for count in passes]
    flights, of_rows = np.array(most).T
    return flights.astype(np.int64), (of_rows * job.microbatch_rows).astype(np.int64)


def fullest_node(job: Job, memories: Sequence[StageMemory]) -> int:
    """The bytes that the fullest node holds."""
    held = [np.bincount(job.homes(stage), memory.held, job.nodes) for stage, memory in enumerate(memories)]
    return round(float(np.sum(held, axis=0).max()))


def fullest_device(job: Job, memories: Sequence[StageMemory]) -> int:
    """The bytes that the fullest device holds; 0 without devices. See mpiml.plan.devices."""
    on_devices = [memory.device for memory in memories if memory.device]
    return devices.fullest(job, on_devices) if on_devices else 0


@functools.cache
def schedule_of(schedule: str, splits: tuple[bool, ...]) -> Schedule:
    """A schedule by its name, for stages of which some split their backward passes."""
    return of_stages(SCHEDULES[schedule], splits)


@functools.cache
def most_held(
    schedule: str, splits: tuple[bool, ...], stage: int, passes: int, of_row: RowBytes
) -> tuple[float, float]:
    """The most micro-batches in flight of a stage, and the most bytes that it holds for a row of each of those and of
    each that waits for W."""
    actions = schedule_of(schedule, splits)(len(splits), stage, passes)
    counts = list(held(actions)) or [(0, 0)]
    most = max(flight * of_row.in_flight + waiting * of_row.waiting for flight, waiting in counts)
    return max(flight for flight, _ in counts), most + (of_row.again if passes else 0.0)


def pipeline(job: Job, even: bool = False) -> Simulation:
    """The passes of a step on the replica with the most micro-batches; the unit of time is an operation. If `even`, as
    if all stages had equal work."""
    forward = [1.0 if even else float(max(stage.flops, 1)) for stage in job.stages]
    whole = [BACKWARD if even else max(backward(stage), 1.0) for stage in job.stages]
    weights = [each / BACKWARD for each in whole]
    schedule = schedule_of(job.config.schedule, job.splits)
    return simulate(schedule, len(job.stages), most_passes(job), forward, whole, weights=weights)


def most_passes(job: Job) -> int:
    """The micro-batches of the replica that has the most."""
    return max(job.passes(replica) for replica in range(job.replicas))


def backward(stage: StageDesign) -> float:
    """Operations of a stage's backward pass for a row, with forward passes that are computed again: none for layers
    before the first that training changes."""
    flops = nn.stack_flops(stage.layers, stage.x_shape)
    changed = (index for index, layer in enumerate(stage.layers) if nn.updated([layer]))
    first = 0 if stage.learned else next(changed, len(flops))
    again = (of for layer, of in zip(stage.layers[first:], flops[first:], strict=True) if layer.block is not None)
    return BACKWARD * sum(flops[first:]) + sum(again)


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

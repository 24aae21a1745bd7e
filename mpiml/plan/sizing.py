"""The plan of a training job on any grid: layers, stages, memory, messages; no MPI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpiml.nn import base as nn
from mpiml.nn.parameters import Shape
from mpiml.plan import activations, costs, devices, saving, sums, ties
from mpiml.plan.exchanges import depths, exchange_text
from mpiml.training.job import Job, kind
from mpiml.training.sharing import grid_text


@dataclass(frozen=True)
class LayerLine:
    """A layer: its path and kind, the shape of a row of its output, how many parameters it has, the operations of its
    forward pass for a row, and its stage."""

    path: str
    kind: str
    shape: Shape
    parameters: int
    flops: int
    stage: int


@dataclass(frozen=True)
class StageLine:
    """A stage: its first and last layer, its share of the operations, or of the layers' time if that is measured, the
    most micro-batches in flight, and the bytes that its fullest rank holds: `values` of each of its `copies` of the
    model, each one for all of the copy's ranks on a node if `Plan.shared`; `average`: for the averages of workers;
    `mirror`, `copy`: of what it saves; `device`: on its device, if it has one, where `Plan.owners` keep the values, so
    that on the host `values` are the sum of gradients."""

    first: int
    last: int
    parameters: int
    share: float
    in_flight: int
    copies: int
    values: int
    gradient_vectors: int
    gradients: int
    state: int
    activations: int
    messages: int
    average: int
    mirror: int
    copy: int
    device: devices.DeviceLine | None


@dataclass(frozen=True)
class Wire:
    """Bytes that all ranks together send in a step or in a round: between nodes, and to ranks of the same node."""

    what: str
    between: float
    within: float


@dataclass(frozen=True)
class Plan:
    """The plan of a job.

    Attributes:
        rows: rows of a step, on average; microbatch_rows: rows of the largest micro-batch.
        flops: operations of a step, forward and backward.
        shared: whether the ranks of a node hold one copy of the values.
        bubble: the part of the passes' time in which these stages are idle; even_bubble: if all had equal work.
        stages: where workers learn apart, if they do.
        rank_bytes, node_bytes: held by the fullest rank and the fullest node, with copies of what is saved; of shared
            values a rank's share counts; what is on devices does not.
        device: the kind of ranks' devices; empty without. owners: whether each rank has one to itself, on which it
            updates its model; device_ranks: the most ranks that share one, 0 if that is not known.
        device_bytes: what the ranks of the fullest device hold there, or of a rank if it is not known who share one.
        node_out, round_out: the most bytes that a node sends to others for the gradient sum in a step, and for the
            averages of a round; node_in, round_in: that a node receives.
        exchange: how nodes exchange the sums of gradients; empty if they need not.
        workers, average_every: how many workers learn apart, if any do, and for how many steps.
        checkpoint, round_checkpoint: bytes of vectors in a checkpoint, and in one within a round.
    """

    grid: str
    ranks: int
    nodes: int
    node_ranks: int
    data: str
    steps: int
    steps_per_epoch: int
    rows: float
    microbatches: int
    microbatch_rows: int
    flops: float
    shared: bool
    layers: list[LayerLine]
    stages: list[StageLine]
    bubble: float
    even_bubble: float
    rank_bytes: int
    node_bytes: int
    device: str
    owners: bool
    device_ranks: int
    device_bytes: int
    wires: list[Wire]
    node_out: float
    node_in: float
    round_out: float
    round_in: float
    exchange: str
    workers: int
    average_every: int
    checkpoint: int
    round_checkpoint: int


def plan(job: Job, data: str) -> Plan:
    """The plan of a job that trains on the data set named `data`."""
    last = len(job.stages) - 1
    stack = not job.config.bucket  # as mpiml.training.place calls modules
    rows = [activations.of_a_row(stage, number == last, stack) for number, stage in enumerate(job.stages)]
    phases = job.phases()
    memories = [[costs.stage_memory(phase, number, row) for number, row in enumerate(rows)] for phase in phases]
    *before, job = phases
    flops, work = (sum(getattr(stage, of) for stage in job.stages) for of in ("flops", "work"))
    workers, average_from = job.config.workers or 0, job.config.average_from
    gradients, averages = sums.of_sums(job), sums.of_averages(job) if workers else ()
    return Plan(
        grid=grid_text(len(job.stages), job.replicas, job.microbatches, job.config.workers, job.config.leaf),
        ranks=job.ranks,
        nodes=job.nodes,
        node_ranks=job.node_ranks,
        data=data,
        steps=job.config.steps,
        steps_per_epoch=job.steps_per_epoch,
        rows=job.rows / job.steps_per_epoch,
        microbatches=job.microbatches,
        microbatch_rows=job.microbatch_rows,
        flops=(flops + sum(map(costs.backward, job.stages))) * job.rows / job.steps_per_epoch,
        shared=job.shared,
        layers=_layers(job),
        stages=[_stage(job, number, memory, work) for number, memory in enumerate(memories[-1])],
        bubble=costs.pipeline(job).bubble(),
        even_bubble=costs.pipeline(job, even=True).bubble(),
        rank_bytes=int(max(max(memory.held) for each in memories for memory in each)),
        node_bytes=max(map(costs.fullest_node, phases, memories)),
        device=job.config.device if job.on_device else "",
        owners=job.owners,
        device_ranks=devices.sharing(job) if job.on_device else 0,
        device_bytes=max(map(costs.fullest_device, phases, memories)),
        wires=[*wires(job), *(_before(phase, average_from) for phase in before)],
        node_out=_most(gradients, "abroad"),
        node_in=_most(gradients, "received"),
        round_out=_most(averages, "abroad"),
        round_in=_most(averages, "received"),
        exchange=exchange_text(job),
        workers=workers,
        average_every=job.config.average_every,
        checkpoint=saving.checkpoint(job, 0),
        round_checkpoint=saving.checkpoint(job, workers) if workers else 0,
    )


def _most(sent: Sequence[sums.Sent], way: str) -> float:
    """The most bytes that a node sends to others or receives from them."""
    return float(np.max(sum(getattr(one, way) for one in sent)))


def _layers(job: Job) -> list[LayerLine]:
    lines = []
    for number, stage in enumerate(job.stages):
        shapes = nn.stack_shapes(stage.layers, stage.x_shape)
        for layer, before, after in zip(stage.layers, shapes, shapes[1:], strict=False):
            size = sum(parameter.size for parameter in nn.parameters([layer]) if parameter.first is parameter)
            lines.append(LayerLine(layer.path, kind(layer), after, size, layer.flops(before), number))
    return lines


def _stage(job: Job, number: int, memory: costs.StageMemory, work: int) -> StageLine:
    stage = job.stages[number]
    fullest = int(np.argmax(memory.held))
    return StageLine(
        first=stage.first,
        last=stage.first + len(stage.layers) - 1,
        parameters=sum(parameter.size for parameter in stage.layout.parameters if parameter.first is parameter),
        share=stage.work / work if work else 0.0,
        in_flight=int(memory.in_flight.max()),
        copies=job.copies,
        values=memory.values,
        gradient_vectors=int(depths(job.members, job.worker_microbatches, job.config.leaf)[fullest % job.members]),
        gradients=int(memory.gradients[fullest]),
        state=int(memory.state[fullest]),
        activations=int(memory.activations[fullest]),
        messages=int(memory.messages[fullest]),
        average=int(memory.average[fullest]),
        mirror=int(memory.mirror[fullest]),
        copy=int(memory.copies[fullest]),
        device=devices.line(job, memory.device) if memory.device else None,
    )


def wires(job: Job) -> list[Wire]:
    """All messages of a step, and of the end of a round. On a node only pipelines send some, unless each rank holds its
    own copy of the values."""
    edges, lines = costs.boundaries(job), []
    for what, direction in (("inputs of stages", "forward"), ("gradients of stages' inputs", "backward")):
        between = sum(getattr(edge, direction) * edge.abroad for edge in edges)
        within = sum(getattr(edge, direction) * (1 - edge.abroad) for edge in edges)
        lines.append(Wire(what, between, within))
    lines += [Wire("gradients of arrays in several layers", *ties.sent(job))] * any(ties.sent(job))
    lines += _summed(job)
    if job.config.workers:
        for what, sent in zip(("values", "optimizer states"), sums.of_averages(job), strict=True):
            if what == "values" or sums.states(job):
                lines.append(_wire(f"averages of {what}, every {job.config.average_every} steps", sent))
    return lines


def _summed(job: Job) -> list[Wire]:
    """The messages of a step's gradient sums."""
    if job.config.allreduce == "mpi":
        return [_library(job)]
    gradients, values = sums.of_sums(job)
    return [_wire("partial sums of gradients", gradients), _wire("values", values)]


def _before(job: Job, first: int) -> Wire:
    """The same of the steps before workers learn apart."""
    lines = _summed(job)
    between, within = (sum(getattr(line, name) for line in lines) for name in ("between", "within"))
    return Wire(f"gradients and values, before step {first}", between, within)


def _wire(what: str, sent: sums.Sent) -> Wire:
    between = float(sent.abroad.sum())
    return Wire(what, between, sent.total - between)


def _library(job: Job) -> Wire:
    """The fewest bytes that MPI_Allreduce can send: every copy but one is sent once, and the sum comes back."""
    between = within = 0
    for number, stage in enumerate(job.stages):
        vector = stage.layout.updated * stage.layout.dtype.itemsize
        for homes in job.group_homes(number):
            nodes = len(set(homes.tolist()))
            between += 2 * vector * (nodes - 1)
            within += 2 * vector * (job.members - nodes)
    return Wire("gradients (MPI_Allreduce at its best)", between, within)

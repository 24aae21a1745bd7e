"""The plan of a training job on any grid: layers, stages, memory, messages; no MPI."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpiml.command import count, size, table
from mpiml.nn import base as nn
from mpiml.nn.parameters import Shape
from mpiml.plan import activations, costs
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
    """A stage: its first and last layer, its share of the operations, the most micro-batches in flight, and the bytes
    that its fullest rank holds; `values` are one copy for all of the stage's ranks on a node, if `Plan.shared`."""

    first: int
    last: int
    parameters: int
    share: float
    in_flight: int
    values: int
    gradient_vectors: int
    gradients: int
    state: int
    activations: int
    messages: int


@dataclass(frozen=True)
class Wire:
    """Bytes that all ranks together send in a step: between nodes, and to ranks of the same node."""

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
        rank_bytes, node_bytes: held by the fullest rank and the fullest node; of shared values a rank's share counts.
        node_out: bytes that the busiest node sends to others for the gradient sum in a step.
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
    wires: list[Wire]
    node_out: float


def plan(job: Job, data: str) -> Plan:
    """The plan of a job that trains on the data set named `data`."""
    last = len(job.stages) - 1
    rows = [activations.bytes_of_a_row(stage, number == last) for number, stage in enumerate(job.stages)]
    memories = [costs.stage_memory(job, number, row) for number, row in enumerate(rows)]
    flops = sum(stage.flops for stage in job.stages)
    passes = max(job.passes(replica) for replica in range(job.replicas))
    sharers = [np.repeat(groups, groups) for groups in map(job.groups, range(last + 1))]  # of a replica's values
    held = [memory.own + memory.values / each for memory, each in zip(memories, sharers, strict=True)]
    return Plan(
        grid=grid_text(len(job.stages), job.replicas, job.microbatches, job.config.workers),
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
        stages=[_stage(job, number, memory, flops) for number, memory in enumerate(memories)],
        bubble=costs.pipeline(job).bubble(),
        even_bubble=last / (passes + last),
        rank_bytes=int(max(max(each) for each in held)),
        node_bytes=costs.fullest_node(job, memories),
        wires=wires(job),
        node_out=costs.busiest_node(job),
    )


def _layers(job: Job) -> list[LayerLine]:
    lines = []
    for number, stage in enumerate(job.stages):
        shapes = nn.stack_shapes(stage.layers, stage.x_shape)
        for layer, before, after in zip(stage.layers, shapes, shapes[1:], strict=False):
            size = sum(parameter.size for parameter in nn.parameters([layer]))
            lines.append(LayerLine(layer.path, kind(layer), after, size, layer.flops(before), number))
    return lines


def _stage(job: Job, number: int, memory: costs.StageMemory, flops: int) -> StageLine:
    stage = job.stages[number]
    fullest = int(np.argmax(memory.own))
    return StageLine(
        first=stage.first,
        last=stage.first + len(stage.layers) - 1,
        parameters=sum(parameter.size for parameter in stage.layout.parameters),
        share=stage.flops / flops if flops else 0.0,
        in_flight=int(memory.in_flight.max()),
        values=memory.values,
        gradient_vectors=int(costs.depths(job.replicas, job.microbatches)[fullest]),
        gradients=int(memory.gradients[fullest]),
        state=int(memory.state[fullest]),
        activations=int(memory.activations[fullest]),
        messages=int(memory.messages[fullest]),
    )


def wires(job: Job) -> list[Wire]:
    """All messages of a step. On a node only pipelines send some, unless each rank holds its own copy of the values."""
    edges, lines = costs.boundaries(job), []
    for what, direction in (("inputs of stages", "forward"), ("gradients of stages' inputs", "backward")):
        between = sum(getattr(edge, direction) * edge.abroad for edge in edges)
        within = sum(getattr(edge, direction) * (1 - edge.abroad) for edge in edges)
        lines.append(Wire(what, between, within))
    if job.config.allreduce == "mpi":
        return [*lines, _library(job)]
    sums = [costs.traffic(job, number) for number in range(len(job.stages))]
    for what, field in (("partial sums of gradients", "gradients"), ("values", "values")):
        total, between = (float(sum(getattr(one, field + way).sum() for one in sums)) for way in ("_out", "_abroad"))
        lines.append(Wire(what, between, total - between))
    return lines


def _library(job: Job) -> Wire:
    """The fewest bytes that MPI_Allreduce can send: every copy but one is sent once, and the sum comes back."""
    between = within = 0
    for number, stage in enumerate(job.stages):
        vector, nodes = stage.layout.updated * stage.layout.dtype.itemsize, len(set(job.homes(number).tolist()))
        between += 2 * vector * (nodes - 1)
        within += 2 * vector * (job.replicas - nodes)
    return Wire("gradients (MPI_Allreduce at its best)", between, within)


def screen(plan: Plan) -> str:
    """A plan as text."""
    nodes = f"{plan.nodes} nodes of {plan.node_ranks} ranks" if plan.nodes > 1 else "1 node"
    head = [
        plan.grid,
        f"{nodes}; an epoch of {plan.data} is {plan.steps_per_epoch:,} steps of {plan.rows:,.1f} rows, "
        f"each in {plan.microbatches:,} micro-batches of at most {plan.microbatch_rows:,}",
        f"{plan.steps:,} steps of about {count(plan.flops)} operations, forward and backward",
    ]
    layers = [["layer", "kind", "row of its output", "parameters", "operations", "stage"]]
    for line in plan.layers:
        shape = " x ".join(map(str, line.shape))
        name, parameters = line.path.rpartition(".")[2], f"{line.parameters:,}"
        layers.append([name, line.kind, shape, parameters, count(line.flops), str(line.stage)])
    total = [f"{sum(line.parameters for line in plan.layers):,}", count(sum(line.flops for line in plan.layers))]
    layers.append(["", "total; operations: a forward pass of one row", "", *total, ""])
    return "\n".join([*head, "", *table(layers, "rllrrr"), "", *_memory(plan), "", *_wires(plan)])


def _memory(plan: Plan) -> list[str]:
    heads = ["stage", "layers", "work", "in flight", "values", "gradients", "optimizer", "activations", "messages"]
    lines = [heads]
    for index, stage in enumerate(plan.stages):
        vectors = f"{stage.gradient_vectors} x " if stage.gradient_vectors > 1 else ""
        gradients = f"{vectors}{size(stage.gradients // stage.gradient_vectors)}"
        held = [size(stage.values), gradients, *map(size, (stage.state, stage.activations, stage.messages))]
        lines.append([str(index), f"{stage.first}-{stage.last}", f"{stage.share:.0%}", str(stage.in_flight), *held])
    values = "one copy for each node" if plan.shared else "a copy for each rank"
    return [
        *table(lines, "rrrrrrrrr"),
        f"memory of each stage's fullest rank; values: {values}; activations: measured on a forward pass",
        f"at most {size(plan.rank_bytes)} a rank and {size(plan.node_bytes)} a node, without data, Python, libraries",
        f"stages are idle for {plan.bubble:.0%} of the time of their passes ({plan.even_bubble:.0%} if all were equal)",
    ]


def _wires(plan: Plan) -> list[str]:
    lines = [["sent in a step", "between nodes", "on nodes"]]
    lines += [[wire.what, size(wire.between), size(wire.within)] for wire in plan.wires]
    sums = f"the busiest node sends {size(plan.node_out)} for the gradient sums"
    return [*table(lines, "lrr"), *([sums] if plan.node_out else [])]

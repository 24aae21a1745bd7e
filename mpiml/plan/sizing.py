"""What a training job would be on any grid: layers, stages, memory, bytes that move; no MPI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpiml.command import count, size, table
from mpiml.nn import base as nn
from mpiml.nn.parameters import Shape
from mpiml.plan import activations, costs
from mpiml.plan.costs import BACKWARD
from mpiml.training.job import Job, kind
from mpiml.training.resolve import grid_text

TRAINING = 1 + BACKWARD  # times the operations of a forward pass


@dataclass(frozen=True)
class LayerLine:
    """A layer: what it is called, the shape of a row that it gives, its parameters, and the operations of its forward
    pass for a row."""

    path: str
    kind: str
    shape: Shape
    parameters: int
    flops: int
    stage: int


@dataclass(frozen=True)
class StageLine:
    """A stage: its layers, its share of the operations, the most micro-batches in flight, and the bytes that its
    fullest rank holds; `values` are one copy for all of the stage's ranks on a node, if `Plan.shared`."""

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
    """Bytes of a step, of all ranks together: between nodes, and in messages on nodes."""

    what: str
    between: float
    within: float


@dataclass(frozen=True)
class Plan:
    """What is told of a job.

    Attributes:
        rows: of a step, on average; microbatch_rows: of the largest micro-batch.
        flops: of a step, forward and backward.
        shared: whether the ranks of a node hold one copy of the values.
        bubble: the idle part of the step's passes with these stages; even_bubble: with stages of equal work.
        rank_bytes, node_bytes: that the fullest rank and the fullest node hold; a rank's share of shared values counts.
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
    """All that can be said of a job beforehand."""
    last = len(job.stages) - 1
    rows = [activations.bytes_of_a_row(stage, number == last) for number, stage in enumerate(job.stages)]
    memories = [costs.memory(job, number, row) for number, row in enumerate(rows)]
    flops = sum(stage.flops for stage in job.stages)
    passes = max(job.passes(replica) for replica in range(job.replicas))
    held = [memory.own + memory.values / _sharers(job, number) for number, memory in enumerate(memories)]
    return Plan(
        grid=grid_text(len(job.stages), job.replicas, job.microbatches),
        ranks=job.ranks,
        nodes=job.nodes,
        node_ranks=job.node_ranks,
        data=data,
        steps=job.config.steps or 0,
        steps_per_epoch=job.steps_per_epoch,
        rows=job.rows / job.steps_per_epoch,
        microbatches=job.microbatches,
        microbatch_rows=job.microbatch_rows,
        flops=TRAINING * flops * job.rows / job.steps_per_epoch,
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


def _sharers(job: Job, stage: int) -> Any:
    """For each replica, how many ranks share a copy of the values with it."""
    groups = job.groups(stage)
    return np.repeat(groups, groups)


def _layers(job: Job) -> list[LayerLine]:
    lines = []
    for number, stage in enumerate(job.stages):
        shapes = nn.stack_shapes(stage.layers, stage.x_shape)
        for layer, before, after in zip(stage.layers, shapes, shapes[1:], strict=False):
            size = sum(parameter.size for parameter in nn.parameters([layer]))
            lines.append(LayerLine(layer.path, kind(layer), after, size, layer.flops(before), number))
    return lines


def _stage(job: Job, number: int, memory: costs.Memory, flops: int) -> StageLine:
    stage = job.stages[number]
    fullest = int(np.argmax(memory.own))
    return StageLine(
        first=stage.first,
        last=stage.first + len(stage.layers) - 1,
        parameters=sum(parameter.size for parameter in stage.layout.parameters),
        share=stage.flops / flops if flops else 0.0,
        in_flight=max(costs.in_flight(job, number, job.passes(replica)) for replica in range(job.replicas)),
        values=memory.values,
        gradient_vectors=int(costs.depths(job.replicas, job.microbatches)[fullest]),
        gradients=int(memory.gradients[fullest]),
        state=int(memory.state[fullest]),
        activations=int(memory.activations[fullest]),
        messages=int(memory.messages[fullest]),
    )


def wires(job: Job) -> list[Wire]:
    """What moves in a step. Within a node only pipelines need messages, unless ranks keep copies of their own."""
    edges = costs.boundaries(job)
    lines = [
        Wire("inputs of stages", *_apart([(edge.forward, edge.abroad) for edge in edges])),
        Wire("gradients of stages' inputs", *_apart([(edge.backward, edge.abroad) for edge in edges])),
    ]
    if job.config.allreduce == "mpi":
        return [*lines, _library(job)]
    found = [costs.exchange(job, number) for number in range(len(job.stages))]
    for what, sent, abroad in (
        ("partial sums of gradients", "gradients_out", "gradients_abroad"),
        ("values", "values_out", "values_abroad"),
    ):
        all_ = sum(int(getattr(one, sent).sum()) for one in found)
        between = sum(float(getattr(one, abroad).sum()) for one in found)
        lines.append(Wire(what, between, all_ - between))
    return lines


def _library(job: Job) -> Wire:
    """The fewest bytes with which MPI_Allreduce can do its work: each but one copy goes, and a sum comes back."""
    vectors = [stage.layout.size * stage.layout.dtype.itemsize for stage in job.stages]
    nodes = [len(set(job.homes(stage).tolist())) for stage in range(len(vectors))]
    between = sum(2 * vector * (count - 1) for vector, count in zip(vectors, nodes, strict=True))
    within = sum(2 * vector * (job.replicas - count) for vector, count in zip(vectors, nodes, strict=True))
    return Wire("gradients (MPI_Allreduce at its best)", between, within)


def _apart(messages: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(size * abroad for size, abroad in messages), sum(size * (1 - abroad) for size, abroad in messages)


def screen(plan: Plan) -> str:
    """A plan as text."""
    nodes = f"{plan.nodes} nodes of {plan.node_ranks} ranks" if plan.nodes > 1 else "1 node"
    head = [
        plan.grid,
        f"{nodes}; an epoch of {plan.data} is {plan.steps_per_epoch:,} steps of {plan.rows:,.1f} rows, "
        f"each in {plan.microbatches:,} micro-batches of at most {plan.microbatch_rows:,}",
        f"{plan.steps:,} steps; one takes about {count(plan.flops)} operations, forward and backward",
    ]
    layers = [["layer", "kind", "row of its output", "parameters", "operations", "stage"]]
    for line in plan.layers:
        shape = " x ".join(map(str, line.shape))
        name, parameters = line.path.rpartition(".")[2], f"{line.parameters:,}"
        layers.append([name, line.kind, shape, parameters, count(line.flops), str(line.stage)])
    total = [f"{sum(line.parameters for line in plan.layers):,}", count(sum(line.flops for line in plan.layers))]
    layers.append(["", "in all; operations are of a row, forward", "", *total, ""])
    return "\n".join([*head, "", *table(layers, "rllrrr"), "", *_memory(plan), "", *_wires(plan)])


def _memory(plan: Plan) -> list[str]:
    heads = ["stage", "layers", "work", "in flight", "values", "gradients", "optimizer", "activations", "messages"]
    lines = [heads]
    for index, stage in enumerate(plan.stages):
        vectors = f"{stage.gradient_vectors} x " if stage.gradient_vectors > 1 else ""
        gradients = f"{vectors}{size(stage.gradients // stage.gradient_vectors)}"
        held = [size(stage.values), gradients, *map(size, (stage.state, stage.activations, stage.messages))]
        lines.append([str(index), f"{stage.first}-{stage.last}", f"{stage.share:.0%}", str(stage.in_flight), *held])
    whose = "values: one copy a node, the rest each rank's own" if plan.shared else "each rank has all of it"
    return [
        *table(lines, "rrrrrrrrr"),
        f"of each stage's fullest rank; {whose}; activations: measured on a forward pass",
        f"at most {size(plan.rank_bytes)} a rank and {size(plan.node_bytes)} a node, without data, Python, libraries",
        f"stages are idle for {plan.bubble:.0%} of the time of their passes ({plan.even_bubble:.0%} if all were equal)",
    ]


def _wires(plan: Plan) -> list[str]:
    lines = [["in a step move", "between nodes", "on nodes"]]
    lines += [[wire.what, size(wire.between), size(wire.within)] for wire in plan.wires]
    sums = f"for the sums the busiest node sends {size(plan.node_out)}"
    return [*table(lines, "lrr"), *([sums] if plan.node_out else [])]

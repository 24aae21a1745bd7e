"""The plan of a training job as text."""

from __future__ import annotations

from mpiml.command import count, size, table
from mpiml.plan import devices
from mpiml.plan.sizing import Plan


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
    kept = ["sums" if plan.owners else "values", "gradients", "optimizer", "inputs" if plan.device else "activations"]
    heads = ["stage", "layers", "work", "in flight", *kept, "messages"]
    copied = any(stage.copy for stage in plan.stages)
    lines = [heads + ["averages"] * bool(plan.workers) + ["mirror"] * plan.owners + ["copies"] * copied]
    for index, stage in enumerate(plan.stages):
        held = [
            _several(stage.copies, stage.values),
            _several(stage.gradient_vectors, stage.gradients // stage.gradient_vectors),
        ]
        more = [stage.average] * bool(plan.workers) + [stage.mirror] * plan.owners + [stage.copy] * copied
        held += map(size, (stage.state, stage.activations, stage.messages, *more))
        lines.append([str(index), f"{stage.first}-{stage.last}", f"{stage.share:.0%}", str(stage.in_flight), *held])
    saved = f"a checkpoint has {size(plan.checkpoint)}"
    saved += f", within a round {size(plan.round_checkpoint)}" if plan.workers else ""
    saved += "; copies: to go on while it is written, if memory is available (--save)" if copied else ""
    return [
        *table(lines, "r" * len(lines[0])),
        f"memory of each stage's fullest rank{' on the host' * bool(plan.device)}; {_explained(plan)}",
        f"at most {size(plan.rank_bytes)} a rank and {size(plan.node_bytes)} a node, without data, Python, libraries",
        saved,
        f"stages are idle for {plan.bubble:.0%} of the time of their passes ({plan.even_bubble:.0%} if all were equal)",
        *_on_devices(plan),
    ]


def _explained(plan: Plan) -> str:
    """What the columns mean that depend on settings."""
    owner = "worker and " if plan.workers else ""
    values = f"one copy for each {owner}node" if plan.shared else f"a copy for each {owner}rank"
    if plan.owners:
        return "sums: of gradients, one for each node; mirror: of the device, for checkpoints"
    return f"values: {values}; " + ("inputs: of stages" if plan.device else "activations: kept for the backward pass")


def _on_devices(plan: Plan) -> list[str]:
    lines = [stage.device for stage in plan.stages if stage.device]
    text = devices.screen(plan.device, lines, plan.owners, plan.device_ranks, plan.device_bytes)
    return ["", *text] if lines else []


def _several(count: int, each: float) -> str:
    return f"{count} x {size(each)}" if count > 1 else size(each)


def _wires(plan: Plan) -> list[str]:
    lines = [["sent in a step", "between nodes", "on nodes"]]
    lines += [[wire.what, size(wire.between), size(wire.within)] for wire in plan.wires]
    most = f"a node sends at most {size(plan.node_out)} and receives {size(plan.node_in)} for the gradient sums"
    if plan.workers:
        of_round = f"sends {size(plan.round_out)} and receives {size(plan.round_in)}"
        most += f", and {of_round} every {plan.average_every} steps for the averages"
    exchange = [plan.exchange] if plan.exchange else []
    return [*table(lines, "lrr"), *exchange, *([most] if plan.node_out or plan.round_out else [])]

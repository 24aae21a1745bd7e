"""The stage of this rank: what it computes, and where its vectors lie in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.config import Config
from mpiml.devices.host import HOST, Host
from mpiml.errors import ConfigError
from mpiml.nn import base as nn
from mpiml.nn.deferred import DeferredGradients
from mpiml.nn.losses import Metric
from mpiml.nn.parameters import Gradients, Layout
from mpiml.nn.recompute import grouped
from mpiml.parallel import halving
from mpiml.parallel.gradient_sum import GradientSum, LibrarySum, OrderedSum
from mpiml.parallel.grid import Grid
from mpiml.parallel.memory import Memory, PrivateMemory, SharedMemory, share
from mpiml.parallel.on_device import SumOfOwners, SumOnHost, copied
from mpiml.parallel.record import Agreement, Record, agree
from mpiml.parallel.slices import elements
from mpiml.parallel.stage import Computation
from mpiml.parallel.tree import depth
from mpiml.parallel.values import Values
from mpiml.partition import part
from mpiml.team import Team, allgather
from mpiml.training import factors
from mpiml.training.constants import Constants
from mpiml.training.devices import chosen
from mpiml.training.model import Model, Scoring, build_scoring, described, integers, model_for, objective
from mpiml.training.resolve import Resolved
from mpiml.training.stages import cut, is_measured, remarks
from mpiml.training.task import Task
from mpiml.vectors import bytes_of

if TYPE_CHECKING:
    from mpiml.nn.export import Form

ONE_MODEL = "all ranks must build the same model: what it draws must follow from --seed, and no order from a set"
Agree = Callable[[NDArray[np.float64], bool, bool], Record]


@dataclass(frozen=True)
class BuiltModel:
    """What all ranks know of the model.

    Attributes:
        task: what it is for.
        layouts: of the parameters of each stage.
        scoring: loss and metric.
        constants: of all stages on rank 0, which writes them to checkpoints; elsewhere of this rank's stage.
        least_rows: of a micro-batch that it can be trained on, and the layer that says so.
        notes: what a person should know.
        device: of this rank, on which it is computed.
        integers: the values of packed rows that it takes as integers.
        cuts: into stages, if they follow from measured times.
        forms: what PyTorch makes of its arrays, by name; on rank 0 of a run with --init.
    """

    task: Task
    layouts: list[Layout]
    scoring: Scoring
    constants: Constants
    least_rows: tuple[int, str]
    notes: list[str]
    device: Host = HOST
    integers: Sequence[slice] = ()
    cuts: tuple[int, ...] = ()
    forms: Mapping[str, Form] = field(default_factory=dict)

    @property
    def metric(self) -> Metric:
        """What measures it."""
        return self.scoring.metric


def build_stage(
    config: Config, task: Task, grid: Grid, model: Model | None, weighted: bool = False
) -> tuple[BuiltModel, Computation]:
    """The model, cut into stages, and what this rank's stage computes; collective. Rows may be `weighted`.

    Raises, on all ranks alike, ConfigError for a model, a loss or a metric that does not fit.
    """
    team, device = grid.team, chosen(config, grid)

    def build() -> tuple[Scoring, list[nn.Layer], list[int] | None, dict[str, str]]:
        try:
            layers = model_for(config, task, model, device)
            times = _times(config, layers, task, team, device) if is_measured(config) else None
            scoring = build_scoring(config, task, layers, weighted, device)
            device.fix_arithmetic()  # once more: by now all of the user's code has been imported
            return scoring, layers, times, described(layers, config.seed)
        except MemoryError as error:
            what = f"rows of {task.shape} and {task.outputs:,} outputs"
            raise ConfigError(f"a model for {what} does not fit into memory: {error}") from None

    with team.clock.doing("model"):
        scoring, layers, times, text = team.together(build)
        team.check_alike(text, ONE_MODEL)
        if times:  # the mean over all ranks: any rank may get any stage, and no two measure the same
            summed = np.array(times)
            team.wait([team.comm.Iallreduce(MPI.IN_PLACE, summed, MPI.SUM)])
            times = (summed // team.size).tolist()
        stages = team.together(lambda: cut(config, layers, task.shape, times))
    stage = stages[grid.stage]
    computation = Computation(
        # Each layer by itself where its gradients are sent as soon as they are there.
        forward=functools.partial(nn.forward, grouped(stage.layers, stack=not config.bucket), learned=stage.learned),
        at=lambda training, step, m: nn.At(training, config.seed, step, m),
        objective=objective(scoring.loss, scoring.metric, device),
        x_shape=stage.x_shape,
        y_shape=stage.y_shape,
        dtype=config.dtype,
        learns=stage.learned or stage.layout.updated > 0,
        learned=stage.learned,
        array=device.array,
        deferred=DeferredGradients if stage.splits else None,
    )
    # Rank 0 writes checkpoints from its own copy of the model, so it keeps the constants of all stages: views, which
    # keep these tensors' memory and nothing else of other stages' modules. Other ranks keep those of their stage.
    constants = Constants.of(stage.layers if team.rank else layers)
    built = BuiltModel(
        task=task,
        layouts=[stage.layout for stage in stages],
        scoring=scoring,
        constants=constants,
        least_rows=max((layer.least_rows, layer.path) for layer in layers),
        notes=[*(note for layer in layers for note in layer.notes), *factors.notes(layers), *remarks(config, stages)],
        device=device,
        cuts=tuple(stage.first for stage in stages[1:]) if times else (),
        integers=integers(layers),
        forms={} if team.rank or not config.init else _forms(layers, task),
    )
    return built, computation


def _times(config: Config, layers: Sequence[nn.Layer], task: Task, team: Team, device: Host) -> list[int]:
    from mpiml.training.layer_times import layer_times  # only where it is needed

    return layer_times(config, layers, task, team.clock.progress, device)


def _forms(layers: list[nn.Layer], task: Task) -> dict[str, Form]:
    from mpiml.nn.export import forms  # which needs the modules of all kinds of layers

    return forms(layers, task.shape)


def place_values(config: Config, grid: Grid, layout: Layout, device: Host = HOST) -> tuple[Values, str | None]:
    """Memory for the values of this rank's stage, and if it is not shared although it should be, why; collective."""
    memory, problem = share(grid.comm, grid.local, 0, bytes_of(layout.size, layout.dtype), config.memory)
    values = Values(grid.data, memory, layout.size, layout.blocks(), layout.dtype)
    layout.bind(grid.team.together(lambda: copied(device, values)) if device.there else values.vector)
    return values, problem


def place(
    config: Resolved,
    everyone: MPI.Intracomm,
    grid: Grid,
    layout: Layout,
    microbatches: int,
    columns: int,
    device: Host = HOST,
) -> tuple[GradientSum, Agree, list[str]]:
    """Make the gradient sum of a stage with its values, over so many `microbatches`, and the agreement on the step
    record, whose rows have so many `columns` with the metric's, in the memory that `config` asks for, or on `device`;
    collective over `everyone`, whose grids are cut alike, and who all get the same kind. Returns these two and notes to
    print.
    """
    flat, further = (layout.size, layout.blocks(), layout.dtype), layout.further_blocks()
    private = functools.partial(agree, grid.comm, first=part(grid.replica, grid.replicas, microbatches, config.leaf)[0])
    owned = owns(config, everyone, device)
    if config.allreduce == "mpi":
        copy = Values(MPI.COMM_SELF, PrivateMemory(), *flat, further=further)
        of_library = LibrarySum(grid.data, copy, microbatches, leaf=config.leaf)
        return SumOnHost(device, of_library) if device.there else of_library, private, []
    if owned:
        on_device, together = flat, grid.team.together  # which makes it one error of all if memory on a device is short
        there = together(lambda: Values(MPI.COMM_SELF, PrivateMemory(device.vectors), *on_device))
        if grid.replicas == 1:
            own = together(lambda: OrderedSum(there, microbatches, grid.team.clock, leaf=config.leaf))
            return own, private, []
        flat = layout.updated, *flat[1:]  # on the host there are gradients alone
    slots = depth(grid.replica, grid.replicas, microbatches, config.leaf)
    values_bytes, slot_bytes = (bytes_of(size, layout.dtype) for size in (flat[0], layout.summed))
    memory, problem = share(everyone, grid.local, slots * slot_bytes, values_bytes, config.memory)
    needed = Agreement.bytes_needed(grid.node.size, grid.replicas, microbatches, columns, config.leaf)
    of_node, another = share(everyone, grid.node, 0, needed, "private" if problem else config.memory)
    notes = [f"warning: {text}" for text in (problem, another) if text]
    abroad = any(allgather(everyone, memory.ranks < grid.replicas))  # on one node there are no messages
    halved = _halved(everyone, grid, memory, layout, microbatches // config.leaf)
    bucket = elements(config.bucket, layout.dtype) if abroad else 0
    values = Values(grid.data, memory, *flat, bucket, halved, further)
    ordered = OrderedSum(values, microbatches, grid.team.clock, leaf=config.leaf)
    sum_: GradientSum = ordered
    if device.there:
        sum_ = SumOfOwners(device, ordered, there) if owned else SumOnHost(device, ordered)
    if isinstance(of_node, SharedMemory):
        return sum_, Agreement(grid, of_node, microbatches, columns, config.leaf), notes
    return sum_, private, notes


def owns(config: Config, everyone: MPI.Intracomm, device: Host) -> bool:
    """Whether each rank has a device to itself and updates its model there; collective over `everyone`."""
    return (
        device.there
        and all(allgather(everyone, device.alone))
        and not config.average_every
        and config.allreduce == "ordered"
    )


def _halved(everyone: MPI.Intracomm, grid: Grid, memory: Memory, layout: Layout, leaves: int) -> bool:
    """Whether the nodes of this stage exchange by halving: if it is faster in all grids, because ranks of equal number
    must hold the same parts in all of them."""
    nodes = [ranks for rank, ranks in allgather(grid.data, (memory.rank, memory.ranks)) if rank == 0]
    faster = halving.faster(nodes, leaves, layout.blocks(), layout.dtype.itemsize)
    of_stage = {count for stage, count in allgather(everyone, (grid.stage, faster * len(nodes))) if stage == grid.stage}
    return faster and len(of_stage) == 1


def another(
    sum_: GradientSum, grid: Grid, layout: Layout, microbatches: int, leaf: int = 1, device: Host = HOST
) -> GradientSum:
    """The sum of another copy of the model, which takes turns with that of `sum_` on the same rank of a grid with one
    replica: values of its own, with the same slots; collective."""
    flat, further = (layout.size, layout.blocks(), layout.dtype), layout.further_blocks()
    if isinstance(sum_, SumOnHost):
        one = another(sum_.on_host, grid, layout, microbatches, leaf)
        assert isinstance(one, (OrderedSum, LibrarySum)), "it is of the same kind"
        return SumOnHost(device, one, sum_)
    values = Values(MPI.COMM_SELF, PrivateMemory(), *flat, further=further)
    if isinstance(sum_, OrderedSum):
        return OrderedSum(values, microbatches, grid.team.clock, sum_, leaf)
    assert isinstance(sum_, LibrarySum), "there are two kinds"
    return LibrarySum(grid.data, values, microbatches, sum_, leaf)


def gradients(layout: Layout, sum_: GradientSum) -> list[Gradients]:
    """For each micro-batch of this replica, where its backward pass writes. The last pass also reports its progress to
    the sum, which then sends what is complete."""
    of_slot = [Gradients(layout, slot) for slot in sum_.gradients]
    *slots, last = sum_.plan.slots
    return [*(of_slot[slot] for slot in slots), Gradients(layout, sum_.gradients[last], sum_.complete)]

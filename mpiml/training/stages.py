"""A model cut into stages; no MPI."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mpiml import partition
from mpiml.config import Config
from mpiml.devices import choice
from mpiml.errors import ConfigError
from mpiml.nn import base as nn
from mpiml.nn import optimizers
from mpiml.nn.parameters import Layout, Shape
from mpiml.vectors import ALIGNMENT, BOUNDARY


@dataclass(frozen=True)
class StageDesign:
    """Consecutive layers of a model.

    Attributes:
        first: the number of its first layer in the model.
        x_shape, y_shape: of a row that comes in and of one that goes out.
        layout: of its parameters.
        learned: whether a stage before it has parameters that are updated, and so needs a gradient from this one.
        flops: floating-point operations of the forward pass for a row.
        work: what its layers cost, in operations or microseconds, whichever the cuts are made by.
    """

    first: int
    layers: list[nn.Layer]
    x_shape: Shape
    y_shape: Shape
    layout: Layout
    learned: bool
    flops: int
    work: int

    @property
    def splits(self) -> bool:
        """Whether all its layers can do their backward passes in two parts."""
        return not nn.unsplit(self.layers)


def is_measured(config: Config) -> bool:
    """Whether layers are to be timed before the model is cut into stages."""
    return config.balance == "measured" and config.pipe > 1


def cut(
    config: Config, layers: Sequence[nn.Layer], shape: Shape, times: Sequence[int] | None = None
) -> list[StageDesign]:
    """The stages that the settings cut a model into: as --cuts says, or so that the slowest is as fast as it can be, by
    its layers' `times` if these are measured, else by their operations.

    Raises ConfigError if there are too few layers.
    """
    shapes, flops = nn.stack_shapes(layers, shape), nn.stack_flops(layers, shape)
    try:
        if config.cuts:
            partition.check_cuts(config.cuts, len(layers), config.pipe)
        costs = flops if times is None else times
        cuts = config.cuts or partition.balanced(costs, config.pipe)
    except ConfigError as error:
        raise ConfigError("; ".join([str(error), *(layer.joined for layer in layers if layer.joined)])) from None
    layerwise = optimizers.build(config.optimizer, 0.0, 0.0).layerwise
    decay = optimizers.default_decay(config.optimizer) if config.weight_decay is None else config.weight_decay
    boundary = ALIGNMENT if choice.is_host(config.device) else BOUNDARY
    stages: list[StageDesign] = []
    for a, b in itertools.pairwise([0, *cuts, len(layers)]):
        layout = Layout(nn.parameters(layers[a:b]), config.dtype, layerwise, decay > 0, boundary)
        learned = any(stage.layout.updated for stage in stages)
        of_stage = sum(flops[a:b]), sum(costs[a:b])
        stages.append(StageDesign(a, list(layers[a:b]), shapes[a], shapes[b], layout, learned, *of_stage))
    return stages


def remarks(config: Config, stages: Sequence[StageDesign]) -> list[str]:
    """What a person should know of the stages, a line each: how they were measured, and which of them do whole backward
    passes where the schedule has two parts."""
    if config.pipe == 1:
        return []
    lines = []
    if is_measured(config):
        layers = [f"{stage.first}-{stage.first + len(stage.layers) - 1}" for stage in stages]
        *times, last = [f"{stage.work / 1000:.3g}" for stage in stages]
        lines.append(f"stages by measurement: layers {', '.join(layers)}: {', '.join(times)} and {last} ms")
    for number, stage in enumerate(stages) if config.schedule == "zb-h1" else ():
        for layer in nn.unsplit(stage.layers)[:1]:
            what = f"{layer.path}, {type(layer).__name__}, computes all its gradients at once"
            lines.append(f"--schedule {config.schedule}: stage {number} does W right after I, because {what}")
    return lines

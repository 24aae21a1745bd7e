"""A training job that has not been started: its settings, its model and its grid; no MPI."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.data.inspection import inspect, problem
from mpiml.devices import choice
from mpiml.errors import DataError
from mpiml.nn.base import Layer
from mpiml.nn.parameters import Shape
from mpiml.partition import check_ranks, part
from mpiml.training.best import best_of
from mpiml.training.device_memory import owners
from mpiml.training.layer_times import layer_times
from mpiml.training.model import build_scoring, model_for
from mpiml.training.resolve import Resolved, resolve
from mpiml.training.stages import StageDesign, cut, is_measured
from mpiml.training.task import Seen, Task, declared


@dataclass(frozen=True)
class Job:
    """A training job on a grid.

    Attributes:
        config: its settings, resolved.
        stages: its model, cut into stages.
        ranks, node_ranks: ranks of the job and of each node; the last node may have fewer.
        rows: rows of the training set.
        node_devices: devices of each node; None if that is not known.
        owners: whether each rank updates its model on a device of its own.
    """

    config: Resolved
    stages: Sequence[StageDesign]
    ranks: int
    node_ranks: int
    rows: int
    node_devices: int | None = None
    owners: bool = False

    @property
    def microbatches(self) -> int:
        return self.config.microbatches

    @property
    def splits(self) -> tuple[bool, ...]:
        """Which stages can do their backward passes in two parts."""
        return tuple(stage.splits for stage in self.stages)

    @property
    def replicas(self) -> int:
        return self.ranks // len(self.stages)

    @property
    def groups(self) -> int:
        """How many groups of replicas have models of their own: one, unless there are workers."""
        return min(self.replicas, self.config.workers or 1)

    @property
    def members(self) -> int:
        """Replicas of a group."""
        return self.replicas // self.groups

    @property
    def copies(self) -> int:
        """Models of a group, whose workers take turns."""
        return (self.config.workers or 1) // self.groups

    @property
    def worker_microbatches(self) -> int:
        """Micro-batches that are summed together in a step: those of a worker, or all."""
        return self.microbatches // (self.config.workers or 1)

    @property
    def worker_leaves(self) -> int:
        """The leaves of the tree over these."""
        return self.worker_microbatches // self.config.leaf

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.node_ranks)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.config.batch)

    @property
    def microbatch_rows(self) -> int:
        """Rows of the largest micro-batch."""
        return math.ceil(math.ceil(self.rows / self.microbatches) / self.steps_per_epoch)

    @property
    def shared(self) -> bool:
        """Whether the ranks of a node hold one copy of the values."""
        return self.config.allreduce == "ordered" and self.config.memory != "private"

    @property
    def on_device(self) -> bool:
        """Whether layers compute on devices."""
        return not choice.is_host(self.config.device)

    def passes(self, replica: int) -> int:
        """How many micro-batches a replica computes in a step, of each of its workers in turn."""
        first, last = part(replica % self.members, self.members, self.worker_microbatches, self.config.leaf)
        return last - first

    def homes(self, stage: int) -> NDArray[np.int64]:
        """The node of each replica of a stage."""
        return np.arange(stage * self.replicas, (stage + 1) * self.replicas) // self.node_ranks

    def group_homes(self, stage: int) -> NDArray[np.int64]:
        """The same by group: (groups, members)."""
        return self.homes(stage).reshape(self.groups, self.members)

    def phases(self) -> list[Job]:
        """The job before workers learn apart, and as it is afterwards; only one of them if there is no other."""
        config = self.config
        together = replace(self, config=replace(config, average_every=0, workers=None))
        before = [together] if config.workers and config.average_from > 1 else []
        return before if config.workers and config.average_from > config.steps else [*before, self]


def sharers(homes: NDArray[np.int64], shared: bool) -> list[int]:
    """How many of these replicas, in order, have one memory: those of a node if it is shared, or one each."""
    return np.unique(homes, return_counts=True)[1].tolist() if shared else [1] * len(homes)


def needs(data: Dataset, classes: int | None, ignore: int | None = None) -> Seen:
    """What a model of this data set needs; reads only the columns that decide it.

    Raises DataError for labels or tokens that cannot be used.
    """
    seen = declared(data, classes)
    if not seen.outputs:
        seen.tokens = _values(data, "x", None) if data.language_model else 0
        seen.outputs = _values(data, "y", data.ignored(ignore))
    return seen


def _values(data: Dataset, column: str, ignore: int | None) -> int:
    """One more than the highest integer of column "x" or "y" in both splits."""
    highest = -1
    for split in (data.train, data.test):
        source, rows = getattr(split, column), np.arange(len(split))
        source.hold(rows)
        findings = inspect(source, rows, ignore)
        if wrong := problem(data, column, findings):
            raise DataError(f"{source.name}: {wrong[0]} {wrong[1]}")
        highest = max(highest, int(findings.highest[0]))
    return highest + 1


@dataclass(frozen=True)
class Unplaced:
    """A training job without a grid: its layers, the shape of an input row, and what else a Job has."""

    layers: Sequence[Layer]
    shape: Shape
    rows: int
    classification: bool
    task: Task

    def on(
        self, config: Config, ranks: int, node_ranks: int, rows: int | None = None, node_devices: int | None = None
    ) -> Job:
        """The job on a grid, with another number of training rows if `rows` is given. Raises ConfigError as mpiml.train
        would."""
        rows = rows or self.rows
        check_ranks(ranks, config.pipe)
        resolved = resolve(config, rows, self.classification, ranks // config.pipe)
        times = layer_times(resolved, self.layers, self.task) if is_measured(config) else None
        stages = cut(resolved, self.layers, self.shape, times)
        of_node = min(ranks, node_ranks)
        owned = not choice.is_host(config.device) and owners(resolved, of_node, node_devices)
        return Job(resolved, stages, ranks, node_ranks, rows, node_devices, owned)


def unplaced(config: Config, data: Dataset) -> Unplaced:
    """The job that mpiml.train would start with these settings. Raises ConfigError or DataError as it would."""
    alone = config.replace(pipe=1, cuts=(), microbatches=config.workers or 1, leaf=1, noise_scale=False)
    config = resolve(alone, len(data.train), data.classification, 1)
    task = Task.of(data, needs(data, config.classes, config.ignore))
    layers = model_for(config, task, None)
    metric = build_scoring(config, task, layers, data.train.w is not None).metric
    best_of(config, metric)
    return Unplaced(layers, task.shape, len(data.train), data.classification, task)


def job_of(config: Config, ranks: int, node_ranks: int, data: Dataset, node_devices: int | None = None) -> Job:
    """The job that mpiml.train would be on these ranks, on nodes of so many devices if that is known. Raises
    ConfigError or DataError as it would."""
    check_ranks(ranks, config.pipe)
    if node_devices:
        choice.check_count(config.device, ranks, node_ranks, node_devices, config.share_devices)
    resolve(config, len(data.train), data.classification, ranks // config.pipe)  # for errors before the data are read
    return unplaced(config, data).on(config, ranks, node_ranks, node_devices=node_devices)


def kind(layer: Layer) -> str:
    """A layer's class, with those of the layers inside it: "Residual(LayerNorm, Linear)"."""
    inner = ", ".join(kind(one) for one in layer.inner())
    return f"{type(layer).__name__}({inner})" if inner else type(layer).__name__

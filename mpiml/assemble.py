"""From settings to the parts of a run: data, model, stages, gradient sum, update, each in its place on the grid."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml import waiting
from mpiml.build import Model, Task, build_loss, build_metric, constants, described, model_for, objective
from mpiml.clock import Clock
from mpiml.config import Config
from mpiml.data.dataset import Dataset, Split
from mpiml.data.fingerprint import Fingerprint
from mpiml.data.normalize import Normalization, NormalizedSource
from mpiml.data.prefetch import ReadAhead, steps_ahead
from mpiml.data.shards import Shards
from mpiml.design import StageDesign, cut, warnings
from mpiml.errors import DataError
from mpiml.evaluation import Evaluation
from mpiml.imports import called_with, named
from mpiml.load import look_at, look_for_starving, measure
from mpiml.nn import layer as nn
from mpiml.nn import optimizers
from mpiml.nn.losses import Loss, Metric
from mpiml.nn.parameters import Gradients, Layout
from mpiml.nn.rates import learning_rate
from mpiml.parallel.allreduce import GradientSum, LibrarySum, OrderedSum
from mpiml.parallel.grid import Grid
from mpiml.parallel.memory import PrivateMemory, SharedMemory, share
from mpiml.parallel.record import Agreement, Record, agree
from mpiml.parallel.schedules import SCHEDULES
from mpiml.parallel.stage import Part, TrainingStage
from mpiml.parallel.state import State
from mpiml.parallel.tree import depth
from mpiml.parallel.update import Update
from mpiml.partition import part
from mpiml.run import launch
from mpiml.run.pace import Pace
from mpiml.run.verdict import on_rank_0, together
from mpiml.vectors import bytes_of

ONE_MODEL = "all ranks must build the same model: what it draws must follow from --seed, and no order from a set"
Agree = Callable[[NDArray[np.float64], bool, bool], Record]


@dataclass(frozen=True)
class Due:
    """What is to be done after a step, in this order: saving before an evaluation, which may fail."""

    log: bool
    save: bool
    evaluation: bool


@dataclass
class Run:
    """The parts of a run on this rank."""

    config: Config
    grid: Grid
    clock: Clock
    shards: Shards
    ahead: ReadAhead
    tests: Evaluation
    task: Task
    metric: Metric
    layouts: list[Layout]
    stage: TrainingStage
    update: Update
    state: State
    agree: Agree
    notes: list[str]
    normalization: Normalization | None
    constants: str
    fingerprint: Fingerprint
    learning_rate: Callable[[int], float]

    @property
    def steps(self) -> int:
        """The number of the last step."""
        assert self.config.steps, "settings are resolved before a run is assembled"
        return self.config.steps

    def epoch(self, step: int) -> int:
        """The number of the epoch that a step is in, from 1 on."""
        return (step - 1) // self.shards.steps_per_epoch + 1

    def due(self, step: int) -> Due:
        """What is to be done after a step."""
        config, last = self.config, step == self.steps
        every = (config.log_every, config.save_every, config.eval_every)
        return Due(*(steps > 0 and (last or step % steps == 0) for steps in every))

    def free(self) -> None:
        """Give back what the MPI library holds for the run; collective."""
        self.stage.sum.free()
        self.grid.free()

    def pace(self) -> Pace:
        """What compares the times of this run's ranks."""
        grid, config = self.grid, self.config
        blocks = (part(replica, grid.replicas, config.microbatches or 1) for replica in range(grid.replicas))
        crowded = grid.node.size * config.threads > grid.cores
        return Pace(grid.stages, [stop - start for start, stop in blocks], grid.launched, crowded)

    def record(self, entries: int, measured: bool = False) -> NDArray[np.float64]:
        """An empty table for that many micro-batches, with columns for the metric only if it is to be measured: of many
        outputs they may be thousands."""
        return np.zeros((entries, 2 + (self.metric.columns if measured else 0)))


def assemble(
    config: Config,
    data: Dataset,
    grid: Grid,
    clock: Clock,
    model: Model | None,
    check: Callable[[Config, Sequence[Layout]], None] = lambda config, layouts: None,
) -> Run:
    """Build everything; collective over the grid. `config` is resolved.

    `check` looks at the stages' layouts, on rank 0, before memory for them is asked for.

    Raises, on all ranks alike, DataError or ConfigError for data or a model that do not fit.
    """
    clock("joining")
    waiting.share_cores(grid.node.size * config.threads, grid.cores)
    rows = look_at_rows(config, data, grid, clock)
    layouts, metric, here, fixed = build_stage(config, rows.task, grid, clock, model)
    on_rank_0(grid.comm, clock, lambda: check(config, layouts))
    layout = layouts[grid.stage]
    sum_, agreement, notes = place(config, grid, layout, 2 + metric.columns, clock)
    layout.bind(sum_.values)
    together(grid.comm, clock, functools.partial(layout.initialise, sum_.values, config.seed, *sum_.worker))
    here.gradients = gradients(layout, sum_)
    optimizer = optimizers.build(config.optimizer, config.momentum, config.weight_decay or 0.0)
    update = Update(grid.comm, grid.replica, sum_, optimizer, config.clip, rows.shards.rows_of, clock)
    return Run(
        config=config,
        grid=grid,
        clock=clock,
        shards=rows.shards,
        ahead=read_ahead(config, rows.shards, grid),
        tests=rows.tests,
        task=rows.task,
        metric=metric,
        layouts=layouts,
        agree=agreement,
        notes=[*rows.notes, *notes, *warnings(config)],
        normalization=rows.normalization,
        constants=fixed,
        fingerprint=data.fingerprint,
        stage=TrainingStage(grid.pipe, here, sum_, SCHEDULES[config.schedule], clock),
        update=update,
        state=State(grid, sum_, update.states, clock),
        learning_rate=learning_rate(config.lr or 0.0, config.warmup_steps, config.decay, config.decay_steps or 1),
    )


@dataclass
class RowsOfRun:
    """The rows of a run, looked at, and what they ask of a model."""

    shards: Shards
    tests: Evaluation
    task: Task
    normalization: Normalization | None
    notes: list[str]


def look_at_rows(config: Config, data: Dataset, grid: Grid, clock: Clock) -> RowsOfRun:
    """The rows to train and to test on, as the settings want them; collective over the grid.

    Raises, on all ranks alike, DataError or ConfigError for rows that cannot be used.
    """
    assert config.microbatches, "settings are resolved before a run is assembled"
    shards = Shards(
        data.train,
        config.microbatches,
        config.batch,
        config.seed,
        *part(grid.replica, grid.replicas, config.microbatches),
        dtype=config.dtype,
        shuffle=config.shuffle,
        block_rows=config.block_rows,
        strided=config.shards == "strided",
        transform=together(grid.comm, clock, functools.partial(find_transform, config, data)),
    )
    tests = Evaluation(data.test, config.eval_rows, grid, config.dtype)
    also, ignore = shards.transform is not None, data.ignored(config.ignore)
    seen = look_at(data, grid, clock, shards.rows(), tests.rows(), config.classes, both=also, ignore=ignore)
    shards.split, tests.split = (split.ignoring(ignore) for split in (data.train, data.test))
    notes = [*seen.notes, *look_for_starving(data, grid, clock, shards, seen.outputs)]
    normalization = None
    if config.normalize:
        normalization = measure(data, grid, clock, shards)
        shards.split, tests.split = (normalized(s, normalization, config.dtype) for s in (shards.split, tests.split))
    task = Task(data.train.x.shape, data.train.y.shape, data.classification, seen.outputs, seen.tokens, ignore)
    return RowsOfRun(shards, tests, task, normalization, notes)


def normalized(split_: Split, by: Normalization, dtype: DTypeLike) -> Split:
    """A split whose inputs are normalised."""
    return Split(NormalizedSource(split_.x, by, dtype), split_.y)


def build_stage(
    config: Config, task: Task, grid: Grid, clock: Clock, model: Model | None
) -> tuple[list[Layout], Metric, Part, str]:
    """The model, cut into stages: every stage's layout, the metric, what this rank's stage computes, and checksums
    of the model's constants as JSON; collective.

    Raises, on all ranks alike, ConfigError for a model, a loss or a metric that does not fit.
    """

    clock("model")

    def made() -> tuple[Loss, Metric, list[nn.Layer], list[StageDesign], dict[str, str]]:
        layers = model_for(config, task, model)
        stages = cut(config, layers, task.shape)
        return build_loss(config), build_metric(config, task.outputs), layers, stages, described(layers, config.seed)

    loss, metric, layers, stages, text = together(grid.comm, clock, made)
    launch.check_alike(grid.comm, clock, text, ONE_MODEL)
    clock("joining")
    stage = stages[grid.stage]
    here = Part(
        forward=functools.partial(nn.forward, stage.layers, learned=stage.learned),
        at=lambda training, step, m: nn.At(training, config.seed, step, m),
        objective=objective(loss, metric),
        x_shape=stage.x_shape,
        y_shape=stage.y_shape,
        dtype=config.dtype,
        learns=stage.learned or stage.layout.size > 0,
        learned=stage.learned,
    )
    return [stage.layout for stage in stages], metric, here, constants(layers)


def find_transform(config: Config, data: Dataset) -> Callable[..., Any] | None:
    """The user's function for rows to train on, if there is one. Raises ConfigError if it is none, and when called,
    DataError for labels that are no classes."""
    if not config.transform:
        return None
    function: Callable[..., Any] = named(config.transform, "--transform")
    called_with(function, f"--transform {config.transform}", "x", "y", "rng")
    lowest = (0 if data.ignored(config.ignore) is None else -1) if data.classification else -math.inf

    def transform(x: Any, y: Any, rng: np.random.Generator) -> tuple[Any, Any]:
        x, y = function(x, y, rng)
        if np.min(y, initial=0) < lowest:
            hint = "classes are numbered from 0 (-1 may mean no label if --ignore says that there are such rows)"
            raise DataError(f"--transform {config.transform} gave a label of {np.min(y)}, but {hint}")
        return x, y

    return transform


def read_ahead(config: Config, shards: Shards, grid: Grid) -> ReadAhead:
    """The training rows, read as far ahead as the settings say."""
    steps = steps_ahead(shards) if config.prefetch is None else config.prefetch
    return ReadAhead(shards, steps, config.steps or 0, grid.stage == 0, grid.stage == grid.stages - 1)


def gradients(layout: Layout, sum_: GradientSum) -> list[Gradients]:
    """For each of this replica's micro-batches what its backward pass writes into; the sum watches the last."""
    of_slot = [Gradients(layout, slot) for slot in sum_.slots]
    *slots, last = sum_.plan.slots
    return [*(of_slot[slot] for slot in slots), Gradients(layout, sum_.slots[last], sum_.complete)]


def place(
    config: Config, grid: Grid, layout: Layout, columns: int, clock: Clock
) -> tuple[GradientSum, Agree, list[str]]:
    """The stage's gradient sum and the agreement on the step record, in the memory that `config` asks for.

    Collective. `columns` are those of the record's table. Also returns what there is to say.
    """
    microbatches = config.microbatches or 1
    sum_arguments = (microbatches, layout.size, layout.blocks(), layout.dtype)
    private = functools.partial(agree, grid.comm)
    if config.allreduce == "mpi":
        return LibrarySum(grid.data, PrivateMemory(), [1] * grid.replicas, *sum_arguments), private, []
    slots = depth(grid.replica, grid.replicas, microbatches)
    vector_bytes = bytes_of(layout.size, layout.dtype)
    memory, problem = share(grid.comm, grid.local, slots * vector_bytes, vector_bytes, config.memory)
    board_bytes = Agreement.bytes_needed(grid.node.size, microbatches, columns)
    board, also = share(grid.comm, grid.node, 0, board_bytes, "private" if problem else config.memory)
    notes = [f"warning: {text}" for text in (problem, also) if text]
    nodes = [1] * grid.replicas if isinstance(memory, PrivateMemory) else grid.nodes
    bucket = math.ceil(config.bucket * 2**20 / layout.dtype.itemsize)
    sum_ = OrderedSum(grid.data, memory, nodes, *sum_arguments, bucket, clock)
    if isinstance(board, SharedMemory):
        return sum_, Agreement(grid, board, microbatches, columns), notes
    return sum_, private, notes

"""From settings to the parts of a run: data, model, stages, gradient sum, update, each in its place on the grid."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpiml.clock import Clock
from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.data.fingerprint import Fingerprint
from mpiml.data.normalize import Normalization
from mpiml.data.prefetch import ReadAhead
from mpiml.data.shards import Shards
from mpiml.nn import base as nn
from mpiml.nn import optimizers
from mpiml.nn.losses import Loss, Metric
from mpiml.nn.parameters import Layout
from mpiml.nn.rates import learning_rate
from mpiml.parallel.grid import Grid
from mpiml.parallel.schedules import SCHEDULES
from mpiml.parallel.stage import Part, TrainingStage
from mpiml.parallel.state import State
from mpiml.parallel.update import Update
from mpiml.partition import part
from mpiml.run.stragglers import Pace
from mpiml.team import share_cores
from mpiml.training.evaluation import Evaluation
from mpiml.training.model import Model, build_loss, build_metric, constants, described, model_for, objective
from mpiml.training.place import Agree, gradients, place
from mpiml.training.resolve import warnings
from mpiml.training.rows import look_at_rows, read_ahead
from mpiml.training.stages import StageDesign, cut
from mpiml.training.task import Task

ONE_MODEL = "all ranks must build the same model: what it draws must follow from --seed, and no order from a set"


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
        return Pace(grid.stages, [stop - start for start, stop in blocks], grid.team.launched, crowded)

    def record(self, entries: int, measured: bool = False) -> NDArray[np.float64]:
        """An empty table for that many micro-batches, with columns for the metric only if it is to be measured: of many
        outputs they may be thousands."""
        return np.zeros((entries, 2 + (self.metric.columns if measured else 0)))


def assemble(
    config: Config,
    data: Dataset,
    grid: Grid,
    model: Model | None,
    check: Callable[[Config, Sequence[Layout]], None] = lambda config, layouts: None,
) -> Run:
    """Build everything; collective over the grid. `config` is resolved.

    `check` looks at the stages' layouts, on rank 0, before memory for them is asked for.

    Raises, on all ranks alike, DataError or ConfigError for data or a model that do not fit.
    """
    team, clock = grid.team, grid.team.clock
    clock("joining")
    share_cores(grid.node.size * config.threads, grid.cores)
    rows = look_at_rows(config, data, grid)
    layouts, metric, here, fixed = build_stage(config, rows.task, grid, model)
    team.on_rank_0(lambda: check(config, layouts))
    layout = layouts[grid.stage]
    sum_, agreement, notes = place(config, grid, layout, 2 + metric.columns)
    layout.bind(sum_.values)
    team.together(functools.partial(layout.initialise, sum_.values, config.seed, *sum_.worker))
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


def build_stage(config: Config, task: Task, grid: Grid, model: Model | None) -> tuple[list[Layout], Metric, Part, str]:
    """The model, cut into stages: every stage's layout, the metric, what this rank's stage computes, and checksums
    of the model's constants as JSON; collective.

    Raises, on all ranks alike, ConfigError for a model, a loss or a metric that does not fit.
    """
    team = grid.team

    def made() -> tuple[Loss, Metric, list[nn.Layer], list[StageDesign], dict[str, str]]:
        layers = model_for(config, task, model)
        stages = cut(config, layers, task.shape)
        return build_loss(config), build_metric(config, task.outputs), layers, stages, described(layers, config.seed)

    with team.clock.doing("model"):
        loss, metric, layers, stages, text = team.together(made)
        team.check_alike(text, ONE_MODEL)
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

"""A run: its parts, each in its place on the grid, one step of training, and an evaluation; there is no other step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError
from mpiml.nn import optimizers
from mpiml.parallel import grid as grids
from mpiml.parallel.grid import Grid
from mpiml.parallel.record import Record, agree
from mpiml.parallel.schedules import SCHEDULES
from mpiml.parallel.stage import TrainingStage
from mpiml.parallel.state import State
from mpiml.parallel.update import Update
from mpiml.partition import part
from mpiml.run import log
from mpiml.run.stragglers import Pace
from mpiml.run.trace import clock_for
from mpiml.team import Team, share_cores
from mpiml.training.best import Best, best_of
from mpiml.training.decay import rate_of, remarks
from mpiml.training.evaluation import not_finite
from mpiml.training.look import Known
from mpiml.training.model import Model
from mpiml.training.noise import NoiseScale
from mpiml.training.place import Agree, BuiltModel, build_stage, gradients, place
from mpiml.training.resolve import Resolved, check_rows, resolve
from mpiml.training.rows import RunData, build_data, tried


class Due(NamedTuple):
    """What is to be done after a step, in this order: saving before an evaluation, which may fail."""

    log: bool = False
    save: bool = False
    evaluation: bool = False


@dataclass(frozen=True)
class Run:
    """The parts of a run on this rank.

    Attributes:
        agree: (rows of this rank's micro-batches, not finite, stop) -> the step record, the same on all ranks.
        rate: the learning rate of a step.
        best: of the evaluations so far.
        noise: what measures the noise scale, if that is to be measured.
        notes: what a person should know.
    """

    config: Resolved
    grid: Grid
    data: RunData
    model: BuiltModel
    stage: TrainingStage
    update: Update
    state: State
    agree: Agree
    rate: Callable[[int], float]
    best: Best
    noise: NoiseScale | None
    notes: list[str]

    def due(self, step: int) -> Due:
        """What is to be done after a step: all of it, where it is done at all, after the last."""
        config, last = self.config, step == self.config.steps
        every = (config.log_every, config.save_every, config.eval_every)
        return Due(*(steps > 0 and (last or step % steps == 0) for steps in every))

    def step(self, step: int, due: Due = Due(), stop: Callable[[], bool] = lambda: False) -> log.Step:  # noqa: B008
        """Forward, backward, agree, sum, update; collective.

        Args:
            due: what follows: the metric and the gradient's norm are only worked out to be logged, and what is shown or
                saved has been looked at before.
            stop: whether this rank asks to stop after the step; is asked once, when its gradients are there.

        Raises, on all ranks alike, NotFiniteError if the loss, the gradient or the weights are not finite, and
        ConfigError if a decay of the user's own is not.
        """
        began, clock, update = perf_counter(), self.grid.team.clock, self.update
        clock.step = step
        batches = self.data.ahead.batches(step)
        rows = self._rows(len(batches), measured=due.log)
        self.stage.train(step, batches, rows, measured=due.log)
        rate, wrong = self._rate(step)
        clock("communication")
        record = self.agree(rows, bool(wrong) or not update.finite, stop())
        if record.broken:
            self._check_rate(wrong)
        self._check_finite(step, record)
        shown = any(due) or record.stop
        norm = update.step(rate, record.weight, step, shown)
        self._check_finite(step, record, norm)
        if shown:  # else the next step's record will carry it
            self._check_finite(step + 1, agree(self.grid.comm, self._rows(0), not update.finite))
        clock("compute")
        score = self.model.metric.value(record.metric) if due.log else None
        noise = None
        if self.noise and due.log:
            noise = self.noise.measured(rows[:, 1], record.weight, norm or 0.0, update.rows(step))
        seconds = perf_counter() - began
        return log.Step(step, self.epoch(step), record.mean_loss, score, rate, norm, seconds, record.stop, noise)

    def evaluate(self, step: int, stop: Callable[[], bool]) -> log.Evaluation | None:
        """Score the rows to evaluate on with the weights after a step, or with their average if the run keeps one;
        collective. None if `stop` has said so meanwhile.

        Raises NotFiniteError, on all ranks alike, if the loss is not finite.
        """
        tests, metric = self.data.tests, self.model.metric
        with self.update.averaged():
            record = tests.score(self.stage, metric, self.grid.team.clock, step, stop)
        if record is None:
            return None
        score = metric.value(record.metric)
        return log.Evaluation(step, self.epoch(step), record.mean_loss, score, len(tests.split))

    def asked_to_stop(self, stop: bool) -> bool:
        """Whether any rank asks to stop before a step; collective."""
        return agree(self.grid.comm, self._rows(0), stop=stop).stop

    def epoch(self, step: int) -> int:
        """The number of the epoch that a step is in, from 1 on."""
        return (step - 1) // self.data.shards.steps_per_epoch + 1

    def pace(self) -> Pace:
        """What compares the times of this run's ranks."""
        grid, config = self.grid, self.config
        blocks = (part(replica, grid.replicas, config.microbatches) for replica in range(grid.replicas))
        crowded = grid.node.size * config.threads > grid.cores
        return Pace(grid.stages, [stop - start for start, stop in blocks], grid.team.launched, crowded)

    def free(self) -> None:
        """Give back what the MPI library holds for the run; collective."""
        self.stage.sum.free()
        self.state.values.free()
        self.grid.free()

    def _rate(self, step: int) -> tuple[float, ConfigError | None]:
        """The learning rate of a step, or what is wrong with a user's own decay there."""
        try:
            return self.rate(step), None
        except ConfigError as error:
            return math.nan, error

    def _check_rate(self, wrong: ConfigError | None) -> None:
        """End the run, on all ranks, if the learning rate of a step is wrong on any; collective."""

        def check() -> None:
            if wrong:
                raise wrong

        try:
            self.grid.team.together(check)
        except ConfigError:
            self.stage.sum.drop()
            raise

    def _rows(self, entries: int, measured: bool = False) -> NDArray[np.float64]:
        """Rows of the step record for that many micro-batches, with columns for the metric only if it is to be
        measured: of many outputs they may be thousands."""
        return np.zeros((entries, 2 + (self.model.metric.columns if measured else 0)))

    def _check_finite(self, step: int, record: Record, norm: float | None = None) -> None:
        """End the run, on all ranks, if the loss of this step or what its gradient did is not finite; collective."""
        if record.broken:
            error = not_finite(f"weights are not finite after step {step - 1}")
        elif record.bad_entry is not None:
            grid, entry = self.grid, record.bad_entry
            replica = (grid.replicas * (entry + 1) - 1) // self.config.microbatches
            rank = grid.team.launched[grid.rank_of(grid.stages - 1, replica)]
            error = not_finite(f"the loss is not finite in step {step} (micro-batch {entry}, rank {rank})", rank)
        elif norm is not None and not norm < float("inf"):
            error = not_finite(f"the gradient is not finite in step {step}")
        else:
            return
        self.stage.sum.drop()
        raise error


def assemble(
    config: Resolved,
    data: Dataset,
    grid: Grid,
    model: Model | None = None,
    check: Callable[[Config, BuiltModel], None] = lambda config, built: None,
    known: Known = Known(),  # noqa: B008
) -> Run:
    """Build everything; collective over the grid.

    `check` looks at the model, on rank 0, before memory for it is asked for. `known` is what earlier jobs of the run
    have learned of the data.

    Raises, on all ranks alike, DataError or ConfigError for data or a model that do not fit.
    """
    team, clock = grid.team, grid.team.clock
    clock("joining")
    share_cores(grid.node.size * config.threads, grid.cores)
    rate = rate_of(config, team)
    rows = build_data(config, data, grid, known)
    weighted = any(split.w is not None for split in (data.train, data.test))
    built, computation = build_stage(config, rows.task, grid, model, weighted)
    for preparation in rows.preparations:
        preparation.leave(built.integers)
    rows = tried(config, rows, grid)
    best = team.together(lambda: best_of(config, built.metric))
    team.together(lambda: check_rows(config, *built.least_rows, rows.shards.smallest(), len(data.train), grid.replicas))
    team.on_rank_0(lambda: check(config, built))
    layout = built.layouts[grid.stage]
    sum_, agreement, notes = place(config, grid, layout, 2 + built.metric.columns)
    values = sum_.values
    layout.bind(values.vector)
    memory = values.memory  # whose ranks share the work
    team.together(lambda: layout.initialise(values.vector, config.seed, memory.rank, memory.ranks))
    computation = dataclasses.replace(computation, gradients=gradients(layout, sum_))
    noise = NoiseScale(grid.comm, layout.blocks()) if config.noise_scale else None
    observe = noise.count if noise else None
    optimizer = optimizers.build(config.optimizer, config.momentum, config.weight_decay, config.betas)
    update = Update(team, grid.replica, sum_, optimizer, config.clip, rows.shards.rows_of, config.ema)
    return Run(
        config=config,
        grid=grid,
        data=rows,
        model=built,
        stage=TrainingStage(grid.pipe, computation, sum_, SCHEDULES[config.schedule], clock, observe),
        update=update,
        state=State(grid, values, update.states),
        agree=agreement,
        rate=rate,
        best=best,
        noise=noise,
        notes=[*rows.notes, *built.notes, *notes, *remarks(config, rate)],
    )


def unsaved(comm: MPI.Intracomm, config: Config, data: Dataset, model: Model | None = None) -> Run:
    """A run that keeps nothing, to measure its steps: without log, checkpoints and directory; collective."""
    grid = grids.build(Team(comm, clock_for(config.trace, comm.size)), config.pipe)
    resolved = resolve(config, len(data.train), data.classification, grid.replicas)
    return assemble(resolved, data, grid, model)

"""A run: its parts, each in its place on the grid, how they train a step or a round, and an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError
from mpiml.parallel import grid as grids
from mpiml.parallel.grid import Grid
from mpiml.parallel.record import agree
from mpiml.parallel.stage import TrainingStage
from mpiml.parallel.state import State
from mpiml.parallel.update import Update
from mpiml.partition import part
from mpiml.run import log
from mpiml.run.stragglers import Pace
from mpiml.run.trace import clock_for
from mpiml.team import Team, share_cores
from mpiml.training import devices
from mpiml.training.best import Best, best_of
from mpiml.training.calendar import Calendar, Due
from mpiml.training.decay import rate_of, remarks
from mpiml.training.look import Known
from mpiml.training.model import Model
from mpiml.training.noise import NoiseScale
from mpiml.training.place import BuiltModel, build_stage
from mpiml.training.resolve import Resolved, check_rows, resolve
from mpiml.training.rounds import Never, Round, Stop
from mpiml.training.rows import RunData, build_data, tried
from mpiml.training.workers import Ingredients, Learning

NEVER = Never()


class Advance(NamedTuple):
    """What ranks have done until all of them had one model again.

    Attributes:
        steps: that are done.
        due: what is to be done after them.
        stop: whether any rank asks to stop.
        left: the round that workers have left because of that, if they have; then no step is done.
    """

    steps: list[log.Step]
    due: Due
    stop: bool
    left: Round | None = None


@dataclass(frozen=True)
class Run:
    """The parts of a run on this rank.

    Attributes:
        calendar: what is due after which step.
        learning: who learns.
        best: of the evaluations so far.
        noise: what measures the noise scale, if that is to be measured.
        notes: what a person should know.
    """

    config: Resolved
    grid: Grid
    data: RunData
    model: BuiltModel
    calendar: Calendar
    learning: Learning
    best: Best
    noise: NoiseScale | None
    notes: list[str]

    @property
    def stage(self) -> TrainingStage:
        """This rank's, of the model that all have between rounds."""
        return self.learning.now.own[0].stage

    @property
    def update(self) -> Update:
        """This rank's, as `stage`."""
        return self.learning.now.own[0].update

    @property
    def state(self) -> State:
        """The vectors of the model that all have between rounds."""
        return self.learning.now.state

    def advance(self, step: int, stop: Stop = NEVER, moved: Callable[[int], None] = lambda step: None) -> Advance:
        """Train from `step` on until all ranks have one model: that step, or what is left of a round; collective.

        Args:
            stop: asks this rank to stop afterwards, or within a round.
            moved: is called with the number of each step of a round when this rank has done it.

        Raises, on all ranks alike, NotFiniteError if a loss, a gradient or weights are not finite, and ConfigError if a
        decay of the user's own is not.
        """
        self.learning.begin(step)
        if self.calendar.apart(step):
            return self._round(step, stop, moved)
        due = self.calendar.due(step)
        done = self.step(step, due, stop.now)
        return Advance([done], due, done.stop)

    def step(self, step: int, due: Due = Due(), stop: Callable[[], bool] = lambda: False) -> log.Step:  # noqa: B008
        """A step whose gradients are summed over all ranks; collective.

        Args:
            due: what follows: the metric and the gradient's norm are only worked out to be logged, and what is shown or
                saved has been looked at before.
            stop: whether this rank asks to stop after the step; is asked once, when its gradients are there.

        Raises as `advance`.
        """
        began, clock, now = perf_counter(), self.grid.team.clock, self.learning.now
        record, rate, norm, noise = now.own[0].step(step, self.data.ahead.batches(step), due.log, any(due), stop)
        return log.Step(
            step=step,
            epoch=self.epoch(step),
            loss=record.mean_loss,
            score=self.model.metric.value(record.metric) if due.log else None,
            rate=rate,
            norm=norm,
            seconds=perf_counter() - began,
            stop=record.stop,
            logged=due.log,
            shares=clock.shares() if due.log else (),
            sent=now.sent if due.log else 0,
            noise=noise,
        )

    def _round(self, step: int, stop: Stop, moved: Callable[[int], None]) -> Advance:
        """The steps of a round, of which `step` is the first."""
        began, steps, dues = perf_counter(), self.calendar.round_of(step), self.calendar.due
        logged = [step for step in steps if dues(step).log]
        left, self.learning.left = self.learning.left, None
        done = Round(self.learning.now, steps, logged, self.model.metric.columns, left)
        done.train(self.data.ahead.batches, stop, moved)
        done.meet(stop.now())
        if done.broken_off:
            return Advance([], Due(), True, done)
        done.share_out(perf_counter() - began)
        return Advance([self._of_round(done, step) for step in steps], dues(steps[-1]), done.stop)

    def _of_round(self, done: Round, step: int) -> log.Step:
        """A step of a round. Rank 0, which writes the log, knows all of it."""
        of_all, spent = done.summary(step), done.spent.get(step, done.began)
        logged, score, workers = step in done.reported.logged, None, None
        if of_all and logged:
            score = self.model.metric.value(of_all.metric)
            workers = {"loss": {"min": of_all.least, "max": of_all.largest}, "distance": done.distance}
        return log.Step(
            step=step,
            epoch=self.epoch(step),
            loss=of_all.loss / (of_all.weight or 1.0) if of_all else None,
            score=score,
            rate=of_all.rate if of_all else math.nan,
            norm=of_all.norm if of_all else None,
            seconds=done.seconds,
            stop=done.stop,
            logged=logged,
            shares=spent.shares,
            sent=spent.sent,
            workers=workers,
        )

    def evaluate(self, step: int, stop: Callable[[], bool]) -> log.Evaluation | None:
        """Score the rows to evaluate on with the weights after a step, or with their average if the run keeps one;
        collective. None if `stop` has said so meanwhile.

        Raises NotFiniteError, on all ranks alike, if the loss is not finite.
        """
        tests, metric = self.data.tests, self.model.metric
        with self.update.averaged(), self.model.device.named_memory("an evaluation"):
            record = tests.score(self.stage, metric, self.grid.team.clock, step, stop)
        if record is None:
            return None
        score = metric.value(record.metric)
        return log.Evaluation(step, self.epoch(step), record.mean_loss, score, len(tests.split))

    def asked_to_stop(self, stop: bool) -> bool:
        """Whether any rank asks to stop before a step; collective."""
        return agree(self.grid.comm, np.zeros((0, 2)), stop=stop).stop

    def epoch(self, step: int) -> int:
        """The number of the epoch that a step is in, from 1 on."""
        return (step - 1) // self.data.shards.steps_per_epoch + 1

    @property
    def crowded(self) -> bool:
        """Whether this node has more threads than cores."""
        return self.grid.node.size * self.config.threads > self.grid.cores

    def pace(self) -> Pace:
        """What compares the times of this run's ranks."""
        grid, config = self.grid, self.config
        replicas = range(grid.replicas)
        blocks = (part(replica, grid.replicas, config.microbatches, config.leaf) for replica in replicas)
        return Pace(grid.stages, [stop - start for start, stop in blocks], grid.team.launched, self.crowded)

    def free(self) -> None:
        """Give back what the MPI library holds for the run; collective."""
        self.learning.free()
        self.model.device.free()
        self.grid.free()


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
    if built.cuts:  # measured: a job that goes on has them too, and measures nothing
        config = replace(config, cuts=built.cuts, balance="operations")
    for preparation in rows.preparations:
        preparation.leave(built.integers)
    rows = tried(config, rows, grid)
    best = team.together(lambda: best_of(config, built.metric))
    team.together(lambda: check_rows(config, *built.least_rows, rows.shards.smallest(), len(data.train), grid.replicas))
    team.on_rank_0(lambda: check(config, built))
    calendar = Calendar(config)
    if config.noise_scale and (shared := [b.array for layout in built.layouts for b in layout.blocks() if b.array]):
        what = f"{shared[0]} stands in several layers, and a micro-batch's gradient of it is known to no stage"
        raise ConfigError(f"--noise-scale: {what}; leave --noise-scale out").on_all_ranks()
    blocks, device = built.layouts[grid.stage].blocks(), built.device
    noise = NoiseScale(grid.comm, blocks, device.vectors) if config.noise_scale else None
    learning = Learning(Ingredients(config, grid, built, computation, rows.shards, rate, noise), calendar)
    return Run(
        config=config,
        grid=grid,
        data=rows,
        model=built,
        calendar=calendar,
        learning=learning,
        best=best,
        noise=noise,
        notes=[
            *rows.notes,
            *devices.remarks(config, device),
            *built.notes,
            *learning.now.notes,
            *remarks(config, rate),
        ],
    )


def unsaved(comm: MPI.Intracomm, config: Config, data: Dataset, model: Model | None = None) -> Run:
    """A run that keeps nothing, to measure its steps: without log, checkpoints and directory; collective."""
    grid = grids.build(Team(comm, clock_for(config.trace, comm.size)), config.pipe)
    resolved = resolve(config, len(data.train), data.classification, grid.replicas)
    return assemble(resolved, data, grid, model)

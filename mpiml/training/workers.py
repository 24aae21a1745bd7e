"""Who learns in a run: all ranks together, or workers, which learn apart for the steps of a round and then meet."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.data.shards import Shards
from mpiml.nn import optimizers
from mpiml.nn.parameters import Layout
from mpiml.parallel.average import Average
from mpiml.parallel.gradient_sum import GradientSum, OrderedSum
from mpiml.parallel.grid import Grid
from mpiml.parallel.on_device import Mirror, SumOfOwners
from mpiml.parallel.recall import Recall
from mpiml.parallel.schedules import SCHEDULES
from mpiml.parallel.slices import Range
from mpiml.parallel.stage import Computation, TrainingStage
from mpiml.parallel.state import OUTER, VALUES, Part, State, parts
from mpiml.parallel.ties import Ties
from mpiml.parallel.tree import depth
from mpiml.parallel.update import Update
from mpiml.training.calendar import Calendar
from mpiml.training.device_memory import vectors_on_device
from mpiml.training.learner import Learner
from mpiml.training.noise import NoiseScale
from mpiml.training.place import Agree, BuiltModel, another, gradients, owns, place
from mpiml.training.resolve import Resolved
from mpiml.vectors import Vector

MOST_ARRAYS = 200_000  # of a checkpoint; the header of a safetensors file has room for some 100 bytes of each of 10^6


@dataclass(frozen=True)
class Ingredients:
    """What learners are made of.

    Attributes:
        grid: all ranks.
        computation: of this rank's stage.
        rate: the learning rate of a step.
        noise: what measures the noise scale, where gradients are summed, if that is to be measured.
    """

    config: Resolved
    grid: Grid
    model: BuiltModel
    computation: Computation
    shards: Shards
    rate: Callable[[int], float]
    noise: NoiseScale | None = None

    @property
    def layout(self) -> Layout:
        """Of this rank's stage."""
        return self.model.layouts[self.grid.stage]


class Learners:
    """All who learn at a step; collective to make.

    Attributes:
        grid: all ranks.
        own: the learners that this rank is part of: the only one; or its workers, which have their turns.
        first: the number of the first of them.
        average: between workers; None if there are none.
        state: the vectors of the model that all have at the end of a round.
        notes: what a person should know.
    """

    def __init__(self, of: Ingredients, workers: int, apart: bool, sent: int = 0):
        """`sent` are the bytes that this rank has sent to other nodes before."""
        config, self.grid, self._layout, self._before = of.config, of.grid, of.layout, sent
        groups = min(of.grid.replicas, workers)  # of replicas, each with one worker or more
        grid = of.grid.divided(groups) if groups > 1 else of.grid
        self.apart, self._of_group = apart, grid
        self.count = workers
        self.first = of.grid.replica * groups // of.grid.replicas * (workers // groups)
        microbatches = config.microbatches // workers
        self._check_memory(of, grid, microbatches, workers // groups)
        sum_, agree, self.notes = place(
            config, of.grid.comm, grid, self._layout, microbatches, 2 + of.model.metric.columns, of.model.device
        )
        others = range(workers // groups - 1)
        sums = [sum_, *(another(sum_, grid, self._layout, microbatches, config.leaf, of.model.device) for _ in others)]
        self.own = [self._learner(of, self.first + turn, one, agree) for turn, one in enumerate(sums)]
        self._layout.bind(sum_.weights)
        copies = [learner.update for learner in self.own]
        self.average: Average | None = None
        if apart:
            self.average = Average(of.grid, groups, workers, copies, config.memory, config.outer_step)
            self.recall = Recall(of.grid.comm)
        first = self.own[0]
        on_device = isinstance(sum_, (OrderedSum, SumOfOwners)) and of.model.device.there
        self._mirror = Mirror(of.model.device, sum_.values, first.update.states) if on_device else None
        self.state = self._state()
        self.arrays = sum(len(layout.parameters) for layout in of.model.layouts)  # of a vector of the whole model

    def _check_memory(self, of: Ingredients, grid: Grid, microbatches: int, copies: int) -> None:
        """Raise ConfigError, on all ranks alike, if a rank's vectors do not fit on its device; collective."""
        config, device = of.config, of.model.device
        if not device.there:
            return
        slots = depth(grid.replica, grid.replicas, microbatches, config.leaf)
        kept = len(optimizers.build(config.optimizer, 0.0, 0.0).states) + (config.ema > 0)
        owned = owns(config, of.grid.comm, device)
        needed = vectors_on_device(self._layout, slots, kept, owned, copies).total
        of.grid.team.together(lambda: device.check_memory(needed, "the model"))

    def _learner(self, of: Ingredients, number: int, sum_: GradientSum, agree: Agree) -> Learner:
        config, grid = of.config, self._of_group
        microbatches = config.microbatches // self.count
        first = number * microbatches
        optimizer = optimizers.build(config.optimizer, config.momentum, config.weight_decay, config.betas)

        @functools.lru_cache(1)  # it is asked for by each piece of the update
        def rows(step: int) -> int:
            return of.shards.total(step, first, first + microbatches)

        observe = of.noise.count if of.noise else None
        tied = any(parameter.places for layout in of.model.layouts for parameter in layout.parameters)
        ties = Ties(grid.pipe, sum_, grid.team.clock) if tied else None
        computation = dataclasses.replace(of.computation, gradients=gradients(self._layout, sum_))
        return Learner(
            name=f"worker {number}: " if self.apart else "",
            first=first,
            microbatches=microbatches,
            leaf=config.leaf,
            grid=grid,
            stage=TrainingStage(grid.pipe, computation, sum_, SCHEDULES[config.schedule], grid.team.clock, observe),
            update=Update(grid.team, grid.replica, sum_, optimizer, config.clip, rows, config.ema, ties),
            agree=agree,
            metric=of.model.metric,
            rate=of.rate,
            noise=of.noise,
            device=of.model.device,
        )

    @property
    def may_leave(self) -> bool:
        """Whether workers may leave a round: a checkpoint then has the arrays of each of them, for which its header
        must have room."""
        arrays = len(self.state.names) * self.arrays
        return self.count * arrays <= MOST_ARRAYS

    def initialise(self, seed: int) -> None:
        """Give all learners first values; collective."""
        first, *others = (learner.stage.sum.values for learner in self.own)
        memory, layout = first.memory, self._layout
        vector = self._mirror.vector if self._mirror else first.vector
        # Ranks that share memory share the work.
        self.grid.team.together(lambda: layout.initialise(vector, seed, memory.rank, memory.ranks))
        if self._mirror:
            self._mirror.put()
        for other in others:
            np.copyto(other.vector, first.vector)
        for each in (first, *others):
            each.renewed()

    def turn(self, learner: Learner) -> None:
        """Let the model be that of one of this rank's learners."""
        if len(self.own) > 1:
            self._layout.bind(learner.stage.sum.weights)

    def _state(self) -> State:
        first = self.own[0]
        values, of_worker = first.stage.sum.values, self._share(first)
        groups, each = self.count // len(self.own), of_worker[1]
        share = self.first // len(self.own) * each + of_worker[0], groups * each
        if mirror := self._mirror:
            held = parts(values, mirror.states, share, mirror.vector)
            return State(self.grid, tuple(held), held, mirror.put, mirror.fetch)
        held = parts(values, first.update.states, share) | self._outer()
        return State(self.grid, tuple(held), held, self._settle)

    def _share(self, learner: Learner) -> tuple[int, int]:
        """Which this rank is of how many that hold the same of a learner's vectors."""
        alike = learner.stage.sum.values.comm.size < learner.grid.replicas  # each of these has a copy of its own
        return (learner.grid.replica, learner.grid.replicas) if alike else (0, 1)

    def _outer(self) -> dict[str, Part]:
        """What this rank has of the velocity of the outer step, if there is one."""
        average = self.average
        return {OUTER: average.parts(average.velocity)} if average and average.velocity is not None else {}

    def _settle(self) -> None:
        """Give all learners of this rank, and all ranks of each, what the first has been given."""
        first, *others = self.own
        for other in others:
            np.copyto(other.stage.sum.values.vector, first.stage.sum.values.vector)
            for name, state in first.update.states.items():
                np.copyto(other.update.states[name], state)
        for learner in self.own:
            learner.stage.sum.values.publish()

    def round_state(self) -> State:
        """The vectors of a round that is not over: each worker's, and as the model's values those at its start."""
        assert self.average, "there are rounds of workers only"
        first, names = self.own[0], (VALUES, *self.own[0].update.states)
        held: dict[str, Part] = {}
        for number, learner in enumerate(self.own, self.first):
            of_worker = parts(learner.stage.sum.values, learner.update.states, self._share(learner))
            updated = learner.stage.sum.values.updated
            moving, fixed = _divided(of_worker[VALUES], updated)
            held |= {worker_name(number, name): part for name, part in (of_worker | {VALUES: moving}).items()}
            if learner is first:
                start = self.average.parts(self.average.start)
                once = fixed.collected if self.first == 0 else {}
                held[VALUES] = Part({**start.held, **fixed.held}, {**start.collected, **once})
        every = [worker_name(number, name) for number in range(self.count) for name in names]
        outer = self._outer()
        return State(self.grid, (VALUES, *outer, *every), held | outer, self._settle_round)

    def _settle_round(self) -> None:
        """Give all ranks of each worker its values, and all workers what nobody updates."""
        first = self.own[0].stage.sum.values
        for learner in self.own:
            values = learner.stage.sum.values
            np.copyto(values.vector[values.updated :], first.vector[values.updated :])
            values.publish()

    @property
    def sent(self) -> int:
        """The bytes that this rank has sent to other nodes."""
        everything = [learner.stage.sum.values for learner in self.own]
        everything += [self.average.values] if self.average else []
        return self._before + sum(values.sent for values in everything)

    def free(self) -> None:
        """Give back what the MPI library holds for them; collective."""
        for learner in self.own:
            learner.free()
        if self.average:
            self.average.free()
            self.recall.free()
        if self._of_group is not self.grid:
            self._of_group.free()


def worker_name(number: int, name: str) -> str:
    """What a vector of a worker is called."""
    return f"worker.{number}.{name}"


def _divided(values: Part, updated: int) -> tuple[Part, Part]:
    """What a rank has of the values that are updated, as a vector of their own, and of those that are not."""

    def those(views: Mapping[Range, Vector], fixed: bool) -> dict[Range, Vector]:
        return {of: view for of, view in views.items() if (of[0] >= updated) == fixed}

    moving, others = (Part(those(values.held, fixed), those(values.collected, fixed)) for fixed in (False, True))
    return moving, others


class Learning:
    """Those who learn at the step that comes next.

    Attributes:
        left: the accounts of workers in a round that was left, with which the next one goes on; None between rounds.
    """

    def __init__(self, of: Ingredients, calendar: Calendar):
        self._of, self._calendar = of, calendar
        self._now: Learners | None = self._at(1)
        self.now.initialise(of.config.seed)
        self.left: Mapping[str, NDArray[Any]] | None = None

    @property
    def now(self) -> Learners:
        """Those who learn."""
        assert self._now, "making them has failed"
        return self._now

    @property
    def saved_state(self) -> State:
        """The vectors that a checkpoint has: of all workers within a round that was left, else of the common model."""
        return self.now.round_state() if self.left else self.now.state

    def begin(self, step: int) -> None:
        """Be ready for a step; collective. When workers begin to learn apart, each goes on with the common model: while
        the memory of before is free and that of afterwards is not there yet, each rank has a copy of its part."""
        if self._calendar.apart(step) == self.now.apart:
            return
        common, sent = self.now.state.copied(), self.now.sent
        self.now.free()
        layout, self._now = self._of.layout, None
        layout.bind(np.zeros(layout.size, layout.dtype))  # takes no memory, and lets go of that of before
        self._now = self._at(step, sent)
        self.now.state.take([common])

    def names(self, step: int, left: bool) -> tuple[str, ...]:
        """The names of the vectors in a checkpoint of a step; with `left`, of one within a round that was left."""
        names = (VALUES, *self.now.own[0].update.states)
        config = self._of.config
        outer = [OUTER] if self._calendar.apart(step) and config.outer_step else []
        every = [worker_name(number, name) for number in range(config.workers or 1) for name in names]
        return (VALUES, *outer, *every) if left else (*names, *outer)

    def _at(self, step: int, sent: int = 0) -> Learners:
        apart = self._calendar.apart(step)
        return Learners(self._of, (apart and self._of.config.workers) or 1, apart, sent)

    def free(self) -> None:
        """Give back what the MPI library holds; collective."""
        if self._now:
            self._now.free()

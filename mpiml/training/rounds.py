"""A round: each worker takes its steps by itself; then all meet, learn what the others have done, and average."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mpiml.errors import ConfigError, OutputError, RunError
from mpiml.parallel import exact
from mpiml.parallel.stage import Batch
from mpiml.run import verified
from mpiml.run.checkpoint import check_kinds
from mpiml.training.calendar import Calendar
from mpiml.training.evaluation import not_finite
from mpiml.training.learner import Taken
from mpiml.training.workers import Learners

# Arrays of a checkpoint within a round: of each worker its last step, the weight of its rows and its lines; the steps
# that are logged; and the round's first and last step.
NAMES = "round.steps", "round.weights", "round.lines", "round.logged", "round.ends"
STEPS, WEIGHTS, LINES, LOGGED, ENDS = NAMES
BESIDE = 4  # columns of a line beside the metric's: loss, weight, learning rate, norm of the gradient


class Stop(Protocol):
    """What asks a rank to stop (mpiml.run.process.StopRequest)."""

    def now(self) -> bool:
        """Whether to stop after what is being done. To be asked once in each step or round."""

    def within(self, rest: float, step: float, copies: int) -> bool:
        """Whether to stop within a round, of which `rest` seconds are left, before another step of `step` seconds, and
        save `copies` of the model."""


class Never:
    """Nothing asks to stop."""

    def now(self) -> bool:
        return False

    def within(self, rest: float, step: float, copies: int) -> bool:
        return False


@dataclass
class Progress:
    """What a worker has done of a round.

    Attributes:
        done: its last step.
        weight: of its rows so far.
        lines: for each step that the round tells of, sums of loss and weight, learning rate, norm, the metric's sums.
    """

    done: int
    weight: float
    lines: NDArray[np.float64]


class Timed(NamedTuple):
    """A step on this rank: its seconds; and seconds in each of clock.SHARES, and bytes sent, up to its end."""

    seconds: float
    shares: list[float]
    sent: int


class Report(NamedTuple):
    """What a rank tells the others when they meet. `progress` is of its workers, from the first rank of each group."""

    problem: tuple[type[RunError], str, int | None] | None
    stop: bool
    asked: bool
    progress: list[Progress]


class Told(NamedTuple):
    """A step of all workers: sums over them, learning rate, mean norm of the gradient if it was computed, and the least
    and largest mean loss of a worker."""

    loss: float
    weight: float
    metric: list[float]
    rate: float
    norm: float | None
    least: float
    most: float


class Round:
    """A round of this rank's workers.

    Args:
        steps: of the round.
        logged: those to tell of in full; of the last one the loss is told in any case.
        columns: of the metric.
        left: the arrays of the round if it was left before, and goes on where all workers were, else None.
    """

    def __init__(
        self,
        learners: Learners,
        steps: range,
        logged: Sequence[int],
        columns: int,
        left: Mapping[str, NDArray[Any]] | None = None,
    ):
        self.learners, self.steps = learners, steps
        before = left[LOGGED].tolist() if left else logged
        # The last one may have been logged as the end of the run, which has been extended.
        self.logged = [step for step in before if step != steps[-1] or step in logged]
        self.told = sorted({*self.logged, steps[-1]})
        empty = np.zeros((len(self.told), BESIDE + columns))
        self.progress = [Progress(steps[0] - 1, 0.0, empty.copy()) for _ in learners.own]
        self.everyones: list[Progress] = []  # by worker, once all have met
        self.began = Timed(0.0, learners.grid.team.clock.shares(), learners.sent)
        self.times: dict[int, Timed] = {}
        self.resumed, self.stop, self.broken_off = left is not None, False, False
        self.distance: float | None = None
        self._problems: dict[int, RunError] = {}  # of workers that cannot go on
        assert learners.average, "workers have one"
        self._average = learners.average
        if left is None:
            self._average.begin()
            return
        for number, progress in enumerate(self.progress, learners.first):
            progress.done, progress.weight = int(left[STEPS][number]), float(left[WEIGHTS][number])
            progress.lines[...] = left[LINES][number]

    def train(
        self, batches: Callable[[int], Sequence[Batch]], stop: Stop, moved: Callable[[int], None] = lambda step: None
    ) -> None:
        """Take the steps that are left, or fewer if a rank asks to stop and they would take too long; after each call
        `moved` with its number."""
        clock, began = self.learners.grid.team.clock, perf_counter()
        first = min(progress.done for progress in self.progress) + 1

        def leave() -> bool:
            """Whether to leave the round after this step."""
            if step == self.steps[-1]:
                return False
            each = (perf_counter() - began) / (step - first + 1)
            recall = self.learners.recall
            if stop.within(each * (self.steps[-1] - step), each, self.learners.count):
                recall.ask()
            return recall.heard()

        for step in range(first, self.steps[-1] + 1):
            since = perf_counter()
            left = self._step(step, batches(step), leave)
            self.times[step] = Timed(perf_counter() - since, clock.shares(), self.learners.sent)
            moved(step)
            if left:
                self.learners.recall.ask()  # that of another rank of this worker may come too late: rank 0 leaves, too
                return

    def _step(self, step: int, batches: Sequence[Batch], leave: Callable[[], bool]) -> bool:
        """A step of each of this rank's workers. Returns whether they leave the round."""
        learners, left = self.learners, False
        share, logged = len(batches) // len(learners.own), step in self.logged
        for turn, (learner, progress) in enumerate(zip(learners.own, self.progress, strict=True)):
            if progress.done >= step or turn in self._problems:
                continue
            learners.turn(learner)
            own = batches[turn * share : (turn + 1) * share]
            try:
                taken = learner.step(step, own, logged, logged, leave)
            except RunError as error:
                if not error.everywhere:
                    raise
                self._problems[turn] = error
            else:
                self._note(progress, step, taken)
                left = left or taken.record.stop
        return left

    def _note(self, progress: Progress, step: int, taken: Taken) -> None:
        record = taken.record
        progress.done, progress.weight = step, progress.weight + record.weight
        if step in self.told:
            norm = -1.0 if taken.norm is None else taken.norm
            line = [record.loss, record.weight, taken.rate, norm, *record.metric]
            progress.lines[self.told.index(step), : len(line)] = line

    def meet(self, stop: bool) -> None:
        """Learn what all have done, and average unless some have left the round; collective over all ranks.

        Raises, on all ranks alike, what ended the steps of the first worker that could not go on.
        """
        learners, recall = self.learners, self.learners.recall
        team = learners.grid.team
        for turn, learner in enumerate(learners.own):
            if not learner.update.finite and turn not in self._problems:
                text = f"{learner.name}weights are not finite after step {self.progress[turn].done}"
                self._problems[turn] = not_finite(text, team.name)
        error = self._problems[min(self._problems)] if self._problems else None
        problem = (type(error), str(error), error.rank) if error else None
        progress = self.progress if learners.own[0].grid.comm.rank == 0 else []
        team.clock("communication")
        reports = team.allgather(Report(problem, stop, recall.spoke, progress))
        recall.settle(sum(report.asked for report in reports[1:]), reports[0].asked)
        for report in reports:
            if report.problem:
                kind, text, rank = report.problem
                raise kind(text).on_all_ranks(rank)
        self.stop = any(report.stop for report in reports)
        self.everyones = [one for report in reports for one in report.progress]
        self.broken_off = any(one.done < self.steps[-1] for one in self.everyones)
        counted = [one.weight > 0 for one in self.everyones]
        if not self.broken_off and any(counted):
            own = counted[learners.first : learners.first + len(learners.own)]
            self.distance = self._average.meet(own, sum(counted), bool(self.logged))
        learners.turn(learners.own[0])
        team.clock("compute")

    def share_out(self, seconds: float) -> None:
        """Let each step have taken an equal part of the seconds of the round on this rank, and what came after the last
        one belong to it. The times of a round that was left do not count: ranks have done different parts of it."""
        clock, each = self.learners.grid.team.clock, 0.0 if self.resumed else seconds / len(self.steps)
        self.times = {step: times._replace(seconds=each) for step, times in self.times.items()}
        self.times[self.steps[-1]] = Timed(each, clock.shares(), self.learners.sent)

    def of_step(self, step: int) -> Told | None:
        """What all workers have done in a step; None for steps that the round does not tell of."""
        if step not in self.told:
            return None
        lines = np.array([one.lines[self.told.index(step)] for one in self.everyones])
        loss, weight, *metric = exact.sums(lines[:, [0, 1, *range(BESIDE, lines.shape[1])]])
        norm = math.fsum(lines[:, 3]) / len(lines) if lines[:, 3].min() >= 0 else None
        means = [a / b for a, b in lines[:, :2].tolist() if b] or [0.0]
        return Told(loss, weight, metric, float(lines[0, 2]), norm, min(means), max(means))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a checkpoint within the round has besides vectors: the progress of all workers."""
        everyones = self.everyones
        return {
            STEPS: np.array([one.done for one in everyones]),
            WEIGHTS: np.array([one.weight for one in everyones]),
            LINES: np.array([one.lines for one in everyones]),
            LOGGED: np.array(self.logged, np.int64),
            ENDS: np.array([self.steps[0], self.steps[-1]]),
        }


def check_left(left: Mapping[str, NDArray[Any]], step: int, calendar: Calendar, columns: int, origin: str) -> None:
    """Raise ConfigError or OutputError unless a round can go on with these arrays of a checkpoint of a step.

    `columns`: of the metric.
    """
    kinds, workers = verified.kinds_of(left), calendar.config.workers or 0
    saved, logged = (left[name].size if name in left else 0 for name in (STEPS, LOGGED))
    if workers and saved not in (0, workers):
        raise ConfigError(
            f"--workers {workers}: {origin} was saved within a round of {saved} workers, which as many must finish; "
            f"go on with --workers {saved}, and change it once a step that is saved is the end of a round"
        )
    numbers = {STEPS: ("int64", (workers,)), LOGGED: ("int64", (logged,)), ENDS: ("int64", (2,))}
    check_kinds(origin, kinds, numbers | {WEIGHTS: ("float64", (workers,))})
    first, last = left[ENDS].tolist()
    told = len({*left[LOGGED].tolist(), last})
    check_kinds(origin, kinds, {LINES: ("float64", (workers, told, BESIDE + columns))})
    if last > calendar.steps:
        raise ConfigError(
            f"--steps {calendar.steps}: {origin} was saved within the round of steps {first} to {last}, which workers "
            f"must finish; at least {last} would work"
        )
    steps = calendar.round_of(step)
    within = all(first - 1 <= number <= last for number in left[STEPS].tolist())
    within = within and all(first <= number <= last for number in left[LOGGED].tolist())
    if not (calendar.apart(step) and (first, last) == (steps[0], steps[-1]) and within):
        raise OutputError(f"{origin} was saved within another round than steps {steps[0]} to {steps[-1]}")

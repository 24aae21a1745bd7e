"""A round: each worker takes its steps by itself; then all meet, learn what the others have done, and average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np

from mpiml.errors import NotFiniteError, RunError
from mpiml.parallel.record import agree
from mpiml.parallel.stage import Batch
from mpiml.training.accounts import UNKNOWN, Account, Arrays, Reported, Summary, summary
from mpiml.training.evaluation import not_finite
from mpiml.training.learner import Taken
from mpiml.training.workers import Learners


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


class Spent(NamedTuple):
    """What this rank has spent up to the end of a step: seconds in each of clock.SHARES, and bytes sent."""

    shares: list[float]
    sent: int


class Report(NamedTuple):
    """What a rank says to the others when they meet. `workers` are the last step and the weight of each of its workers,
    from the first rank of each group."""

    problem: tuple[type[RunError], str, int | None] | None
    stop: bool
    asked: bool
    workers: list[tuple[int, float]]


class Round:
    """A round of this rank's workers.

    Args:
        steps: of the round.
        logged: those to report in full; of the last one the loss is reported in any case.
        columns: of the metric.
        left: the arrays of the round if it was left before, and goes on where all workers were, else None.

    Attributes:
        spent: at the logged steps that this job has done, and at the end; `began` when the round began.
        seconds: of each step.
        workers: what each has done, once all have met; lines are on rank 0 only.
        stop: whether any rank asks to stop; broken_off: whether some workers have left the round because of that.
        distance: of the workers from their mean, if a step is logged.
    """

    def __init__(
        self, learners: Learners, steps: range, logged: Sequence[int], columns: int, left: Arrays | None = None
    ):
        assert learners.average, "workers have one"
        self.learners, self.steps, self._average = learners, steps, learners.average
        self.reported = Reported.of(steps, logged, left)
        self.accounts = [Account.before(steps[0], self.reported, columns) for _ in learners.own]
        self.workers: list[Account] = []
        self.began, self.seconds = self._spent(), 0.0
        self.spent: dict[int, Spent] = {}
        self.resumed, self.stop, self.broken_off = left is not None, False, False
        self.distance: float | None = None
        self._problems: dict[int, RunError] = {}  # of workers that cannot go on
        if left is None:
            self._average.begin()
            return
        for number, account in enumerate(self.accounts, learners.first):
            account.go_on(left, number)

    def train(
        self, batches: Callable[[int], Sequence[Batch]], stop: Stop, moved: Callable[[int], None] = lambda step: None
    ) -> None:
        """Take the steps that are left, or fewer if a rank asks to stop and they would take too long; after each call
        `moved` with its number."""
        learners, began = self.learners, perf_counter()
        first = min(account.done for account in self.accounts) + 1
        for step in range(first, self.steps[-1] + 1):
            leaves = self._step(step, batches(step), partial(self._leaves, step, first, began, stop))
            if step in self.reported.logged:
                self.spent[step] = self._spent()
            moved(step)
            if leaves:
                learners.recall.ask()  # that of another rank of this worker may come too late: rank 0 leaves, too
                return
            if len(self._problems) == len(learners.own):
                return

    def _leaves(self, step: int, first: int, began: float, stop: Stop) -> bool:
        """Whether this rank asks its worker to leave the round after a step, when it has been training since `began`,
        from step `first` on."""
        left, learners = self.steps[-1] - step, self.learners
        if not left or not learners.may_leave:
            return False
        each = (perf_counter() - began) / (step - first + 1)
        if stop.within(each * left, each, learners.count):
            learners.recall.ask()
        return learners.recall.heard()

    def _step(self, step: int, batches: Sequence[Batch], leaves: Callable[[], bool]) -> bool:
        """A step of each of this rank's workers. Returns whether they leave the round."""
        learners, leaving = self.learners, False
        share, logged = len(batches) // len(learners.own), step in self.reported.logged
        for turn, (learner, account) in enumerate(zip(learners.own, self.accounts, strict=True)):
            if account.done >= step or turn in self._problems:
                continue
            learners.turn(learner)
            own = batches[turn * share : (turn + 1) * share]
            try:
                taken = learner.step(step, own, logged, logged, leaves)
            except RunError as error:
                if not error.everywhere:
                    raise
                self._problems[turn] = error
            else:
                self._note(account, step, taken)
                leaving = leaving or taken.record.stop
        return leaving

    def _note(self, account: Account, step: int, taken: Taken) -> None:
        record = taken.record
        account.done, account.weight = step, account.weight + record.weight
        if step in self.reported.steps:
            norm = UNKNOWN if taken.norm is None else taken.norm
            line = [record.loss, record.weight, taken.rate, norm, *record.metric]
            account.lines[self.reported.steps.index(step), : len(line)] = line

    def meet(self, stop: bool) -> None:
        """Learn what all have done, and average unless some have left the round; collective over all ranks.

        Raises, on all ranks alike, what ended the steps of the first worker that could not go on, and NotFiniteError if
        the outer step does not end at finite values.
        """
        learners, recall, team = self.learners, self.learners.recall, self.learners.grid.team
        own = self.accounts if learners.own[0].grid.comm.rank == 0 else []
        done = [(account.done, account.weight) for account in own]
        team.clock("communication")
        reports = team.allgather(Report(self._problem(), stop, recall.spoke, done))
        recall.settle(sum(report.asked for report in reports[1:]), reports[0].asked)
        for report in reports:
            if report.problem:
                kind, text, rank = report.problem
                raise kind(text).on_all_ranks(rank)
        self.stop = any(report.stop for report in reports)
        self._gather(own, reports)
        self.broken_off = any(worker.done < self.steps[-1] for worker in self.workers)
        counted = [worker.weight > 0 for worker in self.workers]
        if not self.broken_off and any(counted):
            here = counted[learners.first : learners.first + len(learners.own)]
            self.distance = self._average.meet(here, sum(counted), bool(self.reported.logged))
            self._check_outer_step()
        learners.turn(learners.own[0])
        team.clock("compute")

    def _problem(self) -> tuple[type[RunError], str, int | None] | None:
        """What has ended the steps of the first of this rank's workers that could not go on."""
        for turn, learner in enumerate(self.learners.own):
            if not learner.update.finite and turn not in self._problems:
                text = f"{learner.name}weights are not finite after step {self.accounts[turn].done}"
                self._problems[turn] = not_finite(text, self.learners.grid.team.name)
        if not self._problems:
            return None
        error = self._problems[min(self._problems)]
        return type(error), str(error), error.rank

    def _gather(self, own: Sequence[Account], reports: Sequence[Report]) -> None:
        """Know what all workers have done; only rank 0, which writes them, their lines. `own` are sent by this rank."""
        team, shape = self.learners.grid.team, self.accounts[0].lines.shape
        counts = [len(report.workers) * shape[0] * shape[1] for report in reports]
        lines = np.zeros((sum(len(report.workers) for report in reports), *shape))
        sent = np.concatenate([np.zeros((0, *shape)), *([account.lines] for account in own)])
        team.wait([team.comm.Igatherv(sent, (lines, counts) if team.rank == 0 else None)])
        every = [worker for report in reports for worker in report.workers]
        self.workers = [Account(*worker, line) for worker, line in zip(every, lines, strict=True)]

    def _check_outer_step(self) -> None:
        """End the run if the outer step has led to values that are not finite on any rank; collective."""
        if not self._average.outer:
            return
        grid = self.learners.grid
        if agree(grid.comm, np.zeros((0, 2)), not self._average.finite).broken:
            where = f"weights are not finite after the outer step that ends step {self.steps[-1]}"
            raise NotFiniteError(f"{where}; a smaller --outer-lr or --outer-momentum may help").on_all_ranks()

    def share_out(self, seconds: float) -> None:
        """Let each step have taken an equal part of the seconds of the round on this rank, and what came after the last
        one belong to it. The times of a round that was left do not count: ranks have done different parts of it."""
        self.seconds = 0.0 if self.resumed else seconds / len(self.steps)
        self.spent[self.steps[-1]] = self._spent()

    def _spent(self) -> Spent:
        return Spent(self.learners.grid.team.clock.shares(), self.learners.sent)

    def summary(self, step: int) -> Summary | None:
        """What all workers have done in a step, on rank 0; None elsewhere, and for steps that are not reported."""
        if step not in self.reported.steps or self.learners.grid.comm.rank:
            return None
        number = self.reported.steps.index(step)
        return summary(np.array([worker.lines[number] for worker in self.workers]))

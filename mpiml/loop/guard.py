"""A guard around a program of one's own: whatever one rank does, no other waits for ever, and the reason is said."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

import numpy as np
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.errors import SAVED, ConfigError, DirectoryError, known_to_all
from mpiml.flags import seconds
from mpiml.loop.checks import check_comm, check_path, check_stall_timeout
from mpiml.run import alarm, failure, one_job, start
from mpiml.run.deadline import Deadline
from mpiml.run.directory import CONFIG, RunDirectory
from mpiml.run.process import SIGNALS, StopRequest
from mpiml.run.result import Result, read_result, update_result, write_result
from mpiml.run.watch import Watch
from mpiml.team import Team

PROGRAM = Path(sys.argv[0]).name.removeprefix("-c") or "python"
P = ParamSpec("P")
T = TypeVar("T")
guards: list[guard] = []  # that this process is in, the innermost last
_unguarded = Clock()
start.end_all_on_errors(PROGRAM)  # also of a rank that does not come to the guard


def clock() -> Clock:
    """The clock of the guard that this process is in: what a rank does with it is progress."""
    return guards[-1].clock if guards else _unguarded


def called(method: Callable[P, T]) -> Callable[P, T]:
    """A method of a part, collective, which messages name while a rank is in it."""
    name = f"{method.__qualname__.removesuffix('.__init__')}()"

    @wraps(method)
    def named(*inputs: P.args, **settings: P.kwargs) -> T:
        with clock().calling(name):
            return method(*inputs, **settings)

    return named


def deadlines() -> list[Deadline]:
    """Those of all guards that this process is in, which have to know how long saving takes."""
    return [one._stop.deadline for one in guards]


def _leave_to_ranks() -> None:
    """In a forked process, such as a DataLoader's worker, which is no rank: let go of its errors, signals and end."""
    threading.excepthook = threading.__excepthook__
    while guards:
        guards.pop()._stop.__exit__()


os.register_at_fork(after_in_child=_leave_to_ranks)


class guard:
    """A block that all ranks enter, and in which no rank waits for ever; collective to enter and to leave.

        with guard(out="runs/mine") as job:
            for step in range(first, last + 1):
                ...
                if job.stop:
                    break
        sys.exit(job.exit_code)

    An error of one rank, sys.exit included, ends the whole job; so does a rank that makes no progress for
    `stall_timeout` seconds, that is stopped or killed, or that leaves the block while all others wait; and a launcher
    that is gone. The reason, which names the rank, is printed and written to result.json in `out`. Progress is what
    this package's parts do, and reading and writing files; for long work of one's own there is `alive`.

    Errors of this package that all ranks raise alike leave the block as SystemExit with their exit code, printed once.
    In a job of one rank any error does.

    Args:
        comm: the ranks (default: all).
        out: a directory for result.json, which one job at a time holds (default: none). That of rank 0 counts.
        stall_timeout: in seconds; 0: no rank is judged by its progress, and the rest is as without.
        time_limit: from now on, as "90" (minutes), "90:00" or "1:30:00": before it is up `stop` becomes true, with the
            time left for one more step and a save by `Checkpoints`. SLURM's limit always counts.

    Attributes:
        exit_code: 0, or 75 once `stop` has been true: what a job script expects of a job that can go on.
        team: the ranks of the guard, by a communicator of its own.
        at_end: functions that are called, in this order, when all ranks leave without an error.

    Raises, as SystemExit, ConfigError for settings that do not work or that ranks give differently, and if it is
    entered twice; DirectoryError if another job holds `out` or it holds a run of mpiml.train; OutputError if it cannot
    be written.
    """

    entry = "enter the guard"  # what ranks wait for all to do, and
    hint = "if it was at work of its own: ask job.stop in each step, or do it in `with job.alive(...):`"  # in a stall

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        out: str | os.PathLike[str] | None = None,
        stall_timeout: float = 600.0,
        time_limit: str | None = None,
    ):
        self.out, self.stall_timeout, self.time_limit = out, stall_timeout, time_limit
        self.clock, self.exit_code = clock() if guards else Clock(), 0
        self.team = Team(check_comm(comm), self.clock)
        self._failure = failure.Guard(self.team, PROGRAM)
        self._directory: RunDirectory | None = None  # on rank 0
        self._stop = StopRequest()
        self._takes_signals = self._entered = False
        self.at_end: list[Callable[[], None]] = []

    def __enter__(self) -> guard:
        if self._entered:
            with guard(self._failure.comm, stall_timeout=self.stall_timeout):  # which reports it
                raise ConfigError("this guard has been entered before: make another one").on_all_ranks()
        self._entered = True
        if signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, None) or guards:  # else it is the program's own
            self._stop.take([signal.SIGUSR1])
        alarm.start(PROGRAM, [alarm.FLAG, str(self.stall_timeout)])
        alarm.during(f"waiting for all ranks to {self.entry}")
        outer = guards[-1]._failure if guards else None
        guards.append(self)
        self._failure.__enter__()
        try:
            own, request = self.team.comm.Idup()  # the program's messages and these do not meet
            self.team.wait([request])
            self.team = Team(MPI.Intracomm(own), self.clock)
            one_job.check_size(MPI.COMM_WORLD.size)
            self._stop.deadline = self.team.together(self._checked)
            settings = {"stall_timeout": str(float(self.stall_timeout)), "time_limit": str(self.time_limit)}
            self.team.check_alike(one_job.software() | settings)
            self.team.on_rank_0(lambda: self._open(outer))
            self._failure.run, self._failure.token = self.team.broadcast((self._failure.run, self._failure.token))
            self._watch = Watch(self.team.comm.Dup(), self.clock, self.stall_timeout, self._failure.fail, self.hint)
            self._watch.__enter__()
        except BaseException as error:
            self._stop.__exit__()
            self._leave(error)
            raise
        self.clock("compute")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ending = error
        try:
            self._stop.__exit__()
            if error is None:
                ending = self._finished()
            self._watch.__exit__(type(ending) if ending else None, ending, trace)
            if ending is None:
                self.team.on_rank_0(self._ended)
        except BaseException as failed:
            ending = failed
        self._leave(ending)
        if ending is not None and ending is not error:
            raise ending

    def fail(self, error: BaseException) -> None:
        """Report an error of this rank alone, and end the job; does not return."""
        self._failure.fail(error)

    def _finished(self) -> BaseException | None:
        """Make the calls `at_end`. Returns the error of one."""
        try:
            while self.at_end:
                self.at_end.pop(0)()
        except BaseException as error:
            return error
        return None

    @property
    @called
    def stop(self) -> bool:
        """Whether any rank is asked to stop: by SIGUSR1, SIGTERM, Ctrl-C, or because its time is nearly up. To be asked
        once in each step; collective, so that all ranks leave off after the same step.

        From the first time on, these signals are such requests. Before, SIGTERM and Ctrl-C do what they do without a
        guard; SIGUSR1, unless the program has a handler of its own, is remembered from the beginning of the block on.
        """
        assert self._entered, "the guard has not been entered"
        if not self._takes_signals:
            self._takes_signals = True
            self._stop.take(SIGNALS)
        asked = np.array([self._stop.now()], np.int32)
        self.team.wait([self.team.comm.Iallreduce(MPI.IN_PLACE, asked, MPI.MAX)])
        self.exit_code = SAVED if asked[0] else self.exit_code
        return bool(self.exit_code)

    def alive(self, what: str) -> AbstractContextManager[None]:
        """A sign of life: this rank has got on with work of its own. As a block, `with job.alive("evaluation"):`, for
        work that is no stall however long it takes."""
        self.clock.progress()
        return self._patient(what)

    @contextmanager
    def _patient(self, what: str) -> Iterator[None]:
        before, self.clock.patient = self.clock.patient, what
        try:
            yield
        finally:
            self.clock.patient = before
            self.clock.progress()

    def _checked(self) -> Deadline:
        """Check the settings."""
        check_stall_timeout(self.stall_timeout)
        if not isinstance(self.time_limit, (str, type(None))):
            raise ConfigError(f"time_limit {self.time_limit!r}: must be a text, such as '90:00', minutes:seconds")
        return Deadline(seconds(self.time_limit, "time_limit"), os.environ)

    def _open(self, outer: failure.Guard | None) -> None:
        """Rank 0: hold the directory. A guard without one inside another reports to the outer one's."""
        if self.out is None:
            if outer:
                self._failure.run, self._failure.token = outer.run, outer.token
            return
        self._directory = RunDirectory(str(check_path("out", self.out)))
        path = self._directory.path
        if (path / CONFIG).exists():
            raise DirectoryError(f"{path} holds a run of mpiml.train: choose another directory")
        self._directory.tidy()
        self._failure.run, self._failure.token = path, self._directory.token
        before = {key: value for key, value in read_result(path).items() if key != "traceback"}
        running: Result = {"status": "running", "exit_code": None, "reason": None, "rank": None}
        write_result(path, before | running | {"ranks": self.team.size})

    def _ended(self) -> None:
        """Rank 0: write how the block has ended, without an error."""
        if self._directory:
            outcome: Result = {"status": "done", "exit_code": self.exit_code}
            if self.exit_code:
                outcome = {"status": "stopped", "exit_code": self.exit_code, "reason": self._stop.reason()}
            if self.clock.step:
                outcome["step"] = self.clock.step
            update_result(self._directory.path, outcome)

    def _leave(self, error: BaseException | None) -> None:
        """Undo `__enter__`; report an error."""
        try:
            self._failure.__exit__(type(error) if error else None, error, None)
        finally:
            alarm.off()
            guards.remove(self)
            if self._directory:
                self._directory.close()
        if known_to_all(error, self.team.size):
            if self.team.comm != self._failure.comm:
                self.team.comm.Free()
            if error is not None and not guards:  # else the outer one sees it, too
                sys.exit(failure.exit_code(error))  # reported already

"""A guard around a program of one's own: whatever one rank does, no other waits for ever, and the reason is said."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.errors import SAVED, ConfigError, RunError, known_to_all
from mpiml.flags import seconds
from mpiml.run import alarm, failure, one_job
from mpiml.run.deadline import Deadline
from mpiml.run.directory import RunDirectory
from mpiml.run.process import StopRequest
from mpiml.run.result import Result, read_result, update_result, write_result
from mpiml.run.watch import Watch
from mpiml.team import Team, wait

PROGRAM = Path(sys.argv[0]).name or "python"
_guards: list[guard] = []  # that this process is in, the innermost last
_unguarded = Clock()


def clock() -> Clock:
    """The clock of the guard that this process is in: what a rank does with it is progress."""
    return _guards[-1].clock if _guards else _unguarded


def for_the_rest(comm: MPI.Intracomm, stall_timeout: float) -> guard:
    """The guard that this process is in; outside of any, a new one until the program ends. Collective.

    The new one leaves signals alone, and is not entered by a rank that is alone.
    """
    if _guards:
        return _guards[-1]
    one = guard(comm, stall_timeout=stall_timeout)
    if comm.size == 1:
        return one
    one.takes_signals = False
    one.__enter__()
    shown = sys.excepthook

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if one not in _guards:
            shown(kind, error, trace)
        elif known_to_all(error, comm.size):
            one.__exit__(kind, error, trace)
        else:
            one.fail(error)

    def leave() -> None:
        try:
            if one in _guards:
                one.__exit__(None, None, None)
        except SystemExit as ended:  # of all ranks; Python would print it, and end with the code it has
            sys.stdout.flush()
            MPI.Finalize()
            os._exit(int(ended.code or 0))

    sys.excepthook = uncaught
    atexit.register(leave)
    return one


class guard:
    """A block that all ranks enter, and in which no rank waits for ever; collective to enter and to leave.

        with guard(out="runs/mine") as job:
            for step in range(first, last + 1):
                ...
                if job.stop:
                    break

    An error of one rank, sys.exit included, ends the whole job; so does a rank that makes no progress for
    `stall_timeout` seconds, that is stopped or killed, and a launcher that is gone. The reason, which names the rank,
    is printed and written to result.json in `out`. Progress is what this package's parts do, and reading and writing
    files; for long work of one's own there is `alive`.

    Errors of this package that all ranks raise alike leave the block as SystemExit with their exit code, printed once.

    Args:
        comm: the ranks (default: all).
        out: a directory for result.json, which one job at a time holds (default: none).
        stall_timeout: in seconds; 0: no rank is judged by its progress.
        time_limit: as of mpiml.train: `stop` is true before the time is up. SLURM's limit always counts.
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        out: str | os.PathLike[str] | None = None,
        stall_timeout: float = 600.0,
        time_limit: str | None = None,
    ):
        if not (0 <= stall_timeout < float("inf")):
            raise ConfigError(f"stall_timeout {stall_timeout}: must be a number of seconds, at least 0")
        self.out, self.stall_timeout = None if out is None else Path(out), stall_timeout
        self.clock = clock() if _guards else Clock()
        self.team = Team(MPI.COMM_WORLD if comm is None else comm, self.clock)
        self._failure = failure.Guard(self.team, PROGRAM)
        self._stop = StopRequest(Deadline(seconds(time_limit, "time_limit"), os.environ))
        self._directory: RunDirectory | None = None  # on rank 0
        self.stopped = False
        self.takes_signals = True
        self.at_end: list[Callable[[], None]] = []  # called, in this order, when ranks leave without an error

    def __enter__(self) -> guard:
        _guards.append(self)
        alarm.start(PROGRAM, [alarm.FLAG, str(self.stall_timeout)])
        alarm.during("starting")
        self._failure.__enter__()
        try:
            one_job.check_size(MPI.COMM_WORLD.size)
            self.team.check_alike(one_job.software())
            self.team.on_rank_0(self._open)
            self._failure.run, self._failure.token = self.team.broadcast((self._failure.run, self._failure.token))
            self._watch = Watch(self.team.comm.Dup(), self.clock, self.stall_timeout, self._failure.fail)
        except BaseException as error:
            self._leave(error)
            raise
        self._watch.__enter__()
        if self.takes_signals:
            self._stop.__enter__()
        self.clock("compute")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.__exit__()
        if error is None:
            error = self._end()
        self._watch.__exit__(type(error) if error else None, error, trace)
        self._leave(error)

    def fail(self, error: BaseException) -> None:
        """Report an error of this rank alone, and end the job; does not return."""
        self._failure.fail(error)

    @property
    def stop(self) -> bool:
        """Whether any rank is asked to stop: by SIGUSR1, SIGTERM, Ctrl-C, or because its time is nearly up. To be asked
        once in each step; collective, so that all ranks leave off after the same step."""
        asked = np.array([self._stop.now()], np.int32)
        with self.clock.doing("joining"):
            wait([self.team.comm.Iallreduce(MPI.IN_PLACE, asked, MPI.MAX)])
        self.stopped = self.stopped or bool(asked[0])
        return self.stopped

    @contextmanager
    def alive(self, what: str) -> Iterator[None]:
        """A block of long work of one's own, which is no stall however long it takes; `what` is for messages."""
        self.clock.patient = what
        try:
            yield
        finally:
            self.clock.patient = ""
            self.clock.progress()

    def _open(self) -> None:
        """Rank 0: hold the directory."""
        if self.out is None:
            return
        self._directory = RunDirectory(str(self.out))
        self._failure.run, self._failure.token = self._directory.path, self._directory.token
        self._directory.prepare(resume=True)
        before = {key: value for key, value in read_result(self._directory.path).items() if key != "traceback"}
        running: Result = {"status": "running", "exit_code": None, "reason": None, "rank": None}
        write_result(self._directory.path, before | running | {"ranks": self.team.size})

    def _end(self) -> BaseException | None:
        """Make the calls `at_end`. Returns the error of one."""
        try:
            while self.at_end:
                self.at_end.pop(0)()
        except BaseException as error:
            return error
        return None

    def _ended(self) -> None:
        """Rank 0: write how the block has ended, without an error."""
        if self._directory:
            outcome: Result = {"status": "done", "exit_code": 0}
            if self.stopped:
                outcome = {"status": "stopped", "exit_code": SAVED, "reason": self._stop.reason()}
            update_result(self._directory.path, outcome)

    def _leave(self, error: BaseException | None) -> None:
        """Undo `__enter__`; report an error."""
        try:
            if error is None:
                self.team.on_rank_0(self._ended)
        except RunError as failed:
            error = failed
        try:
            self._failure.__exit__(type(error) if error else None, error, None)
        finally:
            _guards.remove(self)
            if self._directory:
                self._directory.close()
        if error is not None and known_to_all(error, self.team.size):
            sys.exit(failure.exit_code(error))  # reported already, by one line

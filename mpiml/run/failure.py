"""Ending the whole job when one rank fails, with the reason in result.json and on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from mpi4py import MPI

from mpiml.clock import BLOCKED_ON_OTHERS, Clock
from mpiml.errors import DirectoryError, OutputError, RunError, StallError, known_to_all
from mpiml.run import alarm, lock
from mpiml.run.alarm import ABORT_GRACE, within
from mpiml.run.console import say
from mpiml.run.directory import FAILED
from mpiml.run.one_job import check_size
from mpiml.run.result import Result, read_result, update_result
from mpiml.run.start import FORWARDING, end_job
from mpiml.team import Team

# Seconds that a failing process allows ...
WRITING = 5.0  # for writing result.json,
OTHERS = 3.0  # of these for waiting until another rank has written it,
SAYING = 1.0  # and for printing.


class Guard:
    """A block of code in which the failure of one rank leaves no other rank waiting.

    An error that all ranks raise together (RunError.everywhere) passes through, and rank 0 reports it. Any other error,
    in any thread of any rank, sys.exit included, is reported by its rank and ends the job by MPI_Abort; in a job of one
    rank it is reported and passes through. The same holds for a StallError of the alarm (mpiml.run.alarm).

    Attributes:
        run: the run directory, once it is known.
        token: of this job, for its lock (mpiml.run.lock); the same on all ranks.
    """

    def __init__(self, team: Team, program: str):
        self.team, self.comm, self.clock, self.program = team, team.comm, team.clock, program
        self.run: Path | None = None
        self.token = ""
        self._lock = threading.Lock()

    def __enter__(self) -> Guard:
        self._thread_hook = threading.excepthook
        threading.excepthook = self._thread_failed
        self._alarm = alarm.report_to(self.fail, lambda: self.clock.activity in BLOCKED_ON_OTHERS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        threading.excepthook = self._thread_hook
        alarm.report_to(*self._alarm)
        if error is None:
            return
        if not known_to_all(error, self.comm.size):
            self.fail(error)
        elif self.comm.rank == 0 and not getattr(error, "silent", False):
            self._report(error)

    def fail(self, error: BaseException) -> None:
        """Report an error that only this rank knows of, and end the job; does not return."""
        with self._lock:
            alarm.end_for_certain(ABORT_GRACE)  # first of all: anything may hang now
            with contextlib.suppress(BaseException):
                self._report(error)
            end_job(exit_code(error))

    def _thread_failed(self, what: threading.ExceptHookArgs) -> None:
        error = what.exc_value or what.exc_type()
        error.add_note(f"in {what.thread.name if what.thread else 'a thread'}")
        self.fail(error)

    def _report(self, error: BaseException) -> None:
        """Write the reason to result.json, unless another rank has, and print it; neither may hang or fail for long."""
        known = error if isinstance(error, RunError) else None
        # Its message needs no rank, step and activity: it is not about this rank, or names them itself.
        complete = known and (known.everywhere or known.rank is not None or isinstance(known, StallError))
        outcome: Result = {"status": "failed", "exit_code": exit_code(error), "reason": describe(error)}
        outcome["rank"] = known.rank if known and complete else self.team.name
        if self.clock.step:  # else the step of the last job stays
            outcome["step"] = self.clock.step
        text = f"{self.program}: {outcome['reason']}"
        if not complete and self.comm.size > 1:
            text += f" (rank {self.team.name}, step {self.clock.step}, {self.clock.activity})"
        if not known and not isinstance(error, KeyboardInterrupt):
            outcome["traceback"] = within(SAYING, lambda: "".join(traceback.format_exception(error)), "")
            text += f"\n{outcome['traceback']}".rstrip()
        alone = not known_to_all(error, self.comm.size)
        unanswered: str | None = "its file system does not answer"
        taken = isinstance(error, DirectoryError)  # the directory is another job's
        problem = "" if taken else within(WRITING, lambda: self._write(outcome, alone), unanswered)
        if problem:
            text += f"\n{self.program}: and result.json could not be written: {problem}"
        if problem is None:
            time.sleep(SAYING)  # another rank reports its failure and ends the job
        elif not getattr(error, "said", False):
            within(SAYING, lambda: say(text, sys.stderr), None)
        with contextlib.suppress(AttributeError):
            error.said = True  # type: ignore[attr-defined] # for a guard around this one

    def _write(self, outcome: Result, alone: bool) -> str | None:
        """Write result.json. Returns "", or why it could not be written, or None if another rank has written it, which
        may happen if each rank is `alone` with its error."""
        try:
            if self.run is None or not self.run.is_dir():
                return ""
            lock.check(self.run, self.token)
            if alone and not self._is_first() and self._written_by_another():
                return None
            update_result(self.run, outcome)
        except DirectoryError:  # another job has taken it
            return ""
        except (OutputError, OSError) as error:
            return str(error)
        return ""

    def _is_first(self) -> bool:
        """Whether this is the first rank of the job to report a failure: the one that can create the file."""
        try:
            os.close(os.open(f"{self.run}/{FAILED}{self.token}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            pass  # nothing can be created there: better two reports than none
        return True

    def _written_by_another(self) -> bool:
        """Wait until the first rank has written: if this rank ended the job now, it would interrupt that."""
        for _ in range(int(OTHERS / FORWARDING)):
            with contextlib.suppress(OutputError):  # it cannot be read now
                if self.run and read_result(self.run).get("status") == "failed":
                    return True
            time.sleep(FORWARDING)
        return False  # that rank has been killed, perhaps


def describe(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MPI.Exception):
        text = "; ".join(error.Get_error_string().splitlines())
        return f"an MPI call failed; another rank may have been killed ({text})"
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r}) in the middle of the run"
    try:
        text = str(error)
    except Exception as also:
        text = f"(its message cannot be shown: {type(also).__name__})"
    return text if isinstance(error, RunError) else f"{type(error).__name__}: {text}".splitlines()[0]


def exit_code(error: BaseException) -> int:
    """The exit code of a process after an error; never 0."""
    return error.exit_code if isinstance(error, RunError) else 70


def run_job(program: str, act: Callable[[Team], object]) -> int:
    """Call `act` with a team of all ranks of this job, guarded and without a time limit. Returns the exit code."""
    alarm.off()
    try:
        team = Team(MPI.COMM_WORLD, Clock())
        with Guard(team, program):
            check_size(team.size)
            act(team)
        return 0
    except BaseException as error:  # the guard has reported it
        return exit_code(error)

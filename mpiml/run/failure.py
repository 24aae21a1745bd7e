"""Ending the whole job when one rank fails, with the reason in result.json and on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

from mpi4py import MPI

from mpiml.clock import BLOCKED_ON_OTHERS
from mpiml.errors import DirectoryError, OutputError, RunError, StallError, known_to_all
from mpiml.run import alarm, lock
from mpiml.run.alarm import within
from mpiml.run.console import say
from mpiml.run.directory import FAILED
from mpiml.run.result import Result, read_result, update_result
from mpiml.team import Team

# Seconds in which a failing process tries to ...
WRITING = 5.0  # write the reason down,
OTHERS = 3.0  # and of these, to see that another rank has,
SAYING = 1.0  # say it,
ABORT_GRACE = 10.0  # and do all this and end the job, before a timer in C ends the process.
FORWARDING = 0.1  # that the launcher needs to forward what was said: when it kills, it drops the rest


class Guard:
    """A block of code in which no rank's failure leaves another waiting.

    An error that all ranks raise together (RunError.everywhere) passes through, reported by rank 0. Any other way
    out of the block, on any rank and in any of its threads, sys.exit included, is reported by the rank it happens
    on and ends the job by MPI_Abort. A rank that is alone reports it and lets it pass. So does what the alarm
    (mpiml.run.alarm) finds.

    Attributes:
        run: the run directory, once it is known, and a `token` for this job that all ranks share.
    """

    def __init__(self, team: Team, program: str):
        self.team, self.comm, self.clock, self.program = team, team.comm, team.clock, program
        self.run: Path | None = None
        self.token = ""
        self._lock = threading.Lock()

    def __enter__(self) -> Guard:
        self._thread_hook = threading.excepthook
        threading.excepthook = self._thread_failed
        alarm.tell(self.fail, lambda: self.clock.activity in BLOCKED_ON_OTHERS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        threading.excepthook = self._thread_hook
        alarm.tell()
        if error is None:
            return
        if not known_to_all(error, self.comm.size):
            self.fail(error)
        elif self.comm.rank == 0 and not getattr(error, "silent", False):
            self._report(error)

    def fail(self, error: BaseException) -> None:
        """Report an error that only this rank knows of, and end the job; does not return."""
        with self._lock:
            alarm.end_for_certain(ABORT_GRACE)  # first of all: what comes next may hang, as what failed may
            with contextlib.suppress(BaseException):
                self._report(error)
            end_job(exit_code(error))

    def _thread_failed(self, what: threading.ExceptHookArgs) -> None:
        error = what.exc_value or what.exc_type()
        error.add_note(f"in {what.thread.name if what.thread else 'a thread'}")
        self.fail(error)

    def _report(self, error: BaseException) -> None:
        """Write down why, unless another rank has, and then say it: each in its own time, whatever hangs or fails."""
        known = error if isinstance(error, RunError) else None
        # What its message says is not only of this rank, at this moment.
        settled = known and (known.everywhere or known.rank is not None or isinstance(known, StallError))
        outcome: Result = {"status": "failed", "exit_code": exit_code(error), "reason": describe(error)}
        outcome["rank"] = known.rank if known and settled else self.comm.rank
        if self.clock.step:  # else the run is where it was
            outcome["step"] = self.clock.step
        text = f"{self.program}: {outcome['reason']}"
        if not settled and self.comm.size > 1:
            text += f" (rank {self.comm.rank}, step {self.clock.step}, {self.clock.activity})"
        if not known and not isinstance(error, KeyboardInterrupt):
            outcome["traceback"] = within(SAYING, lambda: "".join(traceback.format_exception(error)), "")
            text += f"\n{outcome['traceback']}".rstrip()
        alone = not known_to_all(error, self.comm.size)
        unanswered: str | None = "its file system does not answer"
        others = isinstance(error, DirectoryError)  # the directory is another job's
        problem = "" if others else within(WRITING, lambda: self._write(outcome, alone), unanswered)
        if problem:
            text += f"\n{self.program}: and result.json could not be written: {problem}"
        if problem is None:
            time.sleep(SAYING)  # the other rank says it, and ends the job
        else:
            within(SAYING, lambda: say(text, sys.stderr), None)

    def _write(self, outcome: Result, alone: bool) -> str | None:
        """Write result.json; returns what that failed at, or None if another rank has written it.

        Args:
            alone: whether other ranks may be about to write it too.
        """
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
        """Whether no other rank has reported a failure of this job: whoever makes the file is the first."""
        try:
            os.close(os.open(f"{self.run}/{FAILED}{self.token}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            pass  # nothing can be written there: better reported twice than not at all
        return True

    def _written_by_another(self) -> bool:
        """Wait until who was first has written: by ending the job this rank would end the other's writing."""
        assert self.run, "there is a run directory if another rank has written there"
        waited = 0.0
        while self._status() != "failed":
            if waited > OTHERS:  # it has been killed
                return False
            time.sleep(FORWARDING)
            waited += FORWARDING
        return True

    def _status(self) -> str:
        """What result.json says, if it can be read just now."""
        try:
            return str(read_result(self.run or Path()).get("status"))
        except OutputError:
            return ""


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
    """What a process ends with after an error; never 0."""
    return error.exit_code if isinstance(error, RunError) else 70


def end_job(code: int) -> None:
    """End all processes of the job."""
    within(SAYING, lambda: sys.stdout.flush(), None)  # noqa: PLW0108 (it may be closed, and None)
    time.sleep(FORWARDING)  # the launcher drops what it has not forwarded when it kills
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)

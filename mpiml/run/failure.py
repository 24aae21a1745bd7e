"""Ending the whole job when one rank fails, with the reason on stderr and in result.json."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.errors import DirectoryError, RunError
from mpiml.run.directory import FAILED, update_result

ABORT_GRACE = 10  # seconds after which a process that MPI_Abort did not end ends itself


class Guard:
    """A block of code in which no rank's failure leaves another waiting.

    An error that all ranks raise together (RunError.everywhere) passes through, reported by rank 0. Any other way
    out of the block, on any rank and in any of its threads, sys.exit included, is reported by the rank it happens
    on and ends the job by MPI_Abort. A rank that is alone reports it and lets it pass.

    Attributes:
        run: the run directory, once it is known, and a `token` for this job that all ranks share.
    """

    def __init__(self, comm: MPI.Intracomm, clock: Clock, program: str):
        self.comm, self.clock, self.program = comm, clock, program
        self.run: Path | None = None
        self.token = ""
        self._lock = threading.Lock()

    def writes_to(self, place: tuple[Path, str]) -> None:
        """Say where the run directory is, and a token for this job."""
        self.run, self.token = place

    def __enter__(self) -> Guard:
        self._thread_hook = threading.excepthook
        threading.excepthook = self._thread_failed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        threading.excepthook = self._thread_hook
        if error is None:
            return
        if isinstance(error, RunError) and error.everywhere:
            if self.comm.rank == 0 and not error.silent:
                self._report(error)
        elif self.comm.size == 1:
            self._report(error)
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Report an error that only this rank knows of, and end the job; does not return."""
        with self._lock:
            try:
                if self._is_first():
                    self._report(error)
            finally:  # whatever a report fails at, the others must not be left waiting
                end_job(exit_code(error))

    def _thread_failed(self, what: threading.ExceptHookArgs) -> None:
        error = what.exc_value or what.exc_type()
        error.add_note(f"in {what.thread.name if what.thread else 'a thread'}")
        self.fail(error)

    def _is_first(self) -> bool:
        """Whether no other rank has reported a failure of this job: whoever makes the file is the first."""
        if self.run is None:
            return True
        try:
            os.close(os.open(self.run / f"{FAILED}{self.token}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            pass  # nothing can be written there: better reported twice than not at all
        return True

    def _report(self, error: BaseException) -> None:
        known = error if isinstance(error, RunError) else None
        rank = known.rank if known and known.rank is not None else self.comm.rank
        reason = describe(error)
        text = f"{self.program}: {reason}"
        if not (known and (known.everywhere or known.rank is not None)) and self.comm.size > 1:
            text += f" (rank {rank}, step {self.clock.step}, {self.clock.activity})"
        trace = "" if known or isinstance(error, KeyboardInterrupt) else "".join(traceback.format_exception(error))
        sys.stderr.write(f"{text}\n{trace}")
        sys.stderr.flush()
        if self.run is None or not self.run.is_dir() or isinstance(error, DirectoryError):  # which is another job's
            return
        outcome = {
            "status": "failed",
            "exit_code": exit_code(error),
            "reason": reason,
            "rank": rank,
            "step": self.clock.step,
        }
        if trace:
            outcome["traceback"] = trace
        try:
            update_result(self.run, outcome)
        except RunError as also:
            sys.stderr.write(f"{self.program}: and result.json could not be written: {also}\n")


def describe(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MPI.Exception):
        return f"an MPI call failed; another rank may have been killed ({error.Get_error_string()})"
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r}) in the middle of the run"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def exit_code(error: BaseException) -> int:
    """What a process ends with after an error; never 0."""
    return error.exit_code if isinstance(error, RunError) else 70


def end_job(code: int) -> None:
    """End all processes of the job."""
    with contextlib.suppress(Exception):  # standard error may be closed
        faulthandler.dump_traceback_later(ABORT_GRACE, exit=True)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    time.sleep(0.1)  # the launcher drops what it has not forwarded when it kills
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)

"""How a program starts, before NumPy and MPI are loaded, and how it ends, after everything else."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NoReturn

from mpiml.errors import ConfigError, known_to_all
from mpiml.run import alarm
from mpiml.run.console import say
from mpiml.run.launcher import environment

FLUSHING = 1.0  # seconds for standard output, before the job is ended
FORWARDING = 0.1  # seconds in which the launcher forwards output: what it has not when it kills ranks is lost
CODE = 70  # exit code of a job that a rank's error ends


def begin(program: str) -> None:
    """To be called before everything else: from here on this process ends, whatever hangs."""
    alarm.start(program, sys.argv[1:])
    alarm.during("importing")
    gc.disable()  # until all is imported: none of that is garbage
    atexit.register(_last)
    _open_streams()
    os.environ.update(environment())  # before NumPy loads


def answer_help(parse: Callable[[Sequence[str]], object]) -> None:
    """If the arguments ask for help, print it and end the program: before MPI starts, so that it works on a login node.
    Wrong arguments are reported later, when MPI is up."""
    if {"-h", "--help", "--version"} & set(sys.argv[1:]):
        with contextlib.suppress(ConfigError):
            parse(sys.argv[1:])


@alarm.shown_as("MPI_Init, which waits for all ranks: one of them has not come")
def start_mpi() -> None:
    """Load and start MPI."""
    import numpy  # noqa: F401 (loaded first, because it is slow and the other ranks wait in MPI_Init)

    alarm.during("starting MPI")
    from mpi4py import MPI  # noqa: F401 (starts it)

    end_all_on_errors()
    alarm.during("importing")


def begun() -> None:
    """To be called when all is imported."""
    sys.excepthook = sys.__excepthook__
    gc.freeze()
    gc.enable()
    alarm.during("reading its settings")


def end(code: int) -> NoReturn:
    """End this process with an exit code, after its threads and the functions registered with atexit."""
    from mpiml.run.process import ignore_signals

    ignore_signals()
    alarm.during("ending: in a thread, or in a function registered with atexit,")
    sys.exit(code)


def _last() -> None:
    """Called by Python after all other functions registered with atexit."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi and mpi.Is_initialized() and not mpi.Is_finalized():
        _end_mpi()
    alarm.guard_exit()
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (OSError, ValueError, AttributeError):  # full, or without a reader; closed; None
            setattr(sys, name, None)  # else Python fails too, and ends with another exit code


def end_all_on_errors(program: str = "") -> None:
    """From here on an error that nothing catches ends the job, if it has several ranks: else the others would wait for
    this one. Unless all ranks raise it alike. With the name of a program, a line says which rank it was."""
    from mpi4py import MPI

    shown, process, ranks = sys.excepthook, os.getpid(), MPI.COMM_WORLD.size if MPI.Is_initialized() else 1

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        ends = os.getpid() == process and not known_to_all(error, ranks)  # a forked process is no rank
        if ends:
            alarm.end_for_certain(alarm.ABORT_GRACE)
        shown(kind, error, trace)
        if ends:
            if program:
                line = f"{program}: this error of rank {rank} ends the job"
                alarm.within(FLUSHING, lambda: say(line, sys.stderr), None)
            end_job(CODE)

    if ranks > 1:
        rank = MPI.COMM_WORLD.rank
        sys.excepthook = uncaught


def end_job(code: int) -> None:
    """End all processes of the job, in which MPI runs."""
    from mpi4py import MPI

    alarm.within(FLUSHING, lambda: sys.stdout.flush(), None)  # noqa: PLW0108 (stdout may be None)
    time.sleep(FORWARDING)
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)


@alarm.shown_as("MPI_Finalize, which waits for all ranks: one of them has not come")
def _end_mpi() -> None:
    alarm.during("ending MPI")
    from mpi4py import MPI

    MPI.Finalize()


def _open_streams() -> None:
    """Open those of standard input, output and error that are closed on /dev/null: else the next file that is opened,
    a checkpoint for example, takes their number and gets what libraries print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115

"""A file for what each rank prints, in the run directory: ranks/rank-00012.log (--rank-log)."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mpiml.errors import OutputError
from mpiml.run.directory import RANKS, named_errors
from mpiml.run.streams import Diverted
from mpiml.team import Team

FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK  # a pipe is not waited for


def divert(team: Team, run: Path) -> tuple[Diverted | None, list[str]]:
    """From now on what each rank of a team prints goes to its own file in a run directory, after a line that says which
    job begins; collective.

    Returns what ends that, None on a rank that cannot open its file, and what a person should know.
    Raises OutputError, on all ranks alike, if rank 0 cannot open its own.
    """
    path = run / RANKS / f"rank-{team.name:05d}.log"

    def make() -> None:
        with named_errors("create", path.parent):
            path.parent.mkdir(exist_ok=True)

    def open_file() -> tuple[int, str]:
        try:
            file = os.open(path, FLAGS, 0o666)
            os.write(file, f"{_head(team)}\n".encode())
            return file, ""
        except OSError as error:
            problem = f"cannot write {path}: {error.strerror or error}"
            if team.rank == 0:
                raise OutputError(problem) from error
            return -1, f"rank {team.name} on {os.uname().nodename} {problem}"

    team.on_rank_0(make)
    file, problem = team.together(open_file)
    problems = [text for text in team.allgather(problem) if text]
    more = f", and so {len(problems) - 1} more" if len(problems) > 1 else ""
    notes = [f"warning: --rank-log: {problems[0]}{more}; what it prints goes to the terminal"] if problems else []
    return Diverted(file) if file >= 0 else None, notes


def _head(team: Team) -> str:
    """The line with which a job begins."""
    number = os.environ.get("SLURM_JOB_ID")
    job = f"SLURM job {number}" if number else "a job"
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"--- {now}: {job} begins, rank {team.name} of {team.size} on {os.uname().nodename}, process {os.getpid()}"

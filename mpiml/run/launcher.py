"""The command that starts an MPI job from a program, and the job's environment; no MPI."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mpiml.errors import ConfigError

BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
FAULT = (r"^mpiml", r"^\w*(Error|Exception)\b")  # how a line of a failed job begins that names the fault


def environment() -> dict[str, str]:
    """The environment of a job: this process's, with one BLAS thread a rank unless it is set there. Otherwise each
    rank's BLAS starts a thread for every core before it can be set to use fewer."""
    return dict.fromkeys(BLAS, "1") | os.environ


def launcher(given: str | None, ranks: int, node_ranks: int | None = None) -> list[str]:
    """The beginning of the command of a job, up to the program that each rank runs.

    Args:
        given: the user's own, with {ranks} and perhaps {nodes} in it; by default srun in a SLURM job, else mpirun.
        node_ranks: ranks on each node; by default SLURM's.
    """
    node_ranks = node_ranks or int(os.environ.get("SLURM_NTASKS_PER_NODE", "0"))
    nodes = math.ceil(ranks / node_ranks) if node_ranks else None
    if given:
        if "{ranks}" not in given:
            raise ConfigError(f"--launcher {given!r}: must say {{ranks}} where the number of ranks goes")
        if "{nodes}" in given and not nodes:
            raise ConfigError(f"--launcher {given!r}: {{nodes}} needs --node-ranks N, the number of ranks on each node")
        return [word.replace("{ranks}", str(ranks)).replace("{nodes}", str(nodes)) for word in given.split()]
    if "SLURM_JOB_ID" in os.environ and _installed("srun"):
        return ["srun", "-n", str(ranks), *(["-N", str(nodes)] if nodes else [])]
    return [mpirun(), "-n", str(ranks)]


def mpirun() -> str:
    """The mpirun beside this Python, else the one on the PATH. Raises ConfigError if there is none."""
    beside = Path(sys.executable).with_name("mpirun")
    path = str(beside) if beside.exists() else _installed("mpirun")
    if not path:
        raise ConfigError("no mpirun found; install one with pip install mpich, or load a module")
    return path


def check_program(command: Sequence[str]) -> None:
    """Raise ConfigError if a command's program is not installed."""
    if not _installed(command[0]):
        raise ConfigError(f"--launcher: there is no program {command[0]} here")


def _installed(program: str) -> str | None:
    """Where a program is, if it is on the PATH."""
    import shutil  # which loads compressors, and no rank needs it

    return shutil.which(program)

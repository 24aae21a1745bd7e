"""Commands that start MPI jobs."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mpiml.errors import ConfigError

BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def environment() -> dict[str, str]:
    """The environment of a job: this process', with one BLAS thread per rank unless it sets another number. Otherwise
    each rank's BLAS would start a thread per core."""
    return dict.fromkeys(BLAS, "1") | os.environ


def launcher(given: str | None, ranks: int, node_ranks: int | None = None) -> list[str]:
    """The words of the command that starts a job, on as few nodes as possible if `node_ranks`, of a node, are known.

    Args:
        given: the value of --launcher.
    """
    node_ranks = node_ranks or int(os.environ.get("SLURM_NTASKS_PER_NODE", "0"))
    nodes = math.ceil(ranks / node_ranks) if node_ranks else None
    if given:
        if "{ranks}" not in given:
            raise ConfigError(f"--launcher {given!r}: must say {{ranks}} where the number of ranks goes")
        if "{nodes}" in given and not nodes:
            raise ConfigError(f"--launcher {given!r}: {{nodes}} needs --node-ranks N, the ranks that a node takes")
        return [word.replace("{ranks}", str(ranks)).replace("{nodes}", str(nodes)) for word in given.split()]
    if "SLURM_JOB_ID" in os.environ and shutil.which("srun"):
        return ["srun", "-n", str(ranks), *(["-N", str(nodes)] if nodes else [])]
    return [mpirun(), "-n", str(ranks)]


def mpirun() -> str:
    """The mpirun beside this Python, or else on the PATH. Raises ConfigError if there is none."""
    beside = Path(sys.executable).with_name("mpirun")
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if not program:
        raise ConfigError("no mpirun found; install one with pip install mpich, or load a module")
    return program


def check_program(command: Sequence[str]) -> None:
    """Raise ConfigError if the program of a command does not exist."""
    if not shutil.which(command[0]):
        raise ConfigError(f"--launcher: there is no program {command[0]} here")

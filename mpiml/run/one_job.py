"""Whether the processes started are one job: as many ranks as the launcher meant, all with the same software."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from mpi4py import MPI

import mpiml
from mpiml.clock import Clock
from mpiml.errors import ConfigError
from mpiml.run.environment import mpi_library
from mpiml.team import broadcast, together

HINT = "start it by the mpirun of that MPI library, or by srun --mpi=pmi2 or --mpi=pmix (srun --mpi=list)"


def expected_size(environment: Mapping[str, str]) -> int:
    """How many ranks the launcher means the job to have at least: 1 where it sets no variable that is known here.

    SLURM_NTASKS does not tell: it is the allocation's, and under mpirun the job may be smaller. Nor does the step's
    number of tasks under a PMIx server that is not SLURM's: mpirun starts its daemons as a step of its own.
    """
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if name in environment:
            return int(environment[name])
    if environment.get("PMIX_NAMESPACE", "slurm.").startswith("slurm."):
        return int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    return 1


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher counts this process as the first: of many that do not know of each other, it speaks."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        if name in environment:
            return environment[name] == "0"
    return True


def check_size(size: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError, on all ranks alike, if the MPI library sees fewer ranks than were launched.

    More are no sign of a broken launch: the launcher may be one whose variables are not known here.
    """
    expected = expected_size(environment)
    if size >= expected:
        return
    library = mpi_library()
    error = ConfigError(f"{expected} processes were started, but {library} makes them jobs of {size}: {HINT}")
    error.everywhere, error.silent = True, not is_first(environment)
    raise error


def software() -> dict[str, str]:
    """What has to be the same on all ranks of a run."""
    return {"MPI library": mpi_library(), "mpiml": mpiml.__version__, "NumPy": np.__version__}


def check_alike(comm: MPI.Intracomm, clock: Clock, mine: Mapping[str, str], hint: str = "") -> None:
    """Raise ConfigError, on all ranks alike, if some rank has other values than rank 0; collective.

    Args:
        mine: what this rank has, under names that a message can use.
        hint: what to do, for the end of the message.
    """
    with clock.doing("joining"):
        first = broadcast(comm, dict(mine))

    def compare() -> None:
        for name in {**first, **mine}:
            here, there = mine.get(name, "none"), first.get(name, "none")
            if here != there:
                where = f"rank {comm.rank} on {os.uname().nodename}"
                text = f"ranks differ in {name}: {here} ({where}), {there} (rank 0)"
                raise ConfigError(f"{text}; {hint}" if hint else text)

    together(comm, clock, compare)

"""Checks that the processes are one job: as many ranks as were launched, all with the same software."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from mpi4py import MPI

import mpiml
from mpiml.errors import ConfigError
from mpiml.run.alarm import rank_by_launcher

HINT = "start it by the mpirun of that MPI library, or by srun --mpi=pmi2 or --mpi=pmix (srun --mpi=list)"


def expected_size(environment: Mapping[str, str]) -> int:
    """The least number of ranks that the launcher has started; 1 if it sets no known variable.

    SLURM_NTASKS is of no use: it is the allocation's, and a job of mpirun may be smaller. Neither is the step's number
    of tasks under a PMIx server other than SLURM's: mpirun starts its daemons as a step of their own.
    """
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if name in environment:
            return int(environment[name])
    if "TORCHELASTIC_RUN_ID" in environment:  # torchrun, which MPI knows nothing of
        return int(environment.get("WORLD_SIZE", 1))
    if environment.get("PMIX_NAMESPACE", "slurm.").startswith("slurm."):
        return int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    return 1


def check_size(size: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError, on all ranks alike, if the MPI library sees fewer ranks than were launched.

    More ranks are not an error: the launcher's variables may be unknown here.
    """
    expected = expected_size(environment)
    if size >= expected:
        return
    library = mpi_library()
    error = ConfigError(f"{expected} processes were started, but {library} makes them jobs of {size}: {HINT}")
    error.silent = rank_by_launcher(environment) > 0  # of many jobs of one rank, only the first reports it
    raise error.on_all_ranks()


def software() -> dict[str, str]:
    """Libraries and versions that have to be the same on all ranks of a run."""
    return {"MPI library": mpi_library(), "mpiml": mpiml.__version__, "NumPy": np.__version__}


def mpi_library() -> str:
    """The MPI library and its version: "MPICH 5.0.2", "Open MPI v5.0.11"."""
    first = MPI.Get_library_version().splitlines()[0].strip("\x00 ").split(",")[0]
    return " ".join(word for word in first.split() if word != "Version:")

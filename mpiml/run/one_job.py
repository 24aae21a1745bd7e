"""Whether the processes started are one job: as many ranks as the launcher meant, all with the same software."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

import mpiml
from mpiml.errors import ConfigError
from mpiml.run.environment import mpi_library

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
    error.silent = not is_first(environment)
    raise error.on_all_ranks()


def software() -> dict[str, str]:
    """What has to be the same on all ranks of a run."""
    return {"MPI library": mpi_library(), "mpiml": mpiml.__version__, "NumPy": np.__version__}

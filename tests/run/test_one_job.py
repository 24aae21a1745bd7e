"""How many ranks a launcher meant, from what it leaves in the environment (measured, not read in manuals), and what
software all ranks need alike."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.errors import ConfigError
from mpiml.run import one_job

STEP = {"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}


@pytest.mark.parametrize(
    ("found", "size"),
    [
        ({}, 1),
        ({"SLURM_NTASKS": "16"}, 1),  # plain python in a batch script
        ({"PMI_SIZE": "4"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "4", "PMIX_NAMESPACE": "prterun-host-1@1"}, 4),
        ({**STEP, "PMI_SIZE": "4"}, 4),  # srun --mpi=pmi2
        ({**STEP, "PMIX_NAMESPACE": "slurm.pmix.7.0"}, 4),
        (STEP, 4),  # srun --mpi=none
        ({**STEP, "PMI_SIZE": "16"}, 16),  # MPICH's mpirun, whose proxies are a step
        ({**STEP, "PMIX_NAMESPACE": "prterun-host-1@1"}, 1),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, 2),
    ],
)
def test_expected_size(found: dict[str, str], size: int) -> None:
    assert one_job.expected_size(found) == size
    one_job.check_size(size, found)
    if size > 1:
        with pytest.raises(ConfigError, match=f"{size} processes were started, but .* makes them jobs of 1"):
            one_job.check_size(1, found)


def test_a_launcher_whose_variables_nobody_knows_is_no_broken_launch() -> None:
    one_job.check_size(64, {})
    one_job.check_size(64, {"SLURM_NTASKS": "64", "PMIX_NAMESPACE": "prterun-host-1@1"})


def test_of_processes_that_are_each_alone_the_first_speaks() -> None:
    silent = []
    for rank in range(4):
        with pytest.raises(ConfigError) as caught:
            one_job.check_size(1, {**STEP, "SLURM_PROCID": str(rank)})
        silent.append(caught.value.silent)
    assert silent == [False, True, True, True]


def test_software_that_all_ranks_need_alike_is_named() -> None:
    found = one_job.software()
    assert list(found) == ["MPI library", "mpiml", "NumPy"]
    assert (found["MPI library"], found["NumPy"]) == (one_job.mpi_library(), np.__version__)


def test_name_of_the_library_has_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "MPICH Version:      5.0.2\nMPICH Release date: x\0": "MPICH 5.0.2",
        "Open MPI v5.0.3, package: x\0": "Open MPI v5.0.3",
        "Another MPI 1.0 \0": "Another MPI 1.0",
    }
    for text, name in told.items():
        monkeypatch.setattr(one_job.MPI, "Get_library_version", lambda text=text: text)
        assert one_job.mpi_library() == name

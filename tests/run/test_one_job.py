"""How many ranks a launcher meant, from what it leaves in the environment; measured, not read in manuals."""

from __future__ import annotations

import pytest

from mpiml.errors import ConfigError
from mpiml.run import environment, one_job

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


def test_different_processors_or_kernels_are_a_warning() -> None:
    one = {"cpu": "A", "blas": "openblas 1 (Zen)"}
    assert environment.warnings([one, one]) == []
    assert ["A; B" in text for text in environment.warnings([one, one | {"cpu": "B"}])] == [True]
    assert ["Zen); x" in text for text in environment.warnings([one, one | {"blas": "x"}])] == [True]


def test_name_of_the_library_has_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "MPICH Version:      5.0.2\nMPICH Release date: x\0": "MPICH 5.0.2",
        "Open MPI v5.0.3, package: x\0": "Open MPI v5.0.3",
    }
    for text, name in told.items():
        monkeypatch.setattr(environment.MPI, "Get_library_version", lambda text=text: text)
        assert environment.mpi_library() == name
        assert one_job.software()["MPI library"] == name

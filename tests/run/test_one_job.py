"""How many ranks a launcher meant, from what it leaves in the environment (measured, not read in manuals), and whether
all have the same software."""

from __future__ import annotations

import os

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.errors import ConfigError
from mpiml.run import one_job
from mpiml.run.environment import mpi_library

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


def test_software_that_all_ranks_need_alike_is_named() -> None:
    found = one_job.software()
    assert list(found) == ["MPI library", "mpiml", "NumPy"]
    assert (found["MPI library"], found["NumPy"]) == (mpi_library(), np.__version__)


WORLD = MPI.COMM_WORLD
LAST = WORLD.size - 1


@pytest.mark.mpi
def test_ranks_that_are_alike_may_begin() -> None:
    clock = Clock()
    one_job.check_alike(WORLD, clock, {"NumPy": "2.4.0"}, "install it")
    assert clock.activity == "start"


@pytest.mark.mpi
@pytest.mark.parametrize("hint", ["", "install the same everywhere"])
@pytest.mark.parametrize("version", ["2.5.0", None])
def test_a_rank_that_differs_is_named_on_all_ranks(version: str | None, hint: str) -> None:
    mine = {"mpiml": "0.1.0", "NumPy": "2.4.0"}
    if WORLD.rank == LAST and version:
        mine["NumPy"] = version
    elif WORLD.rank == LAST:
        del mine["NumPy"]
    if WORLD.size == 1:
        one_job.check_alike(WORLD, Clock(), mine, hint)
        return
    with pytest.raises(ConfigError) as caught:
        one_job.check_alike(WORLD, Clock(), mine, hint)
    where = f"rank {LAST} on {os.uname().nodename}"
    text = f"ranks differ in NumPy: {version or 'none'} ({where}), 2.4.0 (rank 0)"
    assert str(caught.value) == (f"{text}; {hint}" if hint else text)
    assert (caught.value.everywhere, caught.value.rank) == (True, LAST)


@pytest.mark.mpi
def test_what_rank_0_lacks_is_a_difference_too() -> None:
    mine = {"NumPy": "2.4.0"} if WORLD.rank == LAST else {}
    if LAST == 0:
        one_job.check_alike(WORLD, Clock(), mine)
        return
    with pytest.raises(ConfigError, match=r"ranks differ in NumPy: 2.4.0 \(rank \d+ on .*\), none \(rank 0\)"):
        one_job.check_alike(WORLD, Clock(), mine)

"""What tests of this room are given."""

from pathlib import Path

import pytest
from mpi4py import MPI


@pytest.fixture
def together(tmp_path: Path) -> Path:
    """A directory that all ranks see; that of each test's own is another one on every rank."""
    directory = Path(MPI.COMM_WORLD.bcast(str(tmp_path))) / "together"
    if MPI.COMM_WORLD.rank == 0:
        directory.mkdir()
    MPI.COMM_WORLD.Barrier()
    return directory

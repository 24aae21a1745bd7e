"""PyTorch's modules trained on all ranks of an MPI job: DataParallel, in DistributedDataParallel's place."""

from __future__ import annotations

try:
    from mpiml.torch.data_parallel import DataParallel as DataParallel
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("mpiml.torch needs PyTorch: pip install 'mpiml[torch]'", name="torch") from None


def rank() -> int:
    """This process' number among those that mpirun has started, from 0 on: as DistributedSampler's `rank`."""
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank


def size() -> int:
    """How many processes mpirun has started: as DistributedSampler's `num_replicas`."""
    from mpi4py import MPI

    return MPI.COMM_WORLD.size

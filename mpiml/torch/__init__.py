"""PyTorch's modules trained on all ranks of an MPI job: DataParallel, in DistributedDataParallel's place."""

from __future__ import annotations

from mpiml.loop.checks import check_comm

try:
    from mpiml.torch.data_parallel import DataParallel as DataParallel
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("mpiml.torch needs PyTorch: pip install 'mpiml[torch]'", name="torch") from None


def rank() -> int:
    """This process' number among those that mpirun has started, from 0 on: as DistributedSampler's `rank`."""
    return check_comm(None).rank


def size() -> int:
    """How many processes mpirun has started: as DistributedSampler's `num_replicas`."""
    return check_comm(None).size

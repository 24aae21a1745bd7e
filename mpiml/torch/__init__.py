"""PyTorch's modules trained on all ranks of an MPI job: DataParallel, in DistributedDataParallel's place."""

from __future__ import annotations

from mpiml.devices import choice
from mpiml.loop.checks import check_comm
from mpiml.loop.guard import clock
from mpiml.parallel.grid import nodes_of_ranks
from mpiml.team import Team

try:
    import torch

    from mpiml.devices import cuda
    from mpiml.torch.data_parallel import DataParallel as DataParallel
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("mpiml.torch needs PyTorch: pip install 'mpiml[torch]'", name="torch") from None

cuda.set_environment()  # before a program's first product on a GPU


def rank() -> int:
    """This process' number among those that mpirun has started, from 0 on: as DistributedSampler's `rank`."""
    return check_comm(None).rank


def device() -> torch.device:
    """The GPU of this process: its number among those of its node, modulo the number of GPUs that it sees; collective.

    Raises ConfigError, on all ranks alike, if there is none, or if ranks have GPUs of several types.
    """
    team = Team(check_comm(None), clock())
    everyone = team.allgather(choice.candidate("cuda", nodes_of_ranks(team.comm), team.rank))
    team.together(lambda: choice.check("cuda", everyone, share=True))
    return torch.device("cuda", everyone[team.rank].number)


def size() -> int:
    """How many processes mpirun has started: as DistributedSampler's `num_replicas`."""
    return check_comm(None).size

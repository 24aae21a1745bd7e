"""PyTorch's data parallelism and pipelining on the ranks of an MPI job, over gloo."""

from __future__ import annotations

import itertools
import socket
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn
from torch.distributed import init_process_group
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from mpiml.bench.models import RATE
from mpiml.bench.torch_eager import Eager


def join(comm: MPI.Intracomm) -> None:
    """Make PyTorch's process group of these ranks."""
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = comm.bcast(probe.getsockname()[1])
    init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=comm.rank, world_size=comm.size)


def data_parallel(
    comm: MPI.Intracomm, module: nn.Module, x: np.ndarray, y: np.ndarray, rows: int, optimizer: str
) -> Eager:
    """DistributedDataParallel on a module; `rows`: rows of each rank's step."""
    join(comm)
    part = slice(comm.rank * len(x) // comm.size, (comm.rank + 1) * len(x) // comm.size)
    return Eager(nn.parallel.DistributedDataParallel(module), x[part], y[part], rows, optimizer, fused=False)


class Pipeline:
    """Eight linear layers with ReLU in as many stages as there are ranks, 1F1B, mean squared error, plain SGD."""

    def __init__(self, comm: MPI.Intracomm, width: int, batch: int, microbatches: int):
        join(comm)
        self.rank, self.last = comm.rank, comm.rank == comm.size - 1
        pairs = ((nn.Linear(width, width), nn.ReLU()) for _ in range(8 // comm.size))
        module = nn.Sequential(*itertools.chain.from_iterable(pairs))
        stage = PipelineStage(module, comm.rank, comm.size, torch.device("cpu"))
        self.schedule: Any = Schedule1F1B(stage, microbatches, loss_fn=nn.functional.mse_loss)
        self.optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
        self.x, self.y = torch.rand(4 * batch, width), torch.rand(4 * batch, width)
        self.order, self.batch, self.at = torch.randperm(4 * batch), batch, 0

    def step(self) -> None:
        """One step."""
        index = self.order[self.at : self.at + self.batch]
        self.at = (self.at + self.batch) % len(self.order)
        self.optimizer.zero_grad(set_to_none=True)
        if self.rank == 0:
            self.schedule.step(self.x[index])
        elif self.last:
            self.schedule.step(target=self.y[index], losses=[])
        else:
            self.schedule.step()
        self.optimizer.step()

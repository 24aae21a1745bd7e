"""A PyTorch module trained by the package against plain PyTorch: the same module, rows and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml import vectors
from mpiml.bench.layers import PLACES, TOKENS
from mpiml.bench.models import MOMENTUM, RATE, ROWS, Trainer, images, on_arrays
from mpiml.bench.pairs import ratio, seconds
from mpiml.bench.rows import Ratio
from mpiml.nn import optimizers
from mpiml.vectors import PIECE, Operands

WORLD = MPI.COMM_WORLD
SPAN = 0.17  # seconds of steps that are timed together
Step = Callable[[], None]


@dataclass
class Case:
    """A module, made anew at each call, and the rows x with labels y to train it on, `rows` a step and rank."""

    module: Callable[[], Any]
    x: NDArray[Any]
    y: NDArray[Any]
    rows: int
    optimizer: str

    def ours(self, comm: MPI.Intracomm) -> Trainer:
        """A trainer of the package on all ranks of `comm`, one micro-batch each."""
        import torch

        from mpiml.nn.torch_modules import as_layers

        torch.manual_seed(0)  # all ranks must build the same model
        layers = as_layers(self.module(), np.float32, 1)
        settings = {"batch": self.rows * comm.size, "microbatches": comm.size, "optimizer": self.optimizer}
        return on_arrays(comm, layers, self.x, self.y, **settings)

    def plain(self) -> Any:
        """PyTorch's training loop in one process."""
        from mpiml.bench.torch_eager import Eager

        return Eager(self.module(), self.x, self.y, self.rows, self.optimizer, fused=False)

    def distributed(self, comm: MPI.Intracomm = WORLD) -> Any:
        """That loop on all ranks of `comm`, with DistributedDataParallel over gloo."""
        from mpiml.bench.torch_distributed import data_parallel

        return data_parallel(comm, self.module(), self.x, self.y, self.rows, self.optimizer)

    def own_loop(self, comm: MPI.Intracomm) -> Any:
        """That loop on all ranks of `comm`, with mpiml.torch.DataParallel."""
        from mpiml.bench.torch_eager import Eager
        from mpiml.torch import DataParallel

        net = DataParallel(self.module(), comm=comm)
        return Eager(net, self.x, self.y, self.rows, self.optimizer, fused=False)


def case(model: str) -> Case:
    """The case called mlp (784-1024-1024-10), small (200 small parameters), resnet (GroupNorm, images of 3 x 32 x 32)
    or gpt (4 blocks of width 256, 128 tokens)."""
    from mpiml.bench import torch_eager

    rng = np.random.default_rng(0)
    if model == "mlp":
        return Case(lambda: torch_eager.mlp([1024, 1024]), *images(), 64, "momentum")
    if model == "small":
        return Case(lambda: torch_eager.mlp([16] * 99), *images(), 64, "momentum")
    if model == "resnet":
        x, y = rng.random((ROWS // 16, 3, 32, 32), np.float32), rng.integers(0, 10, ROWS // 16)
        return Case(lambda: torch_eager.resnet(32), x, y, 32, "momentum")
    x, y = rng.integers(0, TOKENS, (2, 256, PLACES))
    return Case(lambda: torch_eager.gpt(TOKENS, PLACES, 256, 4, 4), x, y, 8, "adam")


def torch_module(model: str, against: str) -> Ratio:
    """Samples/s of a module over those of plain PyTorch in one process ("plain"), of PyTorch's data parallelism
    ("distributed"), or of processes that train beside each other and never communicate ("apart")."""
    measured = case(model)
    ours = measured.ours(WORLD)
    theirs = measured.distributed() if against == "distributed" else measured.plain()
    return ratio(WORLD, theirs.step, ours.step, ours.repeats)


def torch_own_loop(model: str, rows: str, against: str) -> Ratio:
    """Samples/s of PyTorch's loop with mpiml.torch.DataParallel, on the first half of the ranks, over those of it with
    DistributedDataParallel over gloo ("distributed"), or without either ("apart"), on the other half; `rows` of each
    rank's step."""
    measured, half = dataclasses.replace(case(model), rows=int(rows)), WORLD.rank < WORLD.size // 2
    comm = MPI.Intracomm(WORLD.Split(int(half), WORLD.rank))
    if half:
        trainer = measured.own_loop(comm)
    else:
        trainer = measured.distributed(comm) if against == "distributed" else measured.plain()
    trainer.step()
    repeats = WORLD.allreduce(max(1, int(SPAN / seconds(trainer.step, 3))), MPI.MIN)
    return ratio(WORLD, None if half else trainer.step, trainer.step if half else None, repeats)


def torch_flat(model: str) -> Ratio:
    """Samples/s of plain PyTorch with gradients copied into a flat vector and values that NumPy updates, as the package
    does both, over those of plain PyTorch: the most that a module can reach."""
    measured = case(model)
    theirs = measured.plain()
    return ratio(WORLD, theirs.step, flat(measured), measured.ours(WORLD).repeats)


def flat(measured: Case) -> Step:
    """A step of plain PyTorch in which gradients are copied into a flat vector and NumPy updates that of the values."""
    import torch

    trainer = measured.plain()
    tensors = list(trainer.module.parameters())
    sizes = np.cumsum([0, *(tensor.numel() for tensor in tensors)])
    total, value = (vectors.zeros(int(sizes[-1]), np.float32) for _ in range(2))
    views = [total[a:b].reshape(t.shape) for a, b, t in zip(sizes, sizes[1:], tensors, strict=False)]
    for start, end, tensor in zip(sizes, sizes[1:], tensors, strict=False):
        value[start:end] = tensor.detach().numpy().reshape(-1)
        tensor.data = torch.from_numpy(value[start:end]).view(tensor.shape)
    optimizer = optimizers.build(measured.optimizer, MOMENTUM, 0.0)
    states = [vectors.zeros(len(value), np.float32) for _ in optimizer.states]
    spare = [vectors.empty(PIECE, np.float32) for _ in range(2)]

    def update() -> None:
        for view, tensor in zip(views, tensors, strict=True):
            np.copyto(view, tensor.grad.numpy())
        for start in range(0, len(value), PIECE):
            piece = slice(start, start + PIECE)
            length = len(value[piece])
            scratch = spare[0][:length], spare[1][:length]
            on = Operands(value[piece], [state[piece] for state in states], scratch, total[piece], False)
            optimizer.update(on, 1.0, RATE, 1)
            vectors.is_finite(value[piece])

    trainer.optimizer.step = update
    step: Step = trainer.step
    return step

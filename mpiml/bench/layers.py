"""Layers against PyTorch's on one core: both train the same model on the same rows, forward, backward and update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.bench.measure import Ratio, times
from mpiml.bench.models import Trainer, images, on_arrays, repeats
from mpiml.nn.convnets import cnn
from mpiml.nn.layers import Layer, stack_flops
from mpiml.nn.perceptrons import mlp
from mpiml.nn.transformers import gpt

CHANNELS = 32
PLACES, TOKENS = 128, 256


@dataclass
class Task:
    """What both sides train: the package's layers and their rows, and for PyTorch's module its builder and sizes."""

    layers: list[Layer]
    x: NDArray[Any]
    y: NDArray[Any]
    rows: int
    optimizer: str
    module: tuple[str, tuple[Any, ...]]

    def ours(self) -> Trainer:
        """The package's trainer."""
        settings = {"batch": self.rows, "microbatches": 1, "optimizer": self.optimizer}
        return on_arrays(MPI.COMM_SELF, self.layers, self.x, self.y, **settings)

    def theirs(self, memory_format: str) -> Any:
        """PyTorch's."""
        from mpiml.bench import torch_eager

        build, sizes = self.module
        return torch_eager.Eager(
            getattr(torch_eager, build)(*sizes), self.x, self.y, self.rows, self.optimizer, memory_format
        )

    def operations(self) -> float:
        """Floating-point operations of a step."""
        return 3.0 * self.rows * sum(stack_flops(self.layers, self.x.shape[1:]))


def perceptron(width: str, rows: str) -> Task:
    """784-width-width-10, momentum."""
    hidden = [int(width)] * 2
    return Task(mlp((784,), 10, hidden), *images(), int(rows), "momentum", ("mlp", (hidden,)))


def convolutions() -> Task:
    """Images of 28 x 28 pixels, convolutions of 32 and 64 channels, momentum."""
    x, y = images()
    x = x.reshape(-1, 28, 28, 1)
    return Task(cnn(x.shape[1:], 10, CHANNELS), x, y, 64, "momentum", ("cnn", (CHANNELS,)))


def transformer(width: int = 256, blocks: int = 4) -> Task:
    """Rows of 128 tokens of 256 kinds, 4 heads, Adam."""
    x, y = np.random.default_rng(0).integers(0, TOKENS, (2, 256, PLACES))
    layers = gpt((PLACES,), TOKENS, TOKENS, width, 4, blocks)
    return Task(layers, x, y, 8, "adam", ("gpt", (TOKENS, PLACES, width, 4, blocks)))


TASKS: dict[str, Callable[..., Task]] = {"mlp": perceptron, "cnn": convolutions, "gpt": transformer}


def torch_step(memory_format: str, model: str, *sizes: str) -> Ratio:
    """Samples/s over PyTorch's."""
    task = TASKS[model](*sizes)
    ours, theirs = task.ours(), task.theirs(memory_format)
    count = repeats(task.operations())
    mine, other = times(MPI.COMM_WORLD, [ours.step, theirs.step], [count, count])
    return Ratio.of(other, mine)


def torch_memory() -> Ratio:
    """Memory that training the transformer takes over what it takes in PyTorch, each in a process of its own: rank 0
    trains by the package, rank 1 by PyTorch.

    Counted is the most that is resident during a step, values, gradients and optimizer's state included, above what
    was resident before the model was built and after both libraries had trained a tiny one.
    """
    world = MPI.COMM_WORLD

    def trainer(task: Task) -> Any:
        return task.theirs("channels_last") if world.rank else task.ours()

    trainer(transformer(width=16, blocks=1)).step()
    task = transformer()
    before = resident("VmRSS")
    training = trainer(task)
    training.step()
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak
    for _ in range(3):
        training.step()
    ours, theirs = world.allgather(resident("VmHWM") - before)
    return Ratio(*[ours / theirs] * 3)


def resident(which: str) -> int:
    """Bytes of this process in memory, at present (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not tell how much memory a process has")
